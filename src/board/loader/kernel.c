/*
 * Kernels: what a file is, and loading it. See kernel.h.
 *
 * A bzImage's payload unpacks to an ELF file of 50 to 70 MB. It is unpacked into the top of the
 * guest's own memory, which is free at that time, and its segments are copied down from there; so
 * the VMM's memory does not grow. Where both do not fit beside each other, a copy outside guest
 * memory is made for the moment.
 */
#include "board/loader/kernel.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/log.h"
#include "base/resident.h"
#include "base/util.h"
#include "board/loader/elf.h"
#include "board/loader/multiboot.h"
#include "board/loader/source.h"
#include "board/loader/unpack.h"
#include "memory/memory.h"

#define LOAD_MIN           MIB(1) /* the board's tables are below */
#define INITRD_MAX_DEFAULT 0x7fffffffu
#define LINUX_CMDLINE_MAX  2047u /* COMMAND_LINE_SIZE of x86 less the final 0 */

/* Fields of Linux's setup header, offsets from the start of the file. */
enum {
    HDR_SETUP_SECTS = 0x1f1,
    HDR_SYSSIZE = 0x1f4,
    HDR_JUMP = 0x201,
    HDR_MAGIC = 0x202,
    HDR_VERSION = 0x206,
    HDR_LOADFLAGS = 0x211,
    HDR_INITRD_MAX = 0x22c,
    HDR_XLOADFLAGS = 0x236,
    HDR_CMDLINE_SIZE = 0x238,
    HDR_PAYLOAD_OFFSET = 0x248,
    HDR_PAYLOAD_LENGTH = 0x24c,
    HDR_PREF_ADDRESS = 0x258,
    HDR_INIT_SIZE = 0x260,
    HDR_END = 0x268,
};
#define LOADED_HIGH   0x01
#define XLF_KERNEL_64 0x01
#define STARTUP_64    0x200 /* offset of the 64-bit entry in the protected-mode part */

struct bzimage {
    unsigned version;    /* boot protocol, 0x20f */
    const uint8_t *code; /* the protected-mode part */
    uint64_t code_len;
    const uint8_t *payload; /* inside code */
    uint64_t payload_len;
    uint64_t pref_address, init_size;
};

static unsigned long long mib_up(uint64_t bytes)
{
    return (bytes + MIB(1) - 1) >> 20;
}

void guest_memory_clear(struct memory *mem, uint64_t gpa, uint64_t len)
{
    resident_note();
    memory_clear(mem, gpa, len);
}

/* Is [start, end) where kernels may be? */
static int check_range(const struct source *src, uint64_t start, uint64_t end, uint64_t ram_end)
{
    if (start < LOAD_MIN)
        return source_error(
            src, "wants to be loaded at %#llx, below 1 MiB, where this machine keeps its tables",
            (unsigned long long)start);
    if (end > GIB(3))
        return source_error(
            src, "wants to be loaded up to %#llx, beyond the low memory of this machine (3 GiB)",
            (unsigned long long)end);
    if (end > ram_end)
        return source_error(src, "needs at least %llu MiB of guest memory; there are %llu MiB",
                            mib_up(end), mib_up(ram_end));
    return 0;
}

static int no_protocol(const struct source *src, enum boot_protocol want)
{
    static const char *const name[] = {
        [BOOT_PVH] = "PVH", [BOOT_MULTIBOOT] = "Multiboot", [BOOT_LINUX64] = "64-bit Linux"};
    return source_error(src, "has no entry for the %s boot protocol, which was asked for",
                        name[want]);
}

static int load_segments(const struct source *src, const struct elf *e, struct memory *mem,
                         struct kernel *k)
{
    if (elf_load(e, mem))
        return source_error(src, "does not fit into guest memory");
    k->start = e->start;
    k->end = e->end;
    return 0;
}

/* Chooses the protocol of an ELF file; mb NULL: it has no Multiboot header. */
static int choose_elf(const struct source *src, const struct elf *e, const struct multiboot *mb,
                      enum boot_protocol want, struct kernel *k)
{
    k->is_linux = e->is_linux;
    if (e->has_pvh && (want == BOOT_AUTO || want == BOOT_PVH)) {
        k->protocol = BOOT_PVH;
        k->entry = e->pvh_entry;
    } else if (mb && (want == BOOT_AUTO || want == BOOT_MULTIBOOT)) {
        k->protocol = BOOT_MULTIBOOT;
        if (mb->has_addresses) /* then the ELF headers do not count */
            return 0;
        k->entry = e->entry;
    } else if (e->is_program) {
        return source_error(src, "is a program to be run by Linux, not a kernel");
    } else if (e->is_64 && (want == BOOT_AUTO || want == BOOT_LINUX64)) {
        k->protocol = BOOT_LINUX64;
        k->entry = e->entry;
        k->is_linux = true;
    } else if (want == BOOT_AUTO) {
        return source_error(src, "is a 32-bit ELF file without PVH note or Multiboot header; this "
                                 "machine cannot start it");
    } else {
        return no_protocol(src, want);
    }
    if (!elf_contains(e, k->entry))
        return source_error(src,
                            "has a corrupt header: its entry point %#llx is outside its segments",
                            (unsigned long long)k->entry);
    if (k->is_linux && k->cmdline_max == UINT32_MAX)
        k->cmdline_max = LINUX_CMDLINE_MAX;
    return 0;
}

static int load_multiboot_raw(const struct source *src, const uint8_t *data,
                              const struct multiboot *mb, struct memory *mem, uint64_t ram_end,
                              struct kernel *k)
{
    uint64_t end = (uint64_t)mb->load_addr + mb->memsz;
    int err = check_range(src, mb->load_addr, end, ram_end);
    if (err)
        return err;
    if (memory_write(mem, mb->load_addr, data + mb->load_offset, mb->load_len) ||
        memory_fill(mem, mb->load_addr + mb->load_len, 0, mb->memsz - mb->load_len))
        return source_error(src, "does not fit into guest memory");
    k->protocol = BOOT_MULTIBOOT;
    k->entry = mb->entry;
    k->start = mb->load_addr;
    k->end = end;
    return 0;
}

static int load_elf_file(const struct source *src, const uint8_t *data, uint64_t size,
                         struct memory *mem, uint64_t ram_end, enum boot_protocol want,
                         struct kernel *k)
{
    struct multiboot mb;
    int found = multiboot_parse(src, data, size, &mb);
    if (found < 0)
        return found;
    struct elf e;
    int err = elf_parse(src, data, size, &e);
    if (err)
        return err;
    if ((err = choose_elf(src, &e, found ? &mb : NULL, want, k)))
        return err;
    if (k->protocol == BOOT_MULTIBOOT && mb.has_addresses)
        return load_multiboot_raw(src, data, &mb, mem, ram_end, k);
    if ((err = check_range(src, e.start, e.end, ram_end)))
        return err;
    return load_segments(src, &e, mem, k);
}

static int parse_bzimage(const struct source *src, const uint8_t *data, uint64_t size,
                         struct bzimage *b)
{
    if (size < HDR_END)
        return source_error(src, "is truncated inside its setup header");
    unsigned sects = data[HDR_SETUP_SECTS] ? data[HDR_SETUP_SECTS] : 4;
    uint64_t setup_len = (sects + 1) * 512;
    b->version = load_le16(data + HDR_VERSION);
    if (b->version < 0x020c)
        return source_error(
            src,
            "is a Linux kernel with boot protocol %u.%02u; 2.12 or newer is needed (Linux 3.8)",
            b->version >> 8, b->version & 0xff);
    if (!(data[HDR_LOADFLAGS] & LOADED_HIGH))
        return source_error(src, "is a zImage; a bzImage is needed");
    if (!(load_le16(data + HDR_XLOADFLAGS) & XLF_KERNEL_64))
        return source_error(src, "is a 32-bit Linux kernel; a 64-bit one is needed");
    uint64_t code_len = (uint64_t)load_le32(data + HDR_SYSSIZE) * 16;
    /* syssize counts paragraphs, rounded up. */
    if (size < setup_len || code_len > size - setup_len + 15)
        return source_error(src, "is truncated: its header promises %llu bytes, the file has %llu",
                            (unsigned long long)(setup_len + code_len), (unsigned long long)size);
    if (code_len <= STARTUP_64)
        return source_error(src, "has a corrupt setup header (size)");
    b->code = data + setup_len;
    b->code_len = MIN(code_len, size - setup_len);
    uint64_t offset = load_le32(data + HDR_PAYLOAD_OFFSET),
             len = load_le32(data + HDR_PAYLOAD_LENGTH);
    if (offset > b->code_len || len > b->code_len - offset || len < 8)
        return source_error(src, "has a corrupt setup header (payload)");
    b->payload = b->code + offset;
    b->payload_len = len;
    b->pref_address = load_le64(data + HDR_PREF_ADDRESS);
    b->init_size = load_le32(data + HDR_INIT_SIZE);
    if (b->pref_address >= GIB(4))
        return source_error(src, "has a corrupt setup header (preferred address)");
    return 0;
}

/* Loads what payload unpacked to: an ELF file in scratch, which is guest memory from scratch_gpa
 * on. */
static int load_payload(const struct source *src, uint8_t *scratch, uint64_t scratch_gpa,
                        uint64_t size, const struct bzimage *b, struct memory *mem,
                        uint64_t ram_end, enum boot_protocol want, struct kernel *k)
{
    struct elf e;
    uint8_t *copy = NULL;
    int err = elf_parse(src, scratch, size, &e);
    if (err || (err = choose_elf(src, &e, NULL, want, k)))
        goto out;
    uint64_t end = MAX(e.end, b->pref_address + b->init_size);
    if ((err = check_range(src, e.start, end, ram_end)))
        goto out;
    if (e.end > scratch_gpa) {
        copy = malloc(size);
        if (!copy) {
            log_error("%s %s: out of memory for unpacking", src->what, src->path);
            err = -ENOMEM;
            goto out;
        }
        memcpy(copy, scratch, size);
        guest_memory_clear(mem, scratch_gpa, size);
        e.data = copy;
    }
    if ((err = load_segments(src, &e, mem, k)))
        goto out;
    k->end = end;
out:
    if (!copy)
        guest_memory_clear(mem, scratch_gpa, size);
    resident_note();
    free(copy);
    return err;
}

/* 1: the payload cannot be unpacked here, so the kernel has to do it itself; else 0 or an error. */
static int unpack_and_load(const struct source *src, const struct bzimage *b, struct memory *mem,
                           uint64_t ram_end, enum boot_protocol want, struct kernel *k)
{
    enum unpack_format format = unpack_detect(b->payload, b->payload_len);
    if (format == UNPACK_BZIP2 || format == UNPACK_LZO) {
        if (want == BOOT_AUTO)
            return 1;
        return source_error(src,
                            "is compressed with %s, which cannot be unpacked here: only its 64-bit "
                            "entry can be used",
                            unpack_format_name(format));
    }
    /* The formats above and below are all that Linux has, so this is damage: its own code would
     * fail on it, too, and less clearly. */
    if (format == UNPACK_NONE && !elf_is(b->payload, b->payload_len))
        return source_error(src, "is corrupt: its payload is neither compressed nor an ELF file");
    /* The build appends the unpacked size to the payload (gzip's own format ends with it). */
    uint64_t size =
        format == UNPACK_NONE ? b->payload_len : load_le32(b->payload + b->payload_len - 4);
    uint64_t need = MAX(LOAD_MIN + size, b->pref_address + b->init_size);
    if (need > ram_end)
        return source_error(src, "needs at least %llu MiB of guest memory; there are %llu MiB",
                            mib_up(need), mib_up(ram_end));
    uint64_t gpa = align_down(ram_end - size, GUEST_PAGE_SIZE);
    uint8_t *scratch = memory_map(mem, gpa, size);
    if (!scratch || !size)
        return source_error(src, "is corrupt: its payload has an impossible size");
    if (format == UNPACK_NONE) {
        memcpy(scratch, b->payload, size);
    } else {
        /* An LZ4 frame has no end of its own: without the appended size it ends with the input. */
        uint64_t in_len = b->payload_len - (format == UNPACK_LZ4 ? 4 : 0);
        struct unpack_result r;
        int err = unpack(format, b->payload, in_len, scratch, size, &r);
        if (!err && r.produced != size)
            err = source_error(src,
                               "is corrupt: its payload (%s) unpacks to %llu bytes instead of %llu",
                               unpack_format_name(format), (unsigned long long)r.produced,
                               (unsigned long long)size);
        else if (err)
            source_error(src, "its payload (%s) %s", unpack_format_name(format), r.error);
        if (err) {
            guest_memory_clear(mem, gpa, size);
            return err == -ENOMEM ? err : -EINVAL;
        }
    }
    memory_mark_written(mem, gpa, size);
    return load_payload(src, scratch, gpa, size, b, mem, ram_end, want, k);
}

static int load_bzimage(const struct source *src, const uint8_t *data, uint64_t size,
                        struct memory *mem, uint64_t ram_end, enum boot_protocol want,
                        struct kernel *k)
{
    struct bzimage b = {0};
    int err = parse_bzimage(src, data, size, &b);
    if (err)
        return err;
    k->is_linux = true;
    k->cmdline_max = load_le32(data + HDR_CMDLINE_SIZE);
    k->initrd_max = load_le32(data + HDR_INITRD_MAX);
    if (k->initrd_max == 0)
        k->initrd_max = INITRD_MAX_DEFAULT;
    /* The header's own length: the jump at 0x200 goes past it. */
    uint64_t header_end = MIN((uint64_t)HDR_MAGIC + data[HDR_JUMP],
                              (uint64_t)LINUX_SETUP_HEADER + LINUX_SETUP_HEADER_MAX);
    if (header_end < HDR_END || header_end > size)
        return source_error(src, "has a corrupt setup header (length)");
    k->setup_header_len = (unsigned)(header_end - LINUX_SETUP_HEADER);
    memcpy(k->setup_header, data + LINUX_SETUP_HEADER, k->setup_header_len);

    if (want == BOOT_MULTIBOOT)
        return no_protocol(src, want);
    if (want != BOOT_LINUX64) {
        err = unpack_and_load(src, &b, mem, ram_end, want, k);
        if (err <= 0)
            return err;
    }

    uint64_t end = b.pref_address + MAX(b.init_size, b.code_len);
    if ((err = check_range(src, b.pref_address, end, ram_end)))
        return err;
    if (memory_write(mem, b.pref_address, b.code, b.code_len))
        return source_error(src, "does not fit into guest memory");
    k->protocol = BOOT_LINUX64;
    k->entry = b.pref_address + STARTUP_64;
    k->start = b.pref_address;
    k->end = end;
    return 0;
}

/* Names what people mistake for a kernel of this machine. */
static int explain(const struct source *src, const uint8_t *data, uint64_t size)
{
    enum unpack_format format = unpack_detect(data, size);
    if (format != UNPACK_NONE)
        return source_error(src, "is a compressed file (%s); unpack it first",
                            unpack_format_name(format));
    if (size >= 64 && !memcmp(data + 56, "ARM\x64", 4))
        return source_error(src, "is a kernel for AArch64; this machine is x86-64");
    if (size >= 64 && (!memcmp(data + 56, "RSC\x05", 4) || !memcmp(data + 48, "RISCV", 5)))
        return source_error(src, "is a kernel for RISC-V; this machine is x86-64");
    if (size >= 64 && load_le32(data + 0x24) == 0x016f2818)
        return source_error(src, "is a kernel for ARM; this machine is x86-64");
    if (size >= 64 && load_le32(data + 56) == 0x818223cd)
        return source_error(src, "is a kernel for LoongArch; this machine is x86-64");
    if (size >= 6 && !memcmp(data, "070701", 6))
        return source_error(src, "is a cpio archive; is it the initrd?");
    if (size >= 2 && data[0] == 'M' && data[1] == 'Z')
        return source_error(src, "is an EFI or Windows program, not a Linux bzImage");
    if (size < HDR_END)
        return source_error(src, "is too short to be a kernel (%llu bytes)",
                            (unsigned long long)size);
    return source_error(src, "is not a kernel: neither bzImage nor ELF, and no Multiboot header");
}

int kernel_load(const struct source *src, const uint8_t *data, uint64_t size, struct memory *mem,
                uint64_t ram_end, enum boot_protocol want, struct kernel *k)
{
    *k = (struct kernel){.cmdline_max = UINT32_MAX, .initrd_max = INITRD_MAX_DEFAULT};
    if (elf_is(data, size))
        return load_elf_file(src, data, size, mem, ram_end, want, k);
    if (size >= HDR_VERSION && !memcmp(data + HDR_MAGIC, "HdrS", 4) &&
        load_le16(data + 0x1fe) == 0xaa55)
        return load_bzimage(src, data, size, mem, ram_end, want, k);
    struct multiboot mb;
    int found = multiboot_parse(src, data, size, &mb);
    if (found < 0)
        return found;
    if (found && mb.has_addresses) {
        if (want != BOOT_AUTO && want != BOOT_MULTIBOOT)
            return no_protocol(src, want);
        return load_multiboot_raw(src, data, &mb, mem, ram_end, k);
    }
    return explain(src, data, size);
}

int kernel_load_file(const char *path, struct memory *mem, uint64_t ram_end,
                     enum boot_protocol want, struct kernel *k)
{
    struct source src;
    int err = source_open(&src, "kernel", path);
    if (err)
        return err;
    uint8_t *data = NULL;
    /* No kernel is so big; what is, is some other file, and not worth reading. */
    if (src.size > GIB(1)) {
        err = source_error(&src, "is too big to be a kernel (%llu MiB)", mib_up(src.size));
        goto out;
    }
    data = malloc(src.size);
    if (!data) {
        log_error("kernel %s: out of memory for %llu MiB", path, mib_up(src.size));
        err = -ENOMEM;
        goto out;
    }
    if ((err = source_read(&src, data)))
        goto out;
    err = kernel_load(&src, data, src.size, mem, ram_end, want, k);
out:
    resident_note();
    free(data);
    source_close(&src);
    return err;
}
