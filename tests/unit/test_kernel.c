/*
 * The kernel loader on made-up files: every kind goes where it should, with its bytes; what is
 * truncated, foreign or contradicts itself is refused with one line that says so.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <elf.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "board/loader/kernel.h"
#include "board/loader/source.h"
#include "kernel_image.h"
#include "log_capture.h"
#include "memory/memory.h"

#define RAM  MIB(64)
#define LOAD MIB(16)

static struct memory mem;
static const struct source name = {.what = "kernel", .path = "made-up", .fd = -1};

static int load(const struct image *img, enum boot_protocol want, struct kernel *k)
{
    /* Memory starts as zeroes, as a new machine's does. */
    guest_memory_clear(&mem, 0, RAM);
    return kernel_load(&name, img->data, img->size, &mem, RAM, want, k);
}

/* The file is refused with one line that contains text. */
static void refused(const struct image *img, enum boot_protocol want, const char *text)
{
    struct kernel k;
    log_capture_begin();
    int err = load(img, want, &k);
    const char *log = log_capture_end();
    assert_int_equal(err, -EINVAL);
    assert_int_equal(log_capture_lines(log), 1);
    if (!strstr(log, text) || !strstr(log, "kernel made-up"))
        fail_msg("expected \"%s\", got: %s", text, log);
}

static void assert_pattern(uint64_t gpa, unsigned segment, size_t len)
{
    const uint8_t *p = memory_map(&mem, gpa, len);
    for (size_t i = 0; i < len; i++)
        if (p[i] != image_pattern(segment, i))
            fail_msg("segment %u differs at %zu", segment, i);
}

static void assert_zero(uint64_t from, uint64_t to)
{
    const uint8_t *p = memory_map(&mem, from, to - from);
    for (uint64_t i = 0; i < to - from; i++)
        if (p[i])
            fail_msg("guest memory at %#llx is not zero", (unsigned long long)(from + i));
}

/* Both segments are there, and nothing else is in all of memory. */
static void assert_loaded(const struct elf_spec *s)
{
    assert_zero(0, s->paddr);
    assert_pattern(s->paddr, 0, s->filesz);
    assert_zero(s->paddr + s->filesz, s->paddr + SECOND_SEGMENT);
    assert_pattern(s->paddr + SECOND_SEGMENT, 1, SECOND_SIZE);
    assert_zero(s->paddr + SECOND_SEGMENT + SECOND_SIZE, RAM);
}

static void test_elf_pvh(void **state)
{
    for (int is_64 = 0; is_64 < 2; is_64++) {
        struct elf_spec s = image_linux_spec(LOAD);
        s.is_64 = is_64;
        struct image img = image_elf(&s);
        struct kernel k;
        assert_int_equal(load(&img, BOOT_AUTO, &k), 0);
        assert_int_equal(k.protocol, BOOT_PVH);
        assert_int_equal(k.entry, LOAD + 0x50);
        assert_int_equal(k.start, LOAD);
        assert_int_equal(k.end, LOAD + SECOND_SEGMENT + SECOND_SIZE);
        assert_true(k.is_linux);
        assert_int_equal(k.cmdline_max, 2047);
        assert_int_equal(k.setup_header_len, 0);
        assert_loaded(&s);
        refused(&img, BOOT_MULTIBOOT, "no entry for the Multiboot boot protocol");
        free(img.data);
    }
}

static void test_elf_linux64(void **state)
{
    struct elf_spec s = image_linux_spec(LOAD);
    s.pvh = s.linux_note = false;
    s.entry = LOAD + 0x200;
    struct image img = image_elf(&s);
    struct kernel k;
    assert_int_equal(load(&img, BOOT_AUTO, &k), 0);
    assert_int_equal(k.protocol, BOOT_LINUX64);
    assert_int_equal(k.entry, LOAD + 0x200);
    assert_true(k.is_linux);
    assert_loaded(&s);
    refused(&img, BOOT_PVH, "no entry for the PVH boot protocol");
    free(img.data);
}

static void test_bss_is_zeroed(void **state)
{
    struct elf_spec s = image_linux_spec(LOAD);
    struct image img = image_elf(&s);
    struct kernel k;
    assert_int_equal(memory_fill(&mem, LOAD, 0xff, 0x20000), 0);
    assert_int_equal(kernel_load(&name, img.data, img.size, &mem, RAM, BOOT_AUTO, &k), 0);
    assert_zero(LOAD + s.filesz, LOAD + s.memsz);
    free(img.data);
}

static void test_multiboot_elf(void **state)
{
    struct elf_spec s = {.paddr = MIB(4),
                         .filesz = 0x2000,
                         .memsz = 0x2000,
                         .entry = MIB(4) + 0x10,
                         .multiboot = true,
                         .multiboot_flags = 3};
    struct image img = image_elf(&s);
    struct kernel k;
    assert_int_equal(load(&img, BOOT_AUTO, &k), 0);
    assert_int_equal(k.protocol, BOOT_MULTIBOOT);
    assert_int_equal(k.entry, MIB(4) + 0x10);
    assert_false(k.is_linux);
    assert_int_equal(k.cmdline_max, UINT32_MAX);
    assert_loaded(&s);
    free(img.data);

    s.multiboot_flags = 0x13;
    img = image_elf(&s);
    refused(&img, BOOT_AUTO, "unknown features");
    free(img.data);

    /* A header whose sum is wrong is none; and an i386 file without one cannot start. */
    s.multiboot_flags = 3;
    img = image_elf(&s);
    img.data[0x308] ^= 1;
    refused(&img, BOOT_AUTO, "32-bit ELF file without PVH note or Multiboot header");
    free(img.data);
}

/* With address fields the ELF headers do not count, and 64-bit files work, too. */
static void test_multiboot_addresses(void **state)
{
    const uint32_t at = MIB(2);
    struct elf_spec s = {
        .is_64 = true,
        .paddr = MIB(32),
        .filesz = 0x1000,
        .memsz = 0x1000,
        .entry = MIB(32),
        .multiboot = true,
        .multiboot_flags = 1u << 16,
        .multiboot_addresses = {at + 0x300, at, 0, at + 0x100000, at + ELF_FIRST_OFFSET + 4}};
    struct image img = image_elf(&s);
    struct kernel k;
    assert_int_equal(load(&img, BOOT_AUTO, &k), 0);
    assert_int_equal(k.protocol, BOOT_MULTIBOOT);
    assert_int_equal(k.entry, at + ELF_FIRST_OFFSET + 4);
    assert_int_equal(k.start, at);
    assert_int_equal(k.end, at + 0x100000);
    assert_memory_equal(memory_map(&mem, at, img.size), img.data, img.size);
    assert_zero(at + img.size, RAM);

    /* Any file with such a header will do. */
    memset(img.data, 0x90, 64);
    assert_int_equal(load(&img, BOOT_AUTO, &k), 0);
    assert_int_equal(k.protocol, BOOT_MULTIBOOT);
    refused(&img, BOOT_PVH, "PVH");
    free(img.data);

    const struct {
        uint32_t addresses[5];
        const char *text;
    } bad[] = {
        {{at, at + 4, 0, 0, at + 8}, "load address"},
        {{at + 0x304, at, 0, 0, at + 8}, "load address"},
        {{at + 0x300, at, at - 1, 0, at + 8}, "load end"},
        {{at + 0x300, at, at + 0x100000, 0, at + 8}, "is truncated"},
        {{at + 0x300, at, at + 0x800, at + 0x7ff, at + 8}, "bss end"},
        {{at + 0x300, at, at + 0x800, 0, at + 0x800}, "entry"},
        {{at + 0x300, at, at + 0x800, 0, at - 1}, "entry"},
        {{0x300, 0, 0x800, 0, 8}, "below 1 MiB"},
        {{0xfffff300, 0xfffff000, 0, 0, 0xfffff300}, "past 4 GiB"},
        {{at + 0x300, at, at + 0x800, 0xf0000000, at + 8}, "beyond the low memory"},
        {{at + 0x300, at, at + 0x800, MIB(100), at + 8},
         "needs at least 100 MiB of guest memory; there are 64 MiB"},
    };
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        memcpy(s.multiboot_addresses, bad[i].addresses, sizeof(bad[i].addresses));
        img = image_elf(&s);
        refused(&img, BOOT_AUTO, bad[i].text);
        free(img.data);
    }
}

static void test_bad_elf(void **state)
{
    struct elf_spec good = image_linux_spec(LOAD), s;
    struct image img;

#define BAD(change, text)               \
    do {                                \
        s = good;                       \
        change;                         \
        img = image_elf(&s);            \
        refused(&img, BOOT_AUTO, text); \
        free(img.data);                 \
    } while (0)
    BAD(s.machine = EM_AARCH64, "is an ELF file for AArch64; this machine is x86-64");
    BAD(s.machine = EM_RISCV, "RISC-V");
    BAD(s.machine = 0x1234, "machine type 4660");
    BAD(s.memsz = 0x2000, "corrupt program header");
    BAD(s.paddr = MIB(1) - 1; s.pvh_entry = MIB(1), "below 1 MiB");
    BAD(s.paddr = UINT64_MAX - 0xfff, "corrupt program header");
    BAD(s.paddr = 0xf0000000; s.pvh_entry = 0xf0000000, "beyond the low memory");
    BAD(s.paddr = RAM;
        s.pvh_entry = RAM, "needs at least 65 MiB of guest memory; there are 64 MiB");
    BAD(s.pvh_entry = LOAD - 1, "entry point 0xffffff is outside its segments");
    BAD(s.pvh = false; s.entry = LOAD + 0x9000, "outside its segments");
#undef BAD

#define PATCH(bits, offset, value, text)            \
    do {                                            \
        img = image_elf(&good);                     \
        store_le##bits(img.data + (offset), value); \
        refused(&img, BOOT_AUTO, text);             \
        free(img.data);                             \
    } while (0)
    PATCH(16, offsetof(Elf64_Ehdr, e_type), ET_REL, "object file or kernel module");
    PATCH(16, offsetof(Elf64_Ehdr, e_type), ET_CORE, "not an executable");
    PATCH(16, offsetof(Elf64_Ehdr, e_phnum), 0, "without segments");
    PATCH(16, offsetof(Elf64_Ehdr, e_phnum), 0xffff, "truncated: its program headers");
    PATCH(64, offsetof(Elf64_Ehdr, e_phoff), UINT64_MAX - 8, "truncated: its program headers");
    PATCH(16, offsetof(Elf64_Ehdr, e_phentsize), 55, "size of program headers");
    PATCH(64, sizeof(Elf64_Ehdr) + offsetof(Elf64_Phdr, p_offset), UINT64_MAX,
          "segment 0 lies beyond its end");
    PATCH(64, sizeof(Elf64_Ehdr) + offsetof(Elf64_Phdr, p_filesz), 0x10000,
          "segment 0 lies beyond its end");
    PATCH(64, sizeof(Elf64_Ehdr) + offsetof(Elf64_Phdr, p_memsz), UINT64_MAX,
          "corrupt program header");
    PATCH(16, EI_CLASS, 7, "corrupt ELF header");
#undef PATCH

    /* Cut anywhere, it never loads. */
    img = image_elf(&good);
    for (size_t size = 0; size < img.size; size += size < 0x420 ? 1 : 0x101) {
        struct image cut = {.data = malloc(size), .size = size};
        memcpy(cut.data, img.data, size);
        refused(&cut, BOOT_AUTO, size < 4 ? "too short" : "truncated");
        free(cut.data);
    }
    free(img.data);
}

/* Notes of every wrong size must not be read past their segment, nor found where they are not. */
static void test_bad_notes(void **state)
{
    struct elf_spec s = image_linux_spec(LOAD);
    s.linux_note = false;
    struct image img = image_elf(&s);
    struct kernel k;
    const uint32_t values[] = {0, 1, 3, 5, 0x7fffffff, 0xfffffff0, 0xfffffffc, 0xffffffff};
    for (size_t field = 0; field < 2; field++)
        for (size_t i = 0; i < ARRAY_SIZE(values); i++) {
            uint32_t keep = load_le32(img.data + 0x200 + 4 * field);
            store_le32(img.data + 0x200 + 4 * field, values[i]);
            log_capture_begin();
            int err = load(&img, BOOT_PVH, &k);
            log_capture_end();
            assert_int_equal(err, -EINVAL);
            store_le32(img.data + 0x200 + 4 * field, keep);
        }
    assert_int_equal(load(&img, BOOT_PVH, &k), 0);
    free(img.data);
}

static const enum unpack_format packable[] = {UNPACK_NONE, UNPACK_GZIP, UNPACK_XZ,
                                              UNPACK_LZMA, UNPACK_LZ4,  UNPACK_ZSTD};

static void test_bzimage(void **state)
{
    for (size_t i = 0; i < ARRAY_SIZE(packable); i++) {
        struct elf_spec s = image_linux_spec(LOAD);
        struct image vmlinux = image_elf(&s);
        struct image img = image_bzimage(packable[i], vmlinux.data, vmlinux.size, MIB(8));
        struct kernel k;
        assert_int_equal(load(&img, BOOT_AUTO, &k), 0);
        assert_int_equal(k.protocol, BOOT_PVH);
        assert_int_equal(k.entry, LOAD + 0x50);
        assert_int_equal(k.start, LOAD);
        assert_int_equal(k.end, LOAD + MIB(8));
        assert_true(k.is_linux);
        assert_int_equal(k.cmdline_max, 2047);
        assert_int_equal(k.initrd_max, 0x7fffffff);
        assert_int_equal(k.setup_header_len, 0x268 - 0x1f1);
        assert_memory_equal(k.setup_header, img.data + 0x1f1, k.setup_header_len);
        assert_loaded(&s); /* also: nothing is left of the unpacked file */

        assert_int_equal(load(&img, BOOT_LINUX64, &k), 0);
        assert_int_equal(k.protocol, BOOT_LINUX64);
        assert_int_equal(k.entry, LOAD + 0x200);
        assert_int_equal(k.end, LOAD + MIB(8));
        assert_memory_equal(memory_map(&mem, LOAD, img.size - 1024), img.data + 1024,
                            img.size - 1024);
        assert_zero(LOAD + img.size - 1024, RAM);
        refused(&img, BOOT_MULTIBOOT, "Multiboot");
        free(img.data);
        free(vmlinux.data);
    }
}

/* What cannot be unpacked here is left to the kernel's own code. */
static void test_bzimage_unknown_payload(void **state)
{
    const enum unpack_format formats[] = {UNPACK_BZIP2, UNPACK_LZO};
    for (size_t i = 0; i < ARRAY_SIZE(formats); i++) {
        uint8_t payload[64] = "something else";
        struct image img = image_bzimage(formats[i], payload, sizeof(payload), MIB(8));
        struct kernel k;
        assert_int_equal(load(&img, BOOT_AUTO, &k), 0);
        assert_int_equal(k.protocol, BOOT_LINUX64);
        refused(&img, BOOT_PVH, "only its 64-bit entry can be used");
        free(img.data);
    }
    /* What nothing could unpack. */
    uint8_t payload[64] = "something else";
    struct image img = image_bzimage(UNPACK_NONE, payload, sizeof(payload), MIB(8));
    refused(&img, BOOT_AUTO, "is corrupt");
    refused(&img, BOOT_PVH, "is corrupt");
    free(img.data);
}

/* The kernel reaches into the top of memory, where the payload is unpacked. */
static void test_bzimage_tight(void **state)
{
    struct elf_spec s = image_linux_spec(LOAD);
    s.paddr = RAM - SECOND_SEGMENT - SECOND_SIZE;
    s.entry = s.pvh_entry = (uint32_t)s.paddr;
    struct image vmlinux = image_elf(&s);
    struct image img = image_bzimage(UNPACK_LZ4, vmlinux.data, vmlinux.size, MIB(8));
    struct kernel k;
    assert_int_equal(load(&img, BOOT_AUTO, &k), 0);
    assert_loaded(&s);
    free(img.data);
    img = image_bzimage(UNPACK_LZ4, vmlinux.data, vmlinux.size, MIB(48) + 1);
    refused(&img, BOOT_AUTO, "needs at least 65 MiB of guest memory; there are 64 MiB");
    refused(&img, BOOT_LINUX64, "needs at least 65 MiB of guest memory; there are 64 MiB");
    free(img.data);
    free(vmlinux.data);
}

static void test_bad_bzimage(void **state)
{
    struct elf_spec s = image_linux_spec(LOAD);
    struct image vmlinux = image_elf(&s);

#define PATCH(bits, offset, value, text)                                                   \
    do {                                                                                   \
        struct image bad = image_bzimage(UNPACK_ZSTD, vmlinux.data, vmlinux.size, MIB(8)); \
        store_le##bits(bad.data + (offset), value);                                        \
        refused(&bad, BOOT_AUTO, text);                                                    \
        free(bad.data);                                                                    \
    } while (0)
    PATCH(16, 0x206, 0x020b, "boot protocol 2.11; 2.12 or newer is needed");
    PATCH(16, 0x236, 0x7e, "32-bit Linux kernel");
    PATCH(16, 0x211, 0x00, "zImage");
    PATCH(32, 0x1f4, 0x100000, "is truncated: its header promises 16778240 bytes");
    PATCH(32, 0x1f4, 0xffffffff, "is truncated");
    PATCH(32, 0x1f4, 1, "corrupt setup header");
    PATCH(32, 0x248, 0x7fffffff, "corrupt setup header (payload)");
    PATCH(32, 0x24c, 0xffffffff, "corrupt setup header (payload)");
    PATCH(32, 0x24c, 7, "corrupt setup header (payload)");
    PATCH(64, 0x258, UINT64_MAX - 5, "preferred address");
    PATCH(64, 0x258, GIB(3) + MIB(1), "needs at least");
    PATCH(16, 0x200, 0x02eb, "corrupt setup header (length)");
#undef PATCH

    for (size_t i = 0; i < ARRAY_SIZE(packable); i++) {
        struct image img = image_bzimage(packable[i], vmlinux.data, vmlinux.size, MIB(8));
        uint32_t len = load_le32(img.data + 0x24c);
        uint8_t *tail = img.data + 1024 + 0x300 + len - 4;
        if (packable[i] != UNPACK_NONE) {
            /* An appended size that is not true. */
            const uint32_t sizes[] = {(uint32_t)vmlinux.size - 1, (uint32_t)vmlinux.size + 1, 0, 1};
            for (size_t n = 0; n < ARRAY_SIZE(sizes); n++) {
                store_le32(tail, sizes[n]);
                refused(&img, BOOT_AUTO, "");
            }
            store_le32(tail, 0xffffffff);
            refused(&img, BOOT_AUTO, "needs at least 4097 MiB");
            store_le32(tail, (uint32_t)vmlinux.size);
        }
        /* Formats with a checksum show any change. */
        if (packable[i] == UNPACK_GZIP || packable[i] == UNPACK_XZ) {
            img.data[1024 + 0x300 + len / 2] ^= 0x10;
            refused(&img, BOOT_AUTO, "is corrupt");
            img.data[1024 + 0x300 + len / 2] ^= 0x10;
        }
        /* A payload that ends too early. */
        for (uint32_t cut = 8; cut < len; cut += len / 7) {
            store_le32(img.data + 0x24c, cut);
            store_le32(img.data + 1024 + 0x300 + cut - 4, (uint32_t)vmlinux.size);
            struct kernel k;
            log_capture_begin();
            assert_int_equal(load(&img, BOOT_PVH, &k), -EINVAL);
            assert_int_equal(log_capture_lines(log_capture_end()), 1);
            assert_zero(0, RAM);
        }
        free(img.data);
    }

    /* The file is cut anywhere. */
    struct image img = image_bzimage(UNPACK_GZIP, vmlinux.data, vmlinux.size, MIB(8));
    for (size_t size = 0x206; size + 16 < img.size; size += size < 0x500 ? 1 : 101) {
        struct image cut = {.data = malloc(size), .size = size};
        memcpy(cut.data, img.data, size);
        refused(&cut, BOOT_AUTO, "truncated");
        free(cut.data);
    }
    free(img.data);

    /* Sound outside, foreign inside. */
    free(vmlinux.data);
    s.machine = EM_AARCH64;
    vmlinux = image_elf(&s);
    img = image_bzimage(UNPACK_XZ, vmlinux.data, vmlinux.size, MIB(8));
    refused(&img, BOOT_AUTO, "AArch64");
    assert_zero(0, RAM);
    free(img.data);
    free(vmlinux.data);
}

static void test_not_a_kernel(void **state)
{
    const struct {
        unsigned at;
        const char *bytes;
        unsigned len;
        const char *text;
    } cases[] = {
        {56, "ARM\x64", 4, "is a kernel for AArch64; this machine is x86-64"},
        {48, "RISCV\0\0\0RSC\x05", 12, "is a kernel for RISC-V"},
        {0x24, "\x18\x28\x6f\x01", 4, "is a kernel for ARM"},
        {56, "\xcd\x23\x82\x81", 4, "is a kernel for LoongArch"},
        {0, "MZ", 2, "is an EFI or Windows program"},
        {0, "\x1f\x8b\x08", 3, "is a compressed file (gzip); unpack it first"},
        {0,
         "\xfd"
         "7zXZ\0",
         6, "compressed file (XZ)"},
        {0, "070701", 6, "is it the initrd?"},
        {0, "hello", 5, "is not a kernel"},
    };
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        struct image img = {.data = calloc(1, 4096), .size = 4096};
        memcpy(img.data + cases[i].at, cases[i].bytes, cases[i].len);
        refused(&img, BOOT_AUTO, cases[i].text);
        free(img.data);
    }
}

static void file_refused(const char *path, int expect, const char *text)
{
    struct kernel k;
    log_capture_begin();
    int err = kernel_load_file(path, &mem, RAM, BOOT_AUTO, &k);
    const char *log = log_capture_end();
    assert_int_equal(err, expect);
    assert_int_equal(log_capture_lines(log), 1);
    if (!strstr(log, text) || !strstr(log, path))
        fail_msg("expected \"%s\", got: %s", text, log);
}

static void test_files(void **state)
{
    char path[] = "/tmp/ringfort-kernel-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    file_refused(path, -EINVAL, "is empty");
    struct elf_spec s = image_linux_spec(LOAD);
    struct image img = image_elf(&s);
    assert_int_equal(write(fd, img.data, img.size), img.size);
    struct kernel k;
    guest_memory_clear(&mem, 0, RAM);
    assert_int_equal(kernel_load_file(path, &mem, RAM, BOOT_AUTO, &k), 0);
    assert_loaded(&s);
    assert_int_equal(ftruncate(fd, (off_t)GIB(2)), 0);
    file_refused(path, -EINVAL, "is too big to be a kernel");
    close(fd);
    unlink(path);
    file_refused(path, -ENOENT, "No such file");
    file_refused("/tmp", -EINVAL, "is not a regular file");
    file_refused("/dev/zero", -EINVAL, "is not a regular file");
    free(img.data);
}

static int setup(void **state)
{
    return memory_init(&mem) || memory_add_ram(&mem, 0, RAM);
}

static int teardown(void **state)
{
    memory_destroy(&mem);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_elf_pvh),
        cmocka_unit_test(test_elf_linux64),
        cmocka_unit_test(test_bss_is_zeroed),
        cmocka_unit_test(test_multiboot_elf),
        cmocka_unit_test(test_multiboot_addresses),
        cmocka_unit_test(test_bad_elf),
        cmocka_unit_test(test_bad_notes),
        cmocka_unit_test(test_bzimage),
        cmocka_unit_test(test_bzimage_unknown_payload),
        cmocka_unit_test(test_bzimage_tight),
        cmocka_unit_test(test_bad_bzimage),
        cmocka_unit_test(test_not_a_kernel),
        cmocka_unit_test(test_files),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
