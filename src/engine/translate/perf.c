/* See perf.h. Formats: tools/perf/Documentation/jit-interface.txt and jitdump-specification.txt of Linux. */
#include "engine/translate/perf.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "engine/translate/options.h"

#define JITDUMP_MAGIC 0x4a695444u       /* "JiTD" */
#define JITDUMP_X86_64 62u              /* EM_X86_64 */
#define JITDUMP_LOAD 0u

struct dump_header {
    uint32_t magic, version, size, machine, pad, pid;
    uint64_t time, flags;
};
_Static_assert(sizeof(struct dump_header) == 40, "of the format");

struct dump_load {
    uint32_t id, size;
    uint64_t time;
    uint32_t pid, tid;
    uint64_t vma, address, code_size, index;
};
_Static_assert(sizeof(struct dump_load) == 56, "of the format");

/* Guarded by the lock. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *file;
static unsigned kind;
static uint64_t codes;

/* perf record has to be told -k mono for it. */
static uint64_t now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int begin_dump(void)
{
    const struct dump_header h = { .magic = JITDUMP_MAGIC, .version = 1, .size = sizeof(h), .machine = JITDUMP_X86_64,
                                   .pid = (uint32_t)getpid(), .time = now() };

    if (fwrite(&h, sizeof(h), 1, file) != 1 || fflush(file))
        return -errno;
    /* perf finds the file by this mapping. */
    if (mmap(NULL, (size_t)sysconf(_SC_PAGESIZE), PROT_READ | PROT_EXEC, MAP_PRIVATE, fileno(file), 0) == MAP_FAILED)
        return -errno;
    return 0;
}

int perf_open(unsigned what)
{
    char path[64];
    int err = 0;

    pthread_mutex_lock(&lock);
    if (file || what == TRANSLATE_PERF_OFF)
        goto out;
    snprintf(path, sizeof(path), what == TRANSLATE_PERF_MAP ? "/tmp/perf-%d.map" : "jit-%d.dump", (int)getpid());
    kind = what;
    file = fopen(path, "wx+e");         /* somebody else's link in /tmp is not followed */
    if (file && what == TRANSLATE_PERF_JITDUMP)
        err = begin_dump();
    else if (!file)
        err = -errno;
    if (err) {
        log_error("--translate perf: cannot write %s: %s; remove it, or run where it can be made", path, strerror(-err));
        if (file)
            fclose(file);
        file = NULL;
    }
out:
    pthread_mutex_unlock(&lock);
    return err;
}

static void write_dump(const void *code, size_t size, const char *name)
{
    size_t name_size = strlen(name) + 1;
    struct dump_load r = { .id = JITDUMP_LOAD, .size = (uint32_t)(sizeof(r) + name_size + size), .time = now(),
                           .pid = (uint32_t)getpid(), .tid = (uint32_t)syscall(SYS_gettid), .vma = (uint64_t)(uintptr_t)code,
                           .address = (uint64_t)(uintptr_t)code, .code_size = size, .index = codes++ };

    fwrite(&r, sizeof(r), 1, file);
    fwrite(name, name_size, 1, file);
    fwrite(code, size, 1, file);
}

void perf_code(const void *code, size_t size, uint64_t rip, bool user, const char *name)
{
    char text[48];

    if (!name) {
        snprintf(text, sizeof(text), user ? "guest_user_%" PRIx64 : "guest_%" PRIx64, rip);
        name = text;
    }
    pthread_mutex_lock(&lock);
    if (file && kind == TRANSLATE_PERF_MAP)
        fprintf(file, "%" PRIxPTR " %zx %s\n", (uintptr_t)code, size, name);
    else if (file)
        write_dump(code, size, name);
    if (file)
        fflush(file);
    pthread_mutex_unlock(&lock);
}
