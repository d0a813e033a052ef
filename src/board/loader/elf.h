/*
 * ELF executables of x86: parsing with every number checked, and loading by physical address.
 *
 * ELF gABI 4.1; Xen's notes: xen/include/public/elfnote.h. One thread.
 */
#ifndef RINGFORT_BOARD_ELF_H
#define RINGFORT_BOARD_ELF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct memory;
struct source;

#define ELF_MAX_SEGMENTS 32

struct elf_segment {
    uint64_t paddr, filesz, memsz,
        offset; /* offset + filesz is inside the file, paddr + memsz does not wrap */
};

struct elf {
    const uint8_t *data; /* the file; borrowed */
    uint64_t size;
    bool is_64;
    uint64_t entry;
    struct elf_segment
        segment[ELF_MAX_SEGMENTS]; /* of type PT_LOAD, with memsz > 0, in file order */
    unsigned segments;
    uint64_t start, end; /* physical extent of the segments: lowest paddr, highest paddr + memsz */
    bool has_pvh;        /* a Xen note names a 32-bit physical entry point */
    uint32_t pvh_entry;
    bool is_linux; /* a Xen note says so */
    bool is_program; /* of user space: has an interpreter, or the C library's note of the system */
};

/* Does it begin with ELF's magic number? */
bool elf_is(const uint8_t *data, uint64_t size);
/*
 * Fills *e. data may be longer than the ELF file. 0, or -EINVAL (logged in the name of src):
 * truncated, another machine's, not an executable, or with numbers that contradict each other.
 */
int elf_parse(const struct source *src, const uint8_t *data, uint64_t size, struct elf *e);
/* Is addr inside a segment? */
bool elf_contains(const struct elf *e, uint64_t addr);
/*
 * Copies the segments to guest memory, which must contain [e->start, e->end), and zeroes what the
 * file does not fill. e->data must not lie in the guest memory that is written. 0 or -EFAULT
 * (silent).
 */
int elf_load(const struct elf *e, struct memory *mem);

#endif
