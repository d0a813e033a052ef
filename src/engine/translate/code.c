/* Memory for translated code; see code.h. */
#include "engine/translate/code.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "base/log.h"
#include "base/resident.h"
#include "base/util.h"
#include "memory/memory.h"

/* Perf looks into its maps for anonymous memory only. Shared, it can be mapped twice, too. */
static int init_anonymous(struct code_memory *c, size_t size)
{
    c->write = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    c->exec = c->write != MAP_FAILED ? mremap(c->write, 0, size, MREMAP_MAYMOVE) : MAP_FAILED;
    if (c->exec == MAP_FAILED || mprotect(c->exec, size, PROT_READ | PROT_EXEC)) {
        int err = -errno;

        log_error("cannot map executable memory: %s; leave --translate perf=map out", strerror(errno));
        if (c->write != MAP_FAILED)
            munmap(c->write, size);
        if (c->exec != MAP_FAILED)
            munmap(c->exec, size);
        memset(c, 0, sizeof(*c));
        return err;
    }
    c->size = c->limit = c->cold = c->cold_end = c->cold_touched = size;
    return 0;
}

int code_init(struct code_memory *c, size_t size, bool anonymous)
{
    int fd, err;

    memset(c, 0, sizeof(*c));
    if (anonymous)
        return init_anonymous(c, size);
    fd = memfd_create("ringfort-code", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)size)) {
        err = -errno;
        log_error("cannot make %zu MiB of memory for translated code: %s", size >> 20, strerror(errno));
        if (fd >= 0)
            close(fd);
        return err;
    }
    c->write = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    c->exec = mmap(NULL, size, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
    err = -errno;
    close(fd);
    if (c->write == MAP_FAILED || c->exec == MAP_FAILED) {
        log_error("cannot map executable memory: %s; use --engine interp if a security module forbids it",
                  strerror(-err));
        if (c->write != MAP_FAILED)
            munmap(c->write, size);
        memset(c, 0, sizeof(*c));
        return err;
    }
    c->size = c->limit = c->cold = c->cold_end = c->cold_touched = size;
    return 0;
}

/* Written code is only read through the other mapping, apart from jumps that are patched: what is resident counts twice but briefly. */
#define WRITTEN_STEP KIB(256)

#define COLD_PIECE KIB(64)
_Static_assert(COLD_PIECE >= CODE_COLD_MAX, "a unit's slow paths lie in one piece");

void code_use(struct code_memory *c, const uint8_t *end)
{
    size_t pages;

    c->used = align_up((size_t)(end - c->write), 16);
    pages = align_up(c->used, GUEST_PAGE_SIZE);
    if (pages > c->touched) {
        resident_add_shared(2 * (pages - c->touched));
        c->written += pages - c->touched;
        c->touched = pages;
    }
    if (c->written >= WRITTEN_STEP && !madvise(c->write, pages - GUEST_PAGE_SIZE, MADV_DONTNEED)) {
        resident_remove_shared(c->written);
        c->written = 0;
    }
}

/* The piece for slow paths is done with, in the writable view. */
static void leave_piece(struct code_memory *c)
{
    if (c->limit < c->size && !madvise(c->write + c->limit, COLD_PIECE, MADV_DONTNEED))
        resident_remove_shared(COLD_PIECE);
}

void code_reset(struct code_memory *c)
{
    leave_piece(c);
    c->used = c->fixed;
    c->limit = c->cold = c->cold_end = c->size;
}

uint8_t *code_cold(struct code_memory *c, size_t bytes, const uint8_t *hot_end)
{
    size_t hot = align_up((size_t)(hot_end - c->write), GUEST_PAGE_SIZE);

    if (c->cold_end - c->cold >= bytes)
        return c->write + c->cold;
    if (c->limit < hot + COLD_PIECE)
        return NULL;
    leave_piece(c);
    c->limit -= COLD_PIECE;
    c->cold = c->limit;
    c->cold_end = c->limit + COLD_PIECE;
    resident_add_shared(COLD_PIECE);
    if (c->limit < c->cold_touched) {
        resident_add_shared(c->cold_touched - c->limit);
        c->cold_touched = c->limit;
    }
    return c->write + c->cold;
}

void code_destroy(struct code_memory *c)
{
    if (c->exec) {
        leave_piece(c);
        resident_remove_shared(c->touched + c->written + c->size - c->cold_touched);
        munmap(c->write, c->size);
        munmap(c->exec, c->size);
    }
    memset(c, 0, sizeof(*c));
}
