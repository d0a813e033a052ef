/*
 * Kernels: finding out what a file is, and bringing it into guest memory.
 *
 * Kinds of file: Linux bzImage (its payload is unpacked here, which saves the guest's processor the
 * work), ELF with a Xen PVH note, ELF with Linux's 64-bit entry, and Multiboot 1. Only the kernel's
 * own bytes are written; what goes around it (command line, tables, initrd) is the board's
 * (pc/boot.c).
 *
 * Linux Documentation/arch/x86/boot.rst; Xen docs/misc/pvh.pandoc; Multiboot specification 0.6.96.
 * One thread, no vCPU runs.
 */
#ifndef RINGFORT_BOARD_KERNEL_H
#define RINGFORT_BOARD_KERNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct memory;
struct source;

/* Ways into a kernel. AUTO takes the first that the file offers, in the order of the others. */
enum boot_protocol {
    BOOT_AUTO,
    BOOT_PVH,       /* Xen PVH, 32-bit: a bzImage's payload or an ELF file with the note */
    BOOT_MULTIBOOT, /* Multiboot 1, 32-bit: any file with its header */
    BOOT_LINUX64,   /* Linux 64-bit: a bzImage that unpacks itself, or an ELF vmlinux */
};

/* Linux's setup header: what boot_params has from offset 0x1f1 on. */
#define LINUX_SETUP_HEADER     0x1f1u
#define LINUX_SETUP_HEADER_MAX (0x290u - LINUX_SETUP_HEADER)

struct kernel {
    enum boot_protocol protocol; /* not AUTO */
    uint64_t entry;              /* physical address, below 4 GiB */
    uint64_t start, end;         /* guest memory that the kernel needs for itself when it starts */
    bool is_linux;
    uint32_t
        cmdline_max; /* bytes without the final 0 that the kernel takes; UINT32_MAX: not known */
    uint64_t initrd_max;                          /* highest address of an initrd's last byte */
    uint8_t setup_header[LINUX_SETUP_HEADER_MAX]; /* of a bzImage */
    unsigned setup_header_len;                    /* 0: not a bzImage */
};

/*
 * Loads the file into [1 MiB, ram_end) of guest memory, which is one region. want: BOOT_AUTO, or
 * the only protocol that will do. Memory in the range that the kernel does not occupy holds what it
 * held before, or zeroes. 0; -EINVAL for a file that cannot be loaded or too little memory, -ENOMEM
 * of the host, -EIO, errnos of opening. Each is logged.
 */
int kernel_load_file(const char *path, struct memory *mem, uint64_t ram_end,
                     enum boot_protocol want, struct kernel *k);
/* The same from a buffer; src only names it. */
int kernel_load(const struct source *src, const uint8_t *data, uint64_t size, struct memory *mem,
                uint64_t ram_end, enum boot_protocol want, struct kernel *k);

/*
 * Gives pages of guest memory back to the host; they read as zeroes then. [gpa, gpa + len) must be
 * in one region; the parts of pages at the ends are zeroed.
 */
void guest_memory_clear(struct memory *mem, uint64_t gpa, uint64_t len);

#endif
