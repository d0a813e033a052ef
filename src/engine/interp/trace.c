/* See trace.h. */
#include "engine/interp/trace.h"

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>

#include "base/log.h"

/* Guarded by the lock while vCPUs run. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static FILE *file;
static bool with_registers, failed;

bool trace_on(void) { return file != NULL; }

int trace_open(const char *path, bool registers)
{
    if (!path)
        return 0;
    file = fopen(path, "we");
    if (!file) {
        log_error("--trace-exec: cannot write %s: %s", path, strerror(errno));
        return -errno;
    }
    with_registers = registers;
    failed = false;
    return 0;
}

void trace_close(void)
{
    if (file && fclose(file) && !failed)
        log_error("--trace-exec: the file is not complete: %s", strerror(errno));
    file = NULL;
}

static void write_registers(const struct x86_cpu *cpu)
{
    static const char *const name[16] = { "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
                                          "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15" };

    fprintf(file, "%u   rflags=%" PRIx64, cpu->index, x86_rflags(cpu));
    for (unsigned i = 0; i < 16; i++)
        fprintf(file, " %s=%" PRIx64, name[i], cpu->s.gpr[i]);
    fputc('\n', file);
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
    if (!file)
        goto out;
    if (with_registers)
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
        fprintf(file, "%u %c %016" PRIx64 "  %s\n", cpu->index, cpu->cpl == 3 ? 'u' : 'k', rip + offset, text);
        offset += insn.length;
    }
    if (ferror(file) && !failed) {
        failed = true;
        log_error("--trace-exec: the file is not complete: %s", strerror(errno));
    }
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
