/*
 * The assembled PC: what each boot protocol's kernel finds in memory and registers, where devices
 * are, and that a guest reset makes everything new.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/util.h"
#include "board/pc/boot.h"
#include "board/pc/layout.h"
#include "board/pc/pc.h"
#include "device/irqchip/irqchip.h"
#include "device/machine.h"
#include "device/pci.h"
#include "isa/x86/state.h"
#include "kernel_image.h"
#include "log_capture.h"

#define LOAD MIB(16)

static struct machine machine;
static struct pc pc;
static struct pc_config cfg;
static char folder[] = "/tmp/ringfort-pc-XXXXXX";

static void on_event(void *opaque, enum machine_event event, int status)
{
    fail_msg("event %d", (int)event);
}

static void make(uint64_t memory)
{
    cfg.memory_bytes = memory;
    cfg.tsc_hz = 1000000000;
    if (!cfg.cpus)
        cfg.cpus = 2;
    assert_int_equal(machine_init(&machine, true), 0);
    machine.event = on_event;
    assert_int_equal(pc_create(&pc, &machine, &cfg), 0);
}

static int unmake(void **state)
{
    if (pc.machine)
        machine_destroy(&machine);
    pc = (struct pc){0};
    cfg = (struct pc_config){0};
    return 0;
}

static const char *path_of(const char *file)
{
    static char path[4][128];
    static unsigned n;
    n = (n + 1) % 4;
    snprintf(path[n], sizeof(path[n]), "%s/%s", folder, file);
    return path[n];
}

/* Writes the image to a file and frees it. */
static const char *save(const char *file, struct image img)
{
    const char *path = path_of(file);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(img.data, 1, img.size, f), img.size);
    assert_int_equal(fclose(f), 0);
    free(img.data);
    return path;
}

static struct image filled(size_t size, uint8_t byte)
{
    struct image img = {.data = malloc(size), .size = size};
    assert_non_null(img.data);
    memset(img.data, byte, size);
    return img;
}

static const uint8_t *guest(uint64_t gpa, size_t len)
{
    const uint8_t *p = memory_map(&machine.memory, gpa, len);
    assert_non_null(p);
    return p;
}

/* A flat segment whose descriptor in guest memory says the same as the register. */
static void check_segment(const struct x86_state *s, const struct x86_seg *seg, uint32_t limit)
{
    assert_in_range(seg->selector + 7, 8 + 7, s->gdt.limit);
    uint64_t d = load_le64(guest(s->gdt.base + seg->selector, 8));
    assert_int_equal(seg->attr & 0xf0ff, d >> 40 & 0xf0ff);
    uint32_t raw = (uint32_t)(d & 0xffff) | (uint32_t)(d >> 32 & 0xf0000);
    assert_int_equal(d & 1ull << 55 ? raw << 12 | 0xfff : raw, limit);
    assert_int_equal(seg->limit, limit);
    assert_int_equal(seg->base, 0);
}

static void check_state(const struct x86_entry *entry, bool is_64, struct x86_state *s)
{
    memset(s, 0xff, sizeof(*s));
    pc_entry_state(s, entry);
    assert_int_equal(s->rip, entry->rip);
    assert_int_equal(s->rflags, 2);
    assert_int_equal(s->cr0 & (CR0_PE | CR0_PG), is_64 ? CR0_PE | CR0_PG : CR0_PE);
    assert_int_equal(s->cr4, is_64 ? CR4_PAE : 0);
    assert_int_equal(s->efer, is_64 ? EFER_LME | EFER_LMA : 0);
    for (int i = 0; i < 6; i++)
        check_segment(s, &s->seg[i], UINT32_MAX);
    check_segment(s, &s->tr, 0x67);
    assert_int_equal(!!(s->seg[SEG_CS].attr & SEG_L), is_64);
    assert_int_equal(!!(s->seg[SEG_CS].attr & SEG_DB), !is_64);
    assert_int_equal(s->idt.limit, 0);
}

/* ---- PVH ---- */

static void check_range(const uint8_t *e, uint64_t base, uint64_t size, unsigned type)
{
    assert_int_equal(load_le64(e), base);
    assert_int_equal(load_le64(e + 8), size);
    assert_int_equal(load_le32(e + 16), type);
}

static void test_pvh(void **state)
{
    struct elf_spec spec = image_linux_spec(LOAD);
    const char *initrds[] = {save("one", image_cpio("init", 1001)),
                             save("two", image_cpio("etc/passwd", 7))};
    cfg.kernel = save("vmlinux", image_elf(&spec));
    cfg.initrds = initrds;
    cfg.initrd_count = 2;
    cfg.cmdline = "console=ttyS0 quiet";
    make(MIB(64));
    struct x86_entry entry;
    assert_int_equal(pc_load_kernel(&pc, &cfg, &entry), 0);
    assert_int_equal(entry.mode, X86_ENTRY_PVH);
    assert_int_equal(entry.rip, LOAD + 0x50);
    struct x86_state s;
    check_state(&entry, false, &s);

    const uint8_t *info = guest(s.gpr[RBX], 56);
    assert_int_equal(load_le32(info), 0x336ec578);
    assert_int_equal(load_le32(info + 4), 1);
    assert_int_equal(load_le32(info + 12), 1);
    assert_string_equal((const char *)guest(load_le64(info + 24), 32), cfg.cmdline);
    assert_memory_equal(guest(load_le64(info + 32), 8), "RSD PTR ", 8);
    assert_int_equal(load_le32(info + 48), 4);
    const uint8_t *map = guest(load_le64(info + 40), 4 * 24);
    check_range(map, 0, 0x9fc00, 1);
    check_range(map + 24, 0x9fc00, 0x60400, 2);
    check_range(map + 48, MIB(1), MIB(63), 1);
    check_range(map + 72, PC_ECAM_BASE, PC_ECAM_SIZE, 2);

    /* One module: both archives, each at a multiple of 4, at the top of memory. */
    const uint8_t *mod = guest(load_le64(info + 16), 32);
    uint64_t at = load_le64(mod), size = load_le64(mod + 8);
    struct image one = image_cpio("init", 1001), two = image_cpio("etc/passwd", 7);
    assert_int_equal(at % 4096, 0);
    assert_int_equal(size, align_up(one.size, 4) + align_up(two.size, 4));
    assert_in_range(at + size, MIB(64) - 4096, MIB(64));
    assert_memory_equal(guest(at, one.size), one.data, one.size);
    assert_memory_equal(guest(at + align_up(one.size, 4), two.size), two.data, two.size);
    free(one.data);
    free(two.data);
}

/* Modules of a system that is not Linux stay apart. */
static void test_pvh_modules(void **state)
{
    struct elf_spec spec = image_linux_spec(LOAD);
    spec.linux_note = false;
    const char *initrds[] = {save("one", filled(5000, 1)), save("two", filled(1, 2))};
    cfg.kernel = save("other", image_elf(&spec));
    cfg.initrds = initrds;
    cfg.initrd_count = 2;
    make(MIB(64));
    struct x86_entry entry;
    assert_int_equal(pc_load_kernel(&pc, &cfg, &entry), 0);
    const uint8_t *info = guest(entry.rbx, 56);
    assert_int_equal(load_le32(info + 12), 2);
    const uint8_t *mod = guest(load_le64(info + 16), 64);
    uint64_t first = align_up(LOAD + SECOND_SEGMENT + SECOND_SIZE, 4096);
    assert_int_equal(load_le64(mod), first);
    assert_int_equal(load_le64(mod + 8), 5000);
    assert_string_equal((const char *)guest(load_le64(mod + 16), 64), initrds[0]);
    assert_int_equal(load_le64(mod + 32), first + 8192);
    assert_int_equal(load_le64(mod + 40), 1);
    assert_int_equal(*guest(first + 8192, 1), 2);
}

/* ---- Multiboot ---- */

static void test_multiboot(void **state)
{
    struct elf_spec spec = {.paddr = MIB(4),
                            .filesz = 0x2000,
                            .memsz = 0x2000,
                            .entry = MIB(4) + 0x10,
                            .multiboot = true,
                            .multiboot_flags = 3};
    const char *initrds[] = {save("environment", filled(100, 'e'))};
    cfg.kernel = save("test.flat", image_elf(&spec));
    cfg.initrds = initrds;
    cfg.initrd_count = 1;
    cfg.cmdline = "a b";
    make(MIB(32));
    struct x86_entry entry;
    assert_int_equal(pc_load_kernel(&pc, &cfg, &entry), 0);
    assert_int_equal(entry.mode, X86_ENTRY_MULTIBOOT);
    struct x86_state s;
    check_state(&entry, false, &s);
    assert_int_equal(s.gpr[RAX], 0x2badb002);
    assert_int_equal(s.rip, MIB(4) + 0x10);
    const uint8_t *info = guest(s.gpr[RBX], 68);
    assert_int_equal(load_le32(info) & 0x4d, 0x4d);
    assert_int_equal(load_le32(info + 4), 639);
    assert_int_equal(load_le32(info + 8), 31 * 1024);
    char cmdline[256];
    snprintf(cmdline, sizeof(cmdline), "%s a b", cfg.kernel);
    assert_string_equal((const char *)guest(load_le32(info + 16), 256), cmdline);
    assert_int_equal(load_le32(info + 20), 1);
    const uint8_t *mod = guest(load_le32(info + 24), 16);
    assert_int_equal(load_le32(mod) % 4096, 0);
    assert_in_range(load_le32(mod), MIB(4) + SECOND_SEGMENT + SECOND_SIZE, MIB(32));
    assert_int_equal(load_le32(mod + 4) - load_le32(mod), 100);
    assert_int_equal(*guest(load_le32(mod) + 99, 1), 'e');
    assert_string_equal((const char *)guest(load_le32(mod + 8), 128), initrds[0]);
    uint32_t map = load_le32(info + 48), len = load_le32(info + 44);
    unsigned ranges = 0;
    for (uint32_t i = 0; i < len; i += 4 + load_le32(guest(map + i, 4)))
        ranges++;
    assert_int_equal(ranges, 4);
    check_range(guest(map + 2 * 24 + 4, 20), MIB(1), MIB(31), 1);
}

/* ---- Linux, 64-bit ---- */

/* What the page tables at cr3 make of a linear address. */
static uint64_t walk(uint64_t cr3, uint64_t addr)
{
    uint64_t table = cr3;
    for (int shift = 39; shift >= 21; shift -= 9) {
        uint64_t e = load_le64(guest(table + (addr >> shift & 511) * 8, 8));
        assert_true(e & 1);
        if (e & 0x80) {
            assert_int_equal(shift, 21);
            return (e & ~(uint64_t)0x1fffff) + (addr & 0x1fffff);
        }
        table = e & ~(uint64_t)0xfff;
    }
    fail();
    return 0;
}

static void test_linux64(void **state)
{
    struct elf_spec spec = image_linux_spec(LOAD);
    struct image vmlinux = image_elf(&spec);
    const char *initrds[] = {save("one", image_cpio("init", 1001))};
    cfg.kernel = save("bzImage", image_bzimage(UNPACK_LZ4, vmlinux.data, vmlinux.size, MIB(8)));
    free(vmlinux.data);
    cfg.boot = BOOT_LINUX64;
    cfg.initrds = initrds;
    cfg.initrd_count = 1;
    cfg.cmdline = "root=/dev/vda";
    make(GIB(3) + MIB(256)); /* also above 4 GiB; nothing touches most of it */
    struct x86_entry entry;
    assert_int_equal(pc_load_kernel(&pc, &cfg, &entry), 0);
    assert_int_equal(entry.mode, X86_ENTRY_LINUX64);
    struct x86_state s;
    check_state(&entry, true, &s);
    assert_int_equal(s.rip, LOAD + 0x200);
    assert_int_equal(s.seg[SEG_CS].selector, 0x10);
    assert_int_equal(s.seg[SEG_DS].selector, 0x18);
    const uint64_t mapped[] = {0,      s.rip,          s.gpr[RSI], GIB(1) - 1,
                               GIB(1), GIB(3) + 12345, GIB(4) - 1};
    for (size_t i = 0; i < ARRAY_SIZE(mapped); i++)
        assert_int_equal(walk(s.cr3, mapped[i]), mapped[i]);

    const uint8_t *zp = guest(s.gpr[RSI], 4096);
    assert_memory_equal(zp + 0x202, "HdrS", 4);
    assert_int_equal(load_le16(zp + 0x1fe), 0xaa55);
    assert_int_equal(zp[0x210], 0xff);
    assert_int_equal(load_le64(zp + 0x70), PC_ACPI_BASE);
    assert_string_equal((const char *)guest(load_le32(zp + 0x228), 32), cfg.cmdline);
    uint32_t at = load_le32(zp + 0x218), size = load_le32(zp + 0x21c);
    assert_in_range((uint64_t)at + size, GIB(2) - 4096, 0x7fffffff + 1ull);
    assert_memory_equal(guest(at, 6), "070701", 6);
    assert_int_equal(zp[0x1e8], 5);
    check_range(zp + 0x2d0 + 4 * 20, GIB(4), MIB(256), 1);
    check_range(zp + 0x2d0 + 2 * 20, MIB(1), GIB(3) - MIB(1), 1);
}

/* ---- Refusals ---- */

static void load_refused(const char *text)
{
    struct x86_entry entry;
    log_capture_begin();
    int err = pc_load_kernel(&pc, &cfg, &entry);
    const char *log = log_capture_end();
    assert_int_equal(err, -EINVAL);
    assert_int_equal(log_capture_lines(log), 1);
    if (!strstr(log, text))
        fail_msg("expected \"%s\", got: %s", text, log);
}

static void test_refusals(void **state)
{
    struct elf_spec spec = image_linux_spec(LOAD);
    static char long_line[2100];
    memset(long_line, 'x', 2048);
    const char *initrd = NULL;
    cfg.kernel = save("vmlinux", image_elf(&spec));
    cfg.cmdline = long_line;
    make(MIB(32));
    load_refused("the kernel command line has 2048 bytes");
    long_line[2047] = 0;
    struct x86_entry entry;
    assert_int_equal(pc_load_kernel(&pc, &cfg, &entry), 0);
    cfg.initrds = &initrd;
    cfg.initrd_count = 1;
    initrd = save("initrd", image_cpio("big", MIB(16)));
    load_refused("with its initrd needs at least 33 MiB of guest memory; there are 32 MiB");
    pc.loaded = false; /* archives are checked the first time */
    initrd = save("initrd", filled(4096, 'x'));
    load_refused("is not an initramfs");
    initrd = "/";
    load_refused("initrd /: is not a regular file");
}

static void test_config_refusals(void **state)
{
    const struct {
        uint64_t memory;
        unsigned cpus;
        const char *text;
    } bad[] = {
        {MIB(1), 1, "takes 4 MiB to 1024 GiB"},    {MIB(64) + 1, 1, "pages of 4 KiB"},
        {UINT64_MAX & ~4095ull, 1, "takes 4 MiB"}, {MIB(64), 0, "takes 1 to 1024"},
        {MIB(64), 1025, "takes 1 to 1024"},
    };
    for (size_t i = 0; i < ARRAY_SIZE(bad); i++) {
        cfg = (struct pc_config){
            .memory_bytes = bad[i].memory, .cpus = bad[i].cpus, .tsc_hz = 1000000000};
        assert_int_equal(machine_init(&machine, true), 0);
        log_capture_begin();
        int err = pc_create(&pc, &machine, &cfg);
        const char *log = log_capture_end();
        assert_int_equal(err, -EINVAL);
        assert_int_equal(log_capture_lines(log), 1);
        assert_non_null(strstr(log, bad[i].text));
        unmake(NULL);
    }
}

/* ---- Devices and reset ---- */

static void test_devices(void **state)
{
    const struct pc_net net = {.backend = NULL, .mac = {2, 0, 0, 0, 0, 1}};
    cfg.nets = &net;
    cfg.net_count = 1;
    cfg.rng_count = 2;
    make(GIB(3) + MIB(1));
    assert_int_equal(pc.low_ram_end, GIB(3));
    assert_int_equal(pc.high_ram_end, GIB(4) + MIB(1));
    assert_int_equal(pc.mem64_base, GIB(5));
    unsigned functions = 0;
    for (unsigned slot = 0; slot < PCI_SLOTS; slot++) {
        struct pci_device *d = pci_host_device(pc.pci, slot);
        if (!d || slot == 0)
            continue;
        functions++;
        /* As prt.asl says, for pin A. */
        assert_int_equal(d->intx.gsi, 16 + slot % 4);
        for (unsigned i = 0; i < 6; i++) {
            const struct pci_bar *b = &d->bar[i];
            if (!b->size)
                continue;
            assert_true(b->mapped);
            bool low =
                b->mapped_at >= PC_MEM32_BASE && b->mapped_at + b->size <= PC_MEM32_LAST + 1ull;
            bool high = b->mapped_at >= pc.mem64_base &&
                        b->mapped_at + b->size <= pc.mem64_base + pc.mem64_size;
            assert_true(low || high);
        }
    }
    assert_int_equal(functions, 3);
    /* ECAM and ports show the same host bridge. */
    pthread_mutex_lock(&machine.lock);
    uint64_t id = bus_read_locked(&machine.mmio, PC_ECAM_BASE, 4);
    bus_write_locked(&machine.ports, 0xcf8, 0x80000000, 4);
    assert_int_equal(bus_read_locked(&machine.ports, 0xcfc, 4), id);
    assert_int_not_equal(id, 0xffffffff);
    /* Each device that the DSDT names has its ports. */
    assert_non_null(bus_find(&machine.ports, PC_COM1_PORT));
    assert_non_null(bus_find(&machine.ports, PC_RTC_PORT));
    assert_non_null(bus_find(&machine.ports, PC_GED_EVENTS));
    assert_non_null(bus_find(&machine.mmio, PC_IOAPIC_BASE));
    pthread_mutex_unlock(&machine.lock);
}

static uint64_t digest(void)
{
    const struct memory_region *r = &machine.memory.region[0];
    uint64_t h = 0xcbf29ce484222325;
    for (uint64_t i = 0; i < r->size; i += 8)
        h = (h ^ load_le64(r->host + i)) * 0x100000001b3;
    return h;
}

static void test_reset(void **state)
{
    struct elf_spec spec = image_linux_spec(LOAD);
    const struct pc_net net = {.mac = {2, 0, 0, 0, 0, 1}};
    cfg.nets = &net;
    cfg.net_count = 1;
    cfg.kernel = save("vmlinux", image_elf(&spec));
    make(MIB(32));
    struct x86_entry first, second;
    assert_int_equal(pc_load_kernel(&pc, &cfg, &first), 0);
    uint64_t before = digest();
    assert_int_equal(memory_fill(&machine.memory, 0, 0xcc, MIB(20)), 0);
    assert_int_not_equal(digest(), before);
    machine_reset_devices(&machine);
    assert_int_equal(pc_load_kernel(&pc, &cfg, &second), 0);
    assert_int_equal(digest(), before);
    assert_memory_equal(&first, &second, sizeof(first));
    struct pci_device *d = pci_host_device(pc.pci, 1);
    assert_non_null(d);
    bool mapped = false;
    for (unsigned i = 0; i < 6; i++)
        mapped |= d->bar[i].mapped;
    assert_true(mapped);
}

static int make_folder(void **state)
{
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    char line[128];
    snprintf(line, sizeof(line), "rm -r %s", folder);
    return system(line);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_teardown(test_pvh, unmake),
        cmocka_unit_test_teardown(test_pvh_modules, unmake),
        cmocka_unit_test_teardown(test_multiboot, unmake),
        cmocka_unit_test_teardown(test_linux64, unmake),
        cmocka_unit_test_teardown(test_refusals, unmake),
        cmocka_unit_test_teardown(test_config_refusals, unmake),
        cmocka_unit_test_teardown(test_devices, unmake),
        cmocka_unit_test_teardown(test_reset, unmake),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
