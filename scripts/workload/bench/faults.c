/* faults N: maps 4 MiB of small pages, touches each of them, unmaps; N times. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

int main(int argc, char **argv)
{
    const size_t size = 4 << 20, page = 4096;
    long n = argc > 1 ? atol(argv[1]) : 1, sum = 0;
    for (long i = 0; i < n; i++) {
        char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            return 1;
        /* A kernel without huge pages has nothing to advise on. */
        (void)madvise(p, size, MADV_NOHUGEPAGE);
        for (size_t at = 0; at < size; at += page)
            p[at] = (char)(at / page);
        for (size_t at = 0; at < size; at += page)
            sum += p[at];
        if (munmap(p, size) < 0)
            return 1;
    }
    printf("%ld\n", sum);
    return 0;
}
