/*
 * Two devices that test programs expect, under the names QEMU's users know them by.
 *
 * isa-debug-exit: a write of value v to its ports ends the run with process exit status (v << 1) | 1
 * (low eight bits count for the process). Reads give 0.
 *
 * pc-testdev, what kvm-unit-tests uses on x86:
 *   port 0xE0, 4 ports    a 32-bit register, any part readable and writable
 *   port 0xE4, 4 ports    a write of a guest physical address asks that translations of its page be dropped
 *   port 0xE8, 4 ports    a view of the same register that is accessed bytewise
 *   port 0x2000, 24 ports GSI n is raised by writing non-zero to port 0x2000 + n, lowered by zero
 *   MMIO 0xFF000000       64 KiB of memory that is accessed as MMIO
 *
 * Machine lock held everywhere.
 */
#ifndef RINGFORT_DEVICE_TESTDEV_H
#define RINGFORT_DEVICE_TESTDEV_H

#include <stdint.h>

struct machine;

#define TESTDEV_EXIT_PORT 0x501u    /* isa-debug-exit's defaults: iobase and iosize */
#define TESTDEV_EXIT_PORTS 2u

/* 0, or a negative errno (logged): ports taken, absurd range (-EINVAL), out of memory. */
int testdev_add_debug_exit(struct machine *m, uint64_t iobase, uint64_t iosize);
int testdev_add_pc_testdev(struct machine *m);

#endif
