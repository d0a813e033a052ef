/* pingpong N: a byte goes to another process and back, N times: two system calls and a context switch each way. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    long n = argc > 1 ? atol(argv[1]) : 1000, sum = 0;
    int there[2], back[2];
    unsigned char byte = 0;
    if (pipe(there) < 0 || pipe(back) < 0)
        return 1;
    pid_t pid = fork();
    if (pid < 0)
        return 1;
    if (pid == 0) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1) {
            byte = (unsigned char)(byte * 5 + 1);
            if (write(back[1], &byte, 1) != 1)
                return 1;
        }
        return 0;
    }
    for (long i = 0; i < n; i++) {
        if (write(there[1], &byte, 1) != 1 || read(back[0], &byte, 1) != 1)
            return 1;
        sum += byte;
    }
    close(there[1]);
    int status;
    if (waitpid(pid, &status, 0) != pid || status != 0)
        return 1;
    printf("%ld\n", sum);
    return 0;
}
