/*
 * probe MILLISECONDS [PART... | -PART...]: what a user program can see of the processor and of its memory, as unkindly as it can be asked: every
 * register across system calls, faults, interrupts and switches; every exception with its exact address; code that changes
 * under all kinds of writers; memory that changes its rights, its place and its contents; the odd instructions.
 *
 * Runs as a static program in a guest with nothing else (cases_probe.py), and on any x86-64 Linux: what a real processor does is right.
 * Each part (of those named, or but those with a minus) is repeated for so long, at least once. Prints "PART: N rounds" for each; the first wrong result ends it with status 1.
 */
#define _GNU_SOURCE
#include "probe.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *part_now = "?";

void wrong(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    printf("WRONG: %s: ", part_now);
    vprintf(format, args);
    printf("\n");
    va_end(args);
    fflush(stdout);
    _exit(1);
}

void lacking(const char *format, ...)
{
    static char said[16][128];
    char text[128];
    va_list args;

    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    for (unsigned i = 0; i < 16; i++) {
        if (strcmp(said[i], text) == 0)
            return;
        if (said[i][0])
            continue;
        strcpy(said[i], text);
        printf("%s: not tested: %s\n", part_now, text);
        return;
    }
}

uint8_t *map(size_t size, int protection)
{
    void *p = mmap(NULL, size, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (p == MAP_FAILED)
        wrong("mmap: %s", strerror(errno));
    return p;
}

pid_t split(void)
{
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0)
        wrong("fork: %s", strerror(errno));
    return pid;
}

void join(pid_t pid)
{
    int status;

    if (waitpid(pid, &status, 0) != pid || status != 0)
        wrong("a child ended with wait status %x", (unsigned)status);
}

uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    return *state ^= *state << 17;
}

double seconds(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

int has_fsgsbase(void) { return (getauxval(AT_HWCAP2) & 2) != 0; }

bool put(const char *file, const char *text)
{
    int fd = open(file, O_WRONLY);
    bool done = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);

    if (fd >= 0)
        close(fd);
    return done;
}

bool guest_of_ours(void)
{
    char line[4096] = "";
    FILE *f = fopen("/proc/cmdline", "r");

    if (f) {
        if (!fgets(line, sizeof(line), f))
            line[0] = '\0';
        fclose(f);
    }
    return strstr(line, "rf.cmd") != NULL;
}

int pin(unsigned cpu)
{
    cpu_set_t set;

    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    return sched_setaffinity(0, sizeof(set), &set) == 0;
}

void unpin(void)
{
    cpu_set_t set;

    memset(&set, 0xff, sizeof(set));
    sched_setaffinity(0, sizeof(set), &set);
}

#define PART(name) { #name, part_##name }
static const struct {
    const char *name;
    void (*run)(uint64_t round);
} parts[] = {
    PART(registers), PART(x87_pointers), PART(switches), PART(storm),
    PART(memory_faults), PART(jumps), PART(exceptions), PART(traps), PART(stacks), PART(oddities),
    PART(features), PART(stepped), PART(lingering), PART(clocks), PART(numbers), PART(vsyscall), PART(segments), PART(bases), PART(code32),
    PART(code), PART(aliases), PART(code_steps), PART(code_races), PART(code_reclaimed), PART(code_breakpoints), PART(copies), PART(shared), PART(protections), PART(remaps), PART(huge), PART(moved), PART(merged),
    PART(many), PART(proc_mem), PART(soft_dirty), PART(userfault), PART(atomics),
    PART(trace_steps), PART(trace_breakpoints), PART(trace_watch), PART(exec),
};

static bool chosen(const char *name, int argc, char **argv)
{
    /* Debug registers are not there in all engines (SUPPORT.md). */
    bool named = false, all = strcmp(name, "trace_watch") != 0;

    for (int i = 2; i < argc; i++) {
        if (argv[i][0] == '-' && strcmp(argv[i] + 1, name) == 0)
            return false;
        named = named || strcmp(argv[i], name) == 0;
        all = all && argv[i][0] == '-';
    }
    return named || all;
}

int main(int argc, char **argv)
{
    double bound = argc > 1 ? atof(argv[1]) / 1000 : 0.1, begin;

    if (argc == 3 && strcmp(argv[1], "executed") == 0)
        return (int)strtol(argv[2], NULL, 10);
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (unsigned i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        uint64_t round = 0;

        if (!chosen(parts[i].name, argc, argv))
            continue;
        part_now = parts[i].name;
        begin = seconds();
        do
            parts[i].run(round++);
        while (seconds() - begin < bound);
        unpin();
        printf("%s: %llu rounds in %.0f ms\n", part_now, (unsigned long long)round, (seconds() - begin) * 1000);
    }
    printf("probe: all is right\n");
    return 0;
}
