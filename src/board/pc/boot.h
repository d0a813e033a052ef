/*
 * What a boot loader does after the kernel is in memory: initrds or modules, command line, memory
 * map, the information block of the protocol, and the boot CPU's tables. One thread, no vCPU runs.
 */
#ifndef RINGFORT_BOARD_BOOT_H
#define RINGFORT_BOARD_BOOT_H

#include "board/loader/kernel.h"
#include "board/pc/entry.h"

struct pc;
struct pc_config;

/*
 * kernel is what kernel_load_file() gave. check_initrd: walk initramfs archives (false when the
 * same files were checked before). Errors as pc_load_kernel()'s.
 */
int pc_boot_setup(struct pc *pc, const struct pc_config *cfg, const struct kernel *kernel,
                  bool check_initrd, struct x86_entry *entry);

/* The memory map that every protocol passes on; types as E820: 1 RAM, 2 reserved. Returns the
 * number of entries. */
struct pc_memory_range {
    uint64_t base, size;
    uint32_t type;
};
#define PC_MEMORY_RANGES 8
unsigned pc_memory_map(const struct pc *pc, struct pc_memory_range out[PC_MEMORY_RANGES]);

#endif
