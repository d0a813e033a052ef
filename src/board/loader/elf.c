/* ELF executables of x86. See elf.h. */
#include "board/loader/elf.h"

#include <elf.h>
#include <errno.h>
#include <string.h>

#include "base/util.h"
#include "board/loader/source.h"
#include "memory/memory.h"

/* Xen's ELF notes (name "Xen"). */
#define XEN_NOTE_GUEST_OS     6
#define XEN_NOTE_PHYS32_ENTRY 18

/* Both classes of program header in one shape. */
struct program_header {
    uint32_t type;
    uint64_t offset, paddr, filesz, memsz, align;
};

bool elf_is(const uint8_t *data, uint64_t size)
{
    return size >= SELFMAG && !memcmp(data, ELFMAG, SELFMAG);
}

static const char *machine_name(unsigned machine)
{
    static const struct {
        unsigned machine;
        const char *name;
    } names[] = {
        {EM_386, "i386"},     {EM_X86_64, "x86-64"}, {EM_AARCH64, "AArch64"}, {EM_ARM, "ARM"},
        {EM_RISCV, "RISC-V"}, {EM_PPC, "PowerPC"},   {EM_PPC64, "PowerPC"},   {EM_S390, "S/390"},
        {EM_MIPS, "MIPS"},    {EM_SPARCV9, "SPARC"}, {EM_IA_64, "IA-64"},     {258, "LoongArch"},
    };
    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        if (names[i].machine == machine)
            return names[i].name;
    return NULL;
}

static int check_header(const struct source *src, const uint8_t *data, uint64_t size, struct elf *e)
{
    if (!elf_is(data, size))
        return source_error(src, "is not an ELF file");
    if (size < sizeof(Elf32_Ehdr) || (data[EI_CLASS] == ELFCLASS64 && size < sizeof(Elf64_Ehdr)))
        return source_error(src, "is truncated inside its ELF header");
    bool big_endian = data[EI_DATA] == ELFDATA2MSB;
    unsigned type = load_le16(data + offsetof(Elf32_Ehdr, e_type));
    unsigned machine = load_le16(data + offsetof(Elf32_Ehdr, e_machine));
    if (big_endian) {
        type = __builtin_bswap16((uint16_t)type);
        machine = __builtin_bswap16((uint16_t)machine);
    }
    if (machine != EM_386 && machine != EM_X86_64) {
        const char *name = machine_name(machine);
        if (name)
            return source_error(src, "is an ELF file for %s; this machine is x86-64", name);
        return source_error(src, "is an ELF file for machine type %u; this machine is x86-64",
                            machine);
    }
    if (big_endian || data[EI_DATA] != ELFDATA2LSB || data[EI_VERSION] != EV_CURRENT ||
        (data[EI_CLASS] != ELFCLASS32 && data[EI_CLASS] != ELFCLASS64))
        return source_error(src, "has a corrupt ELF header");
    if (type != ET_EXEC && type != ET_DYN)
        return source_error(src, "is an ELF file, but %s",
                            type == ET_REL ? "an object file or kernel module, not an executable"
                                           : "not an executable");
    e->is_64 = data[EI_CLASS] == ELFCLASS64;
    return 0;
}

static void read_program_header(const struct elf *e, uint64_t at, struct program_header *p)
{
    if (e->is_64) {
        Elf64_Phdr h;
        memcpy(&h, e->data + at, sizeof(h));
        *p = (struct program_header){h.p_type,   h.p_offset, h.p_paddr,
                                     h.p_filesz, h.p_memsz,  h.p_align};
    } else {
        Elf32_Phdr h;
        memcpy(&h, e->data + at, sizeof(h));
        *p = (struct program_header){h.p_type,   h.p_offset, h.p_paddr,
                                     h.p_filesz, h.p_memsz,  h.p_align};
    }
}

/* The notes of one PT_NOTE segment, whose bytes are inside the file. Malformed notes end the
 * search. */
static void read_notes(struct elf *e, const struct program_header *p)
{
    uint64_t align = p->align == 8 ? 8 : 4;
    uint64_t pos = 0;
    while (p->filesz - pos >= sizeof(Elf32_Nhdr)) {
        const uint8_t *n = e->data + p->offset + pos;
        uint64_t name_len = load_le32(n), desc_len = load_le32(n + 4);
        uint32_t type = load_le32(n + 8);
        uint64_t left = p->filesz - pos;
        uint64_t desc_at = align_up(sizeof(Elf32_Nhdr) + name_len, align);
        if (desc_at > left || desc_len > left - desc_at)
            return;
        const uint8_t *desc = n + desc_at;
        if (name_len == 4 && !memcmp(n + sizeof(Elf32_Nhdr), "Xen", 4)) {
            if (type == XEN_NOTE_PHYS32_ENTRY && (desc_len == 4 || desc_len == 8)) {
                uint64_t entry = desc_len == 8 ? load_le64(desc) : load_le32(desc);
                e->has_pvh = entry <= UINT32_MAX;
                e->pvh_entry = (uint32_t)entry;
            } else if (type == XEN_NOTE_GUEST_OS && desc_len >= 5 && !memcmp(desc, "linux", 5)) {
                e->is_linux = true;
            }
        }
        if (name_len == 4 && !memcmp(n + sizeof(Elf32_Nhdr), "GNU", 4) && type == NT_GNU_ABI_TAG)
            e->is_program = true;
        uint64_t next = align_up(desc_at + desc_len, align);
        if (next >= left)
            return;
        pos += next;
    }
}

static int add_segment(const struct source *src, struct elf *e, const struct program_header *p)
{
    if (p->memsz == 0)
        return 0;
    if (p->filesz > p->memsz || p->paddr + p->memsz < p->paddr)
        return source_error(src, "has a corrupt program header (segment at %#llx)",
                            (unsigned long long)p->paddr);
    if (e->segments == ELF_MAX_SEGMENTS)
        return source_error(src, "has more than %d segments to load", ELF_MAX_SEGMENTS);
    e->segment[e->segments++] = (struct elf_segment){
        .paddr = p->paddr, .filesz = p->filesz, .memsz = p->memsz, .offset = p->offset};
    e->start = MIN(e->start, p->paddr);
    e->end = MAX(e->end, p->paddr + p->memsz);
    return 0;
}

int elf_parse(const struct source *src, const uint8_t *data, uint64_t size, struct elf *e)
{
    *e = (struct elf){.data = data, .size = size, .start = UINT64_MAX};
    int err = check_header(src, data, size, e);
    if (err)
        return err;

    uint64_t table;
    unsigned entry_size, count;
    if (e->is_64) {
        Elf64_Ehdr h;
        memcpy(&h, data, sizeof(h));
        e->entry = h.e_entry;
        table = h.e_phoff;
        entry_size = h.e_phentsize;
        count = h.e_phnum;
    } else {
        Elf32_Ehdr h;
        memcpy(&h, data, sizeof(h));
        e->entry = h.e_entry;
        table = h.e_phoff;
        entry_size = h.e_phentsize;
        count = h.e_phnum;
    }
    if (count == 0)
        return source_error(src, "is an ELF file without segments to load");
    if (entry_size != (e->is_64 ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr)))
        return source_error(src, "has a corrupt ELF header (size of program headers)");
    if (table > size || (uint64_t)count * entry_size > size - table)
        return source_error(src, "is truncated: its program headers lie beyond its end");

    for (unsigned i = 0; i < count; i++) {
        struct program_header p;
        read_program_header(e, table + (uint64_t)i * entry_size, &p);
        if (p.type == PT_INTERP)
            e->is_program = true;
        if (p.type != PT_LOAD && p.type != PT_NOTE)
            continue;
        if (p.filesz && (p.offset > size || p.filesz > size - p.offset))
            return source_error(src, "is truncated: segment %u lies beyond its end", i);
        if (p.type == PT_NOTE && p.filesz)
            read_notes(e, &p);
        else if (p.type == PT_LOAD && (err = add_segment(src, e, &p)))
            return err;
    }
    if (e->segments == 0)
        return source_error(src, "is an ELF file without segments to load");
    return 0;
}

bool elf_contains(const struct elf *e, uint64_t addr)
{
    for (unsigned i = 0; i < e->segments; i++)
        if (addr - e->segment[i].paddr < e->segment[i].memsz)
            return true;
    return false;
}

int elf_load(const struct elf *e, struct memory *mem)
{
    for (unsigned i = 0; i < e->segments; i++) {
        const struct elf_segment *s = &e->segment[i];
        if (memory_write(mem, s->paddr, e->data + s->offset, s->filesz) ||
            memory_fill(mem, s->paddr + s->filesz, 0, s->memsz - s->filesz))
            return -EFAULT;
    }
    return 0;
}
