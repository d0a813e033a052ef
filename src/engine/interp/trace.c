/* See trace.h. */
#include "engine/interp/trace.h"

#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "base/log.h"

/* Guarded by the lock while vCPUs run, but for on. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct trace_options options;
static bool on;
static FILE *file;              /* NULL: the trace has ended */
static uint64_t written;        /* bytes in the file */
static bool bounded;            /* it is a regular one */

bool trace_on(void) { return on; }

static int open_file(void)
{
    struct stat st;

    file = fopen(options.path, "we");
    if (!file) {
        log_error("--trace-exec: cannot write %s: %s", options.path, strerror(errno));
        return -errno;
    }
    bounded = fstat(fileno(file), &st) == 0 && S_ISREG(st.st_mode);
    written = 0;
    return 0;
}

/* Says so when something was lost. */
static bool close_file(void)
{
    bool lost = ferror(file);

    if (fclose(file) || lost) {
        log_error("--trace-exec: %s is not complete: %s", options.path, strerror(errno));
        lost = true;
    }
    file = NULL;
    return !lost;
}

int trace_open(const struct trace_options *o)
{
    int err;

    if (!o->path)
        return 0;
    options = *o;
    err = open_file();
    on = !err;
    return err;
}

void trace_close(void)
{
    if (file)
        close_file();
    on = false;
}

/* NAME.i, or NAME itself for 0. */
static void name_of(char *out, size_t size, unsigned i)
{
    if (i)
        snprintf(out, size, "%s.%u", options.path, i);
    else
        snprintf(out, size, "%s", options.path);
}

static void rotate(void)
{
    char older[PATH_MAX + 16], newer[PATH_MAX + 16];

    if (!close_file())
        return;
    if (options.files == 1) {
        log_warn("--trace-exec: the trace ends: %s has the %" PRIu64 " bytes that size= allows", options.path, written);
        return;
    }
    for (unsigned i = options.files - 1; i; i--) {
        name_of(older, sizeof(older), i);
        name_of(newer, sizeof(newer), i - 1);
        if (rename(newer, older) && (errno != ENOENT || i == 1)) {
            log_error("--trace-exec: the trace ends: cannot rename %s to %s: %s", newer, older, strerror(errno));
            return;
        }
    }
    open_file();
}

static void write_text(const char *format, ...) __attribute__((format(printf, 1, 2)));
static void write_text(const char *format, ...)
{
    va_list args;
    int n;

    va_start(args, format);
    n = vfprintf(file, format, args);
    va_end(args);
    written += n > 0 ? (uint64_t)n : 0;
}

static void write_registers(const struct x86_cpu *cpu)
{
    static const char *const name[16] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                          "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15" };

    write_text("%u   rflags=%" PRIx64, cpu->index, x86_rflags(cpu));
    for (unsigned i = 0; i < 16; i++)
        write_text(" %s=%" PRIx64, name[i], cpu->s.gpr[i]);
    write_text("\n");
}

/* The bytes from offset on of the block's, which may lie in two pages. */
static unsigned bytes_at(const struct block *b, unsigned offset, uint8_t out[X86_MAX_INSN])
{
    unsigned first = GUEST_PAGE_SIZE - (unsigned)((uintptr_t)b->host & (GUEST_PAGE_SIZE - 1)), n = 0;

    for (; n < X86_MAX_INSN && offset + n < b->bytes; n++)
        out[n] = offset + n < first ? b->host[offset + n] : b->host2 ? b->host2[offset + n - first] : 0;
    return n;
}

void trace_block(const struct x86_cpu *cpu, const struct block *b)
{
    uint64_t rip = page_rip(cpu, (uintptr_t)b->host & (GUEST_PAGE_SIZE - 1));

    pthread_mutex_lock(&lock);
    if (file && bounded && written >= options.size)
        rotate();
    if (!file)
        goto out;
    if (options.registers)
        write_registers(cpu);
    for (unsigned offset = 0; offset < b->bytes;) {
        uint8_t bytes[X86_MAX_INSN];
        unsigned n = bytes_at(b, offset, bytes);
        struct x86_insn insn;
        char text[128];
        bool gp;

        if (x86_decode(&insn, bytes, n, cpu->code_size, &gp))
            break;
        x86_format(text, sizeof(text), bytes, insn.length, cpu->code_size, rip + offset);
        write_text("%u %c %016" PRIx64 "  %s\n", cpu->index, cpu->cpl == 3 ? 'u' : 'k', rip + offset, text);
        offset += insn.length;
    }
    if (ferror(file))
        close_file();
out:
    pthread_mutex_unlock(&lock);
}

static const struct op *op_trace(struct x86_cpu *cpu, const struct op *op)
{
    trace_block(cpu, op->aux);
    NEXT;
}

static void nothing_killed(struct interp *it, struct block *b) {}
static void nothing_unlinked(struct block *from, const struct block *to) {}
static void nothing_flushed(struct interp *it) {}

const struct block_hooks trace_hooks = {
    .prologue = op_trace, .killed = nothing_killed, .unlink = nothing_unlinked, .flushed = nothing_flushed,
};
