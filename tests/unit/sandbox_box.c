/* See sandbox_box.h. */
#include "sandbox_box.h"

#include <dirent.h>
#include <inttypes.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

int make_file(uint8_t **ram)
{
    int fd = memfd_create("guest-ram", MFD_CLOEXEC);

    if (fd < 0 || ftruncate(fd, FILE_PAGES * PAGE))
        return -1;
    *ram = mmap(NULL, FILE_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return *ram == MAP_FAILED ? -1 : fd;
}

void read_text(pid_t pid, const char *name, char *text, size_t size)
{
    char path[64];
    size_t n = 0;
    FILE *f;

    snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, name);
    f = fopen(path, "r");
    if (f) {
        n = fread(text, 1, size - 1, f);
        fclose(f);
    }
    text[n] = 0;
}

void read_maps(const struct box *b, char *text, size_t size)
{
    char *vsyscall;

    read_text(sandbox_pid(b->s), "maps", text, size);
    vsyscall = strstr(text, "ffffffffff600000-");
    if (vsyscall)
        *vsyscall = 0;
}

unsigned lines(const char *text)
{
    unsigned n = 0;

    for (; *text; text++)
        n += *text == '\n';
    return n;
}

unsigned files_of(pid_t pid)
{
    char path[64];
    struct dirent *e;
    unsigned n = 0;
    DIR *d;

    snprintf(path, sizeof(path), "/proc/%d/fd", (int)pid);
    d = opendir(path);
    while (d && (e = readdir(d)))
        n += e->d_name[0] != '.';
    if (d)
        closedir(d);
    return n;
}

bool open_box(struct box *b)
{
    char maps[4096], *line;

    b->file = make_file(&b->ram);
    if (b->file < 0 || sandbox_create(&b->s, &b->file, 1))
        return false;
    read_text(sandbox_pid(b->s), "maps", maps, sizeof(maps));
    line = strstr(maps, "r-xp");
    b->ours = line ? strtoull(maps, NULL, 16) : 0;
    if (!sandbox_map(b->s, CODE, PAGE, 0, 0, PROT_READ | PROT_EXEC) || !sandbox_map(b->s, DATA, PAGE, 0, PAGE, PROT_READ | PROT_WRITE) ||
        !sandbox_map(b->s, STACK, PAGE, 0, 2 * PAGE, PROT_READ | PROT_WRITE))
        return false;
    return b->ours && sandbox_commit(b->s) == 0;
}

void close_box(struct box *b)
{
    sandbox_destroy(b->s);
    munmap(b->ram, FILE_PAGES * PAGE);
    close(b->file);
}

void start_at(struct box *b, const uint8_t *code, const uint8_t *end)
{
    memset(b->ram, 0xcc, PAGE);
    memcpy(b->ram, code, (size_t)(end - code));
    *sandbox_regs(b->s) = (struct user_regs_struct){ .rip = CODE, .rsp = STACK + PAGE, .eflags = 2, .cs = 0x33, .ss = 0x2b };
}

enum sandbox_stop run(struct box *b)
{
    uint64_t address = 0;

    return sandbox_run(b->s, &address);
}

int setup_box(void **state)
{
    struct box *b = calloc(1, sizeof(*b));

    *state = b;
    return b && open_box(b) ? 0 : -1;
}

int teardown_box(void **state)
{
    close_box(*state);
    free(*state);
    return 0;
}

void in_child(int (*fn)(void))
{
    pid_t pid = fork();
    int status;

    if (pid == 0)
        _exit(fn());
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
}

void assert_only_ours(const struct box *b)
{
    char maps[4096], ours[64], list[64];

    read_maps(b, maps, sizeof(maps));
    snprintf(ours, sizeof(ours), "%" PRIx64 "-%" PRIx64 " r-xp", b->ours, b->ours + PAGE);
    snprintf(list, sizeof(list), "\n%" PRIx64 "-%" PRIx64 " r--s", b->ours + PAGE, b->ours + 17 * PAGE);
    if (lines(maps) != 2 || strncmp(maps, ours, strlen(ours)) != 0 || !strstr(maps, list))
        fail_msg("mapped is:\n%s", maps);
}

enum sandbox_stop touch(struct box *b, uint64_t va, bool write)
{
    if (write)
        START(b, stores);
    else
        START(b, loads);
    sandbox_regs(b->s)->rdi = va;
    return run(b);
}

bool works(struct box *b)
{
    START(b, does_syscall);
    return run(b) == SANDBOX_SYSCALL && sandbox_regs(b->s)->rip == CODE + 12;
}

void *when_it_runs(void *opaque)
{
    struct other *o = opaque;

    while (!*(volatile uint8_t *)(o->b->ram + PAGE))
        sched_yield();
    if (o->signal)
        kill(sandbox_pid(o->b->s), o->signal);
    else
        sandbox_interrupt(sandbox_handle(o->b->s));
    return NULL;
}
