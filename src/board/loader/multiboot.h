/* The Multiboot 1 header of a kernel file. Specification 0.6.96 §3.1. */
#ifndef RINGFORT_BOARD_MULTIBOOT_H
#define RINGFORT_BOARD_MULTIBOOT_H

#include <stdbool.h>
#include <stdint.h>

struct memory;
struct source;

#define MULTIBOOT_LOADER_MAGIC 0x2badb002u /* in EAX at the kernel's entry */

struct multiboot {
    uint32_t flags;
    bool has_addresses;   /* the header says where the file goes, whatever its format */
    uint64_t load_offset; /* where in the file the part to load begins */
    uint32_t load_addr, load_len, memsz; /* load_len is inside the file and at most memsz */
    uint32_t entry;                      /* only with has_addresses */
};

/* 1: found and sound; 0: the file has no Multiboot header; -EINVAL: one that cannot be obeyed
 * (logged). */
int multiboot_parse(const struct source *src, const uint8_t *data, uint64_t size,
                    struct multiboot *mb);

#endif
