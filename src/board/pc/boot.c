/*
 * Handing over to the kernel. See boot.h.
 *
 * Everything but initrds and modules lies in the first MiB, at the addresses of layout.h.
 */
#include "board/pc/boot.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"
#include "board/loader/initrd.h"
#include "board/loader/multiboot.h"
#include "board/loader/source.h"
#include "board/pc/layout.h"
#include "board/pc/pc.h"
#include "device/machine.h"

enum { RANGE_RAM = 1, RANGE_RESERVED = 2 };

/* A piece of guest memory that holds a file. */
struct module {
    uint64_t gpa, size;
    uint64_t name; /* guest address of its file name; 0: none */
};

struct boot {
    struct pc *pc;
    struct memory *mem;
    const struct pc_config *cfg;
    const struct kernel *kernel;
    const char *cmdline;
    struct module module[PC_MAX_INITRDS];
    unsigned modules;
};

unsigned pc_memory_map(const struct pc *pc, struct pc_memory_range out[PC_MEMORY_RANGES])
{
    unsigned n = 0;
    out[n++] = (struct pc_memory_range){0, PC_BASE_MEMORY_END, RANGE_RAM};
    out[n++] = (struct pc_memory_range){PC_BASE_MEMORY_END, PC_EXTENDED_MEMORY - PC_BASE_MEMORY_END,
                                        RANGE_RESERVED};
    out[n++] = (struct pc_memory_range){PC_EXTENDED_MEMORY, pc->low_ram_end - PC_EXTENDED_MEMORY,
                                        RANGE_RAM};
    out[n++] = (struct pc_memory_range){PC_ECAM_BASE, PC_ECAM_SIZE, RANGE_RESERVED};
    if (pc->high_ram_end)
        out[n++] = (struct pc_memory_range){GIB(4), pc->high_ram_end - GIB(4), RANGE_RAM};
    return n;
}

/* Writes to the board's own areas below 1 MiB, which are always RAM. */
static void poke(struct boot *b, uint64_t gpa, const void *data, size_t len)
{
    int err = memory_write(b->mem, gpa, data, len);
    if (err)
        log_error("no guest memory at %#llx", (unsigned long long)gpa);
}

/* ---- Initrds and modules ---- */

static int too_little(const struct boot *b, uint64_t need)
{
    log_error(
        "kernel %s with its initrd needs at least %llu MiB of guest memory; there are %llu MiB",
        b->cfg->kernel, (unsigned long long)(align_up(need, MIB(1)) >> 20),
        (unsigned long long)(b->pc->low_ram_end >> 20));
    return -EINVAL;
}

static int read_module(struct boot *b, struct source *src, uint64_t gpa)
{
    void *host = memory_map(b->mem, gpa, src->size);
    if (!host)
        return source_error(src, "does not fit into guest memory");
    int err = source_read(src, host);
    memory_mark_written(b->mem, gpa, src->size);
    return err;
}

/*
 * Linux: all files joined, each at a multiple of 4 bytes, as high as the kernel may look for them.
 * Other systems: one module each, page by page behind the kernel.
 */
static int load_modules(struct boot *b, bool check)
{
    const struct pc_config *cfg = b->cfg;
    struct source src[PC_MAX_INITRDS];
    unsigned opened = 0;
    int err = 0;
    if (cfg->initrd_count == 0)
        return 0;
    if (cfg->initrd_count > PC_MAX_INITRDS) {
        log_error("more than %u initrds", PC_MAX_INITRDS);
        return -EINVAL;
    }
    bool joined = b->kernel->is_linux;
    uint64_t total = 0, align = joined ? 4 : GUEST_PAGE_SIZE;
    for (; opened < cfg->initrd_count; opened++) {
        if ((err = source_open(&src[opened], "initrd", cfg->initrds[opened])))
            goto out;
        total += align_up(MIN(src[opened].size, GIB(4)), align);
    }
    uint64_t limit = b->pc->low_ram_end;
    if (joined && b->kernel->initrd_max < limit)
        limit = b->kernel->initrd_max + 1;
    uint64_t kernel_end = align_up(b->kernel->end, GUEST_PAGE_SIZE);
    if (limit < kernel_end || total > limit - kernel_end) {
        err = too_little(b, kernel_end + align_up(total, GUEST_PAGE_SIZE));
        goto out;
    }
    uint64_t gpa = joined ? align_down(limit - total, GUEST_PAGE_SIZE) : kernel_end;
    if (gpa < kernel_end) {
        err = too_little(b, kernel_end + align_up(total, GUEST_PAGE_SIZE));
        goto out;
    }
    uint64_t at = gpa;
    for (unsigned i = 0; i < opened; i++) {
        if ((err = read_module(b, &src[i], at)))
            goto out;
        if (!joined)
            b->module[b->modules++] = (struct module){.gpa = at, .size = src[i].size};
        else if (check && (err = initrd_check(&src[i], memory_map(b->mem, at, src[i].size),
                                              src[i].size, cfg->memory_bytes)))
            goto out;
        at += align_up(src[i].size, align);
    }
    if (joined)
        b->module[b->modules++] = (struct module){.gpa = gpa, .size = total};
out:
    for (unsigned i = 0; i < opened; i++)
        source_close(&src[i]);
    return err;
}

/* Puts the name of each module's file into guest memory, as far as there is room. */
static void write_names(struct boot *b)
{
    uint64_t at = PC_STRINGS;
    for (unsigned i = 0; i < b->modules; i++) {
        size_t len = strlen(b->cfg->initrds[i]) + 1;
        if (len > PC_STRINGS + PC_STRINGS_SIZE - at)
            return;
        poke(b, at, b->cfg->initrds[i], len);
        b->module[i].name = at;
        at += len;
    }
}

/* ---- Command line ---- */

static int write_cmdline(struct boot *b, const char *prefix)
{
    char text[PC_CMDLINE_SIZE];
    size_t max = MIN((size_t)b->kernel->cmdline_max, sizeof(text) - 1);
    int len = snprintf(text, sizeof(text), "%s%s", prefix, b->cmdline);
    if (len < 0 || (size_t)len > max) {
        log_error("the kernel command line has %d bytes; %s takes at most %zu", len, b->cfg->kernel,
                  max);
        return -EINVAL;
    }
    poke(b, PC_CMDLINE, text, (size_t)len + 1);
    return 0;
}

/* ---- PVH: xen/include/public/arch-x86/hvm/start_info.h ---- */

#define PVH_MAGIC 0x336ec578u

struct pvh_start_info {
    uint32_t magic, version, flags, modules;
    uint64_t modlist_gpa, cmdline_gpa, rsdp_gpa, memmap_gpa;
    uint32_t memmap_entries, reserved;
};
struct pvh_module {
    uint64_t gpa, size, cmdline_gpa, reserved;
};
struct pvh_memmap {
    uint64_t base, size;
    uint32_t type, reserved;
};
_Static_assert(sizeof(struct pvh_start_info) == 56 && sizeof(struct pvh_module) == 32 &&
                   sizeof(struct pvh_memmap) == 24,
               "the layout of Xen's interface");
_Static_assert(PC_BOOT_INFO + 56 <= PC_BOOT_MODULES &&
                   PC_BOOT_MODULES + PC_MAX_INITRDS * 32 <= PC_BOOT_MEMMAP &&
                   PC_BOOT_MEMMAP + PC_MEMORY_RANGES * 24 <= PC_ZERO_PAGE,
               "areas do not overlap");

static int setup_pvh(struct boot *b, struct x86_entry *entry)
{
    int err = write_cmdline(b, "");
    if (err)
        return err;
    if (!b->kernel->is_linux)
        write_names(b);
    struct pc_memory_range range[PC_MEMORY_RANGES];
    unsigned ranges = pc_memory_map(b->pc, range);
    for (unsigned i = 0; i < ranges; i++) {
        struct pvh_memmap e = {range[i].base, range[i].size, range[i].type, 0};
        poke(b, PC_BOOT_MEMMAP + i * sizeof(e), &e, sizeof(e));
    }
    for (unsigned i = 0; i < b->modules; i++) {
        struct pvh_module m = {b->module[i].gpa, b->module[i].size, b->module[i].name, 0};
        poke(b, PC_BOOT_MODULES + i * sizeof(m), &m, sizeof(m));
    }
    struct pvh_start_info info = {
        .magic = PVH_MAGIC,
        .version = 1,
        .modules = b->modules,
        .modlist_gpa = b->modules ? PC_BOOT_MODULES : 0,
        .cmdline_gpa = PC_CMDLINE,
        .rsdp_gpa = PC_ACPI_BASE,
        .memmap_gpa = PC_BOOT_MEMMAP,
        .memmap_entries = ranges,
    };
    poke(b, PC_BOOT_INFO, &info, sizeof(info));
    entry->mode = X86_ENTRY_PVH;
    entry->rbx = PC_BOOT_INFO;
    return 0;
}

/* ---- Multiboot 1, §3.3 ---- */

enum {
    MBI_MEMORY = 1 << 0,
    MBI_CMDLINE = 1 << 2,
    MBI_MODULES = 1 << 3,
    MBI_MMAP = 1 << 6,
    MBI_LOADER = 1 << 9
};

struct multiboot_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms[4],
        mmap_length, mmap_addr;
    uint32_t drives_length, drives_addr, config_table, loader_name;
};
struct multiboot_module {
    uint32_t start, end, string, reserved;
};
struct multiboot_mmap {
    uint32_t size; /* of the rest */
    uint64_t base, len;
    uint32_t type;
} __attribute__((packed));
_Static_assert(sizeof(struct multiboot_info) == 68 && sizeof(struct multiboot_mmap) == 24,
               "the layout of §3.3");

static int setup_multiboot(struct boot *b, struct x86_entry *entry)
{
    static const char loader[] = "ringfort";
    /* By custom the command line begins with the file's name. */
    char prefix[4096 + 2];
    snprintf(prefix, sizeof(prefix), "%s%s", b->cfg->kernel, *b->cmdline ? " " : "");
    int err = write_cmdline(b, prefix);
    if (err)
        return err;
    write_names(b);
    struct pc_memory_range range[PC_MEMORY_RANGES];
    unsigned ranges = pc_memory_map(b->pc, range);
    for (unsigned i = 0; i < ranges; i++) {
        struct multiboot_mmap e = {sizeof(e) - sizeof(e.size), range[i].base, range[i].size,
                                   range[i].type};
        poke(b, PC_BOOT_MEMMAP + i * sizeof(e), &e, sizeof(e));
    }
    for (unsigned i = 0; i < b->modules; i++) {
        struct module *m = &b->module[i];
        struct multiboot_module e = {(uint32_t)m->gpa, (uint32_t)(m->gpa + m->size),
                                     (uint32_t)m->name, 0};
        poke(b, PC_BOOT_MODULES + i * sizeof(e), &e, sizeof(e));
    }
    uint64_t name_at = PC_BOOT_INFO + sizeof(struct multiboot_info);
    poke(b, name_at, loader, sizeof(loader));
    struct multiboot_info info = {
        .flags = MBI_MEMORY | MBI_CMDLINE | MBI_MODULES | MBI_MMAP | MBI_LOADER,
        .mem_lower = PC_BASE_MEMORY_END / 1024,
        .mem_upper = (uint32_t)((b->pc->low_ram_end - PC_EXTENDED_MEMORY) / 1024),
        .cmdline = PC_CMDLINE,
        .mods_count = b->modules,
        .mods_addr = b->modules ? PC_BOOT_MODULES : 0,
        .mmap_length = ranges * (uint32_t)sizeof(struct multiboot_mmap),
        .mmap_addr = PC_BOOT_MEMMAP,
        .loader_name = (uint32_t)name_at,
    };
    poke(b, PC_BOOT_INFO, &info, sizeof(info));
    entry->mode = X86_ENTRY_MULTIBOOT;
    entry->rax = MULTIBOOT_LOADER_MAGIC;
    entry->rbx = PC_BOOT_INFO;
    return 0;
}

/* ---- Linux, 64-bit boot protocol: Documentation/arch/x86/{boot,zero-page}.rst ---- */

enum {
    ZP_EXT_RAMDISK_IMAGE = 0x0c0,
    ZP_EXT_RAMDISK_SIZE = 0x0c4,
    ZP_EXT_CMD_LINE_PTR = 0x0c8,
    ZP_RSDP = 0x070,
    ZP_E820_ENTRIES = 0x1e8,
    ZP_VID_MODE = 0x1fa,
    ZP_BOOT_FLAG = 0x1fe,
    ZP_MAGIC = 0x202,
    ZP_VERSION = 0x206,
    ZP_LOADER = 0x210,
    ZP_LOADFLAGS = 0x211,
    ZP_RAMDISK_IMAGE = 0x218,
    ZP_RAMDISK_SIZE = 0x21c,
    ZP_CMD_LINE_PTR = 0x228,
    ZP_KERNEL_ALIGNMENT = 0x230,
    ZP_CMDLINE_SIZE = 0x238,
    ZP_E820 = 0x2d0,
};
#define LOADER_UNDEFINED 0xff

static void write_page_tables(struct boot *b)
{
    enum { PRESENT_WRITE = 3, LARGE = 0x80, GIBS = 4 };
    uint64_t pml4[512] = {PC_PAGE_TABLES + 0x1000 + PRESENT_WRITE};
    uint64_t pdpt[512] = {0};
    for (unsigned g = 0; g < GIBS; g++)
        pdpt[g] = PC_PAGE_TABLES + 0x2000 + g * 0x1000 + PRESENT_WRITE;
    poke(b, PC_PAGE_TABLES, pml4, sizeof(pml4));
    poke(b, PC_PAGE_TABLES + 0x1000, pdpt, sizeof(pdpt));
    for (unsigned g = 0; g < GIBS; g++) {
        uint64_t pd[512];
        for (unsigned i = 0; i < 512; i++)
            pd[i] = GIB(g) + MIB(2) * i + PRESENT_WRITE + LARGE;
        poke(b, PC_PAGE_TABLES + 0x2000 + g * 0x1000, pd, sizeof(pd));
    }
}

static int setup_linux64(struct boot *b, struct x86_entry *entry)
{
    uint8_t zp[4096] = {0};
    const struct kernel *k = b->kernel;
    int err = write_cmdline(b, "");
    if (err)
        return err;
    if (k->setup_header_len) {
        memcpy(zp + LINUX_SETUP_HEADER, k->setup_header, k->setup_header_len);
    } else {
        /* An ELF vmlinux brings no header; this is what the kernel proper looks at. */
        store_le16(zp + ZP_BOOT_FLAG, 0xaa55);
        memcpy(zp + ZP_MAGIC, "HdrS", 4);
        store_le16(zp + ZP_VERSION, 0x020f);
        zp[ZP_LOADFLAGS] = 1; /* LOADED_HIGH */
        store_le32(zp + ZP_KERNEL_ALIGNMENT, 0x1000000);
        store_le32(zp + ZP_CMDLINE_SIZE, k->cmdline_max);
    }
    store_le16(zp + ZP_VID_MODE, 0xffff); /* "normal" */
    zp[ZP_LOADER] = LOADER_UNDEFINED;
    store_le32(zp + ZP_CMD_LINE_PTR, PC_CMDLINE);
    if (b->modules) {
        store_le32(zp + ZP_RAMDISK_IMAGE, (uint32_t)b->module[0].gpa);
        store_le32(zp + ZP_RAMDISK_SIZE, (uint32_t)b->module[0].size);
    }
    store_le64(zp + ZP_RSDP, PC_ACPI_BASE);
    struct pc_memory_range range[PC_MEMORY_RANGES];
    unsigned ranges = pc_memory_map(b->pc, range);
    zp[ZP_E820_ENTRIES] = (uint8_t)ranges;
    for (unsigned i = 0; i < ranges; i++) {
        uint8_t *e = zp + ZP_E820 + 20 * i;
        store_le64(e, range[i].base);
        store_le64(e + 8, range[i].size);
        store_le32(e + 16, range[i].type);
    }
    poke(b, PC_ZERO_PAGE, zp, sizeof(zp));
    write_page_tables(b);
    entry->mode = X86_ENTRY_LINUX64;
    entry->rsi = PC_ZERO_PAGE;
    entry->cr3 = PC_PAGE_TABLES;
    return 0;
}

/* Descriptors that match pc_entry_state(). */
static void write_gdt(struct boot *b, struct x86_entry *entry)
{
    uint64_t gdt[PC_GDT_TSS / 8 + 2] = {0}; /* a 64-bit TSS takes two */
    gdt[PC_GDT_CODE / 8] =
        entry->mode == X86_ENTRY_LINUX64 ? 0x00af9b000000ffff : 0x00cf9b000000ffff;
    gdt[PC_GDT_DATA / 8] = 0x00cf93000000ffff;
    gdt[PC_GDT_TSS / 8] = 0x00008b0000000067;
    poke(b, PC_GDT, gdt, sizeof(gdt));
    entry->gdt_base = PC_GDT;
    entry->gdt_limit = sizeof(gdt) - 1;
}

int pc_boot_setup(struct pc *pc, const struct pc_config *cfg, const struct kernel *kernel,
                  bool check_initrd, struct x86_entry *entry)
{
    struct boot b = {.pc = pc,
                     .mem = &pc->machine->memory,
                     .cfg = cfg,
                     .kernel = kernel,
                     .cmdline = cfg->cmdline ? cfg->cmdline : ""};
    *entry = (struct x86_entry){.rip = kernel->entry};
    int err = load_modules(&b, check_initrd);
    if (err)
        return err;
    switch (kernel->protocol) {
    case BOOT_PVH:
        err = setup_pvh(&b, entry);
        break;
    case BOOT_MULTIBOOT:
        err = setup_multiboot(&b, entry);
        break;
    default:
        err = setup_linux64(&b, entry);
        break;
    }
    if (!err)
        write_gdt(&b, entry);
    return err;
}
