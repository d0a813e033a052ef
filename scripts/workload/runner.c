/*
 * Runs commands for a host on the other end of a line: the first program of a workload guest (on its serial console),
 * or an ordinary program in a chroot of the same tree (on pipes), so that both measure in the same way.
 *
 * The host writes lines, the runner answers each with lines that begin with '@' or '|'; other lines are the kernel's.
 *
 *   run COMMAND   gives COMMAND to the shell and waits for it; answers the end of its standard output in lines
 *                 "| TEXT", on failure more of that and its standard error, too; then "@done STATUS WALL_NS CPU_NS HASH":
 *                 exit status (128 + signal), elapsed time, processor time as the kernel here counts it, and a hash of
 *                 the standard output
 *   off           powers off
 *
 * Between commands the runner waits for input, so the machine is idle while the host reads its counters.
 */
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define OUTPUT "/tmp/.stdout"
#define ERRORS "/tmp/.stderr"

static void die(const char *what)
{
    printf("@fatal %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void set_up_system(void)
{
    static const struct {
        const char *type, *where, *options;
    } mounts[] = {
        {"sysfs", "/sys", ""},
        {"tmpfs", "/dev/shm", ""},
        {"tmpfs", "/run", ""},
        {"tmpfs", "/tmp", "mode=1777,size=80%"},
    };
    mkdir("/dev/shm", 0755);
    for (size_t i = 0; i < sizeof(mounts) / sizeof(*mounts); i++)
        if (mount(mounts[i].type, mounts[i].where, mounts[i].type, 0, mounts[i].options) < 0)
            die(mounts[i].where);
    symlink("/proc/self/fd", "/dev/fd");
}

/* The loopback interface, for servers and their clients in one guest. */
static void set_up_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo"};
    int s = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (s < 0 || ioctl(s, SIOCGIFFLAGS, &request) < 0)
        die("lo");
    request.ifr_flags |= IFF_UP;
    if (ioctl(s, SIOCSIFFLAGS, &request) < 0)
        die("lo");
    close(s);
}

/* Lines as they are written: no echo, no waiting for a terminal's signals. */
static void set_up_console(void)
{
    struct termios t;
    if (tcgetattr(0, &t) < 0)
        return;
    t.c_lflag &= ~(tcflag_t)(ECHO | ISIG);
    t.c_oflag &= ~(tcflag_t)OPOST;
    tcsetattr(0, TCSANOW, &t);
}

static int opened(const char *path)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        die(path);
    return fd;
}

/* FNV-1a over a whole file. */
static uint64_t hash_of(int fd)
{
    uint64_t h = 0xcbf29ce484222325;
    unsigned char buffer[4096];
    ssize_t n;
    lseek(fd, 0, SEEK_SET);
    while ((n = read(fd, buffer, sizeof(buffer))) > 0)
        for (ssize_t i = 0; i < n; i++)
            h = (h ^ buffer[i]) * 0x100000001b3;
    return h;
}

static void show_end(int fd, off_t most)
{
    off_t size = lseek(fd, 0, SEEK_END);
    lseek(fd, size > most ? size - most : 0, SEEK_SET);
    FILE *f = fdopen(dup(fd), "r");
    char *line = NULL;
    size_t room = 0;
    ssize_t n;
    while (f && (n = getline(&line, &room, f)) > 0) {
        line[n - (line[n - 1] == '\n')] = 0;
        printf("| %s\n", line);
    }
    free(line);
    if (f)
        fclose(f);
}

static void run(const char *command)
{
    int out = opened(OUTPUT), err = opened(ERRORS), status;
    struct rusage use;
    uint64_t start = now_ns();
    pid_t pid = fork();
    if (pid < 0)
        die("fork");
    if (pid == 0) {
        setsid();
        dup2(open("/dev/null", O_RDONLY), 0);
        dup2(out, 1);
        dup2(err, 2);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(127);
    }
    while (wait4(pid, &status, 0, &use) < 0)
        if (errno != EINTR)
            die("wait4");
    uint64_t wall = now_ns() - start;
    uint64_t cpu = (uint64_t)(use.ru_utime.tv_sec + use.ru_stime.tv_sec) * 1000000000 +
                   (uint64_t)(use.ru_utime.tv_usec + use.ru_stime.tv_usec) * 1000;
    /* As the first process: what lost its parent. */
    while (waitpid(-1, NULL, WNOHANG) > 0)
        ;
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    show_end(out, code != 0 ? 3000 : 300);
    if (code != 0)
        show_end(err, 3000);
    printf("@done %d %llu %llu %016llx\n", code, (unsigned long long)wall, (unsigned long long)cpu,
           (unsigned long long)hash_of(out));
    close(out);
    close(err);
}

int main(void)
{
    int first = getpid() == 1;
    char *line = NULL;
    size_t room = 0;
    ssize_t n;

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (first) {
        set_up_console();
        set_up_system();
    }
    set_up_loopback();
    setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 1);
    setenv("HOME", "/tmp", 1);
    setenv("LC_ALL", "C.UTF-8", 1);
    setenv("PYTHONHASHSEED", "0", 1);
    if (chdir("/tmp") < 0)
        die("/tmp");
    printf("@ready\n");
    while ((n = getline(&line, &room, stdin)) > 0) {
        line[n - (line[n - 1] == '\n')] = 0;
        if (strncmp(line, "run ", 4) == 0)
            run(line + 4);
        else if (strcmp(line, "off") == 0)
            break;
        else
            printf("@unknown %s\n", line);
    }
    if (first) {
        sync();
        reboot(RB_POWER_OFF);
        die("power off");
    }
    return 0;
}
