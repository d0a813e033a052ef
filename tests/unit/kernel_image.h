/*
 * Small made-up kernels and archives for the loader's tests: ELF files, bzImages around a
 * compressed payload, Multiboot images, cpio archives. Each function allocates; the caller frees
 * data.
 */
#ifndef RINGFORT_TEST_KERNEL_IMAGE_H
#define RINGFORT_TEST_KERNEL_IMAGE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "board/loader/unpack.h"

struct image {
    uint8_t *data;
    size_t size;
};

/* What the made-up ELF file contains; every segment holds a pattern (see image_pattern()). */
struct elf_spec {
    bool is_64;
    uint16_t machine;       /* 0: EM_X86_64 or EM_386 by class */
    uint64_t paddr;         /* of the first segment; the second is SECOND_SEGMENT behind it */
    uint32_t filesz, memsz; /* of the first segment */
    uint64_t entry;
    bool pvh, linux_note;
    uint32_t pvh_entry;
    bool multiboot; /* with a Multiboot header, flags multiboot_flags, before the segments */
    uint32_t multiboot_flags;
    uint32_t multiboot_addresses[5]; /* header, load, load end, bss end, entry */
};
#define SECOND_SEGMENT 0x10000u /* its file and memory size: SECOND_SIZE */
#define SECOND_SIZE    0x200u

struct image image_elf(const struct elf_spec *spec);
/* A 64-bit Linux kernel that has an entry for PVH, 0x50 behind the one for Linux's own protocol. */
struct elf_spec image_linux_spec(uint32_t load);
/* Where the first segment's bytes begin in the file. */
#define ELF_FIRST_OFFSET 0x400u
/* Byte i of segment n. */
static inline uint8_t image_pattern(unsigned n, size_t i)
{
    return (uint8_t)(i * 7 + i / 256 + 31 * n);
}

/* One compressed stream of data; for LZ4 the legacy frame. */
struct image image_pack(enum unpack_format format, const uint8_t *data, size_t size);
/* A bzImage, protocol 2.15, around payload, preferred address 16 MiB and init_size as given. */
struct image image_bzimage(enum unpack_format format, const uint8_t *payload, size_t size,
                           uint32_t init_size);

/* A newc archive with one file of file_size bytes and the trailer. */
struct image image_cpio(const char *name, uint32_t file_size);

#endif
