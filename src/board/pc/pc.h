/*
 * The x86-64 machine: memory map, devices, ACPI tables, and the way in for a kernel.
 *
 * It is a legacy-free PC: hardware-reduced ACPI, local APICs and one IOAPIC, PCI Express by ECAM
 * and by ports 0xCF8/0xCFC, a 16550 at COM1, a CMOS clock, virtio devices. docs/machine.md draws
 * it; layout.h has the addresses. There is no firmware: the VMM does what firmware would (BARs,
 * tables, boot protocol).
 *
 * pc_create() runs once, before any vCPU. All functions: one thread, machine lock held or no vCPU
 * running.
 */
#ifndef RINGFORT_BOARD_PC_H
#define RINGFORT_BOARD_PC_H

#include <stdbool.h>
#include <stdint.h>

#include "board/loader/kernel.h"
#include "board/pc/entry.h"

struct block;
struct console;
struct irqchip;
struct machine;
struct net;
struct pci_host;
struct power;
struct rtc;
struct serial;

struct pc_disk {
    struct block *backend; /* opened; pc_create() takes it over */
    const char *serial;    /* NULL: none; up to 20 bytes */
};

struct pc_net {
    struct net *backend; /* opened; pc_create() takes it over; NULL: a card without link */
    uint8_t mac[6];
};

/* Everything but the backends of disks and nets is borrowed until the machine is destroyed. */
struct pc_config {
    uint64_t memory_bytes; /* multiple of 4 KiB, PC_MIN_MEMORY…PC_MAX_MEMORY */
    unsigned cpus;         /* 1…PC_MAX_CPUS */
    uint64_t tsc_hz;       /* rate of the guest's TSC */

    const char *kernel;         /* file; needed by pc_load_kernel() only */
    const char *const *initrds; /* Linux: joined in order; other protocols: one module each */
    unsigned initrd_count;      /* at most PC_MAX_INITRDS */
    const char *cmdline;        /* NULL: "" */
    enum boot_protocol boot;    /* BOOT_AUTO: as the file offers */

    struct console *serial; /* behind COM1; NULL: output vanishes */
    const struct pc_disk *disks;
    unsigned disk_count;
    const struct pc_net *nets;
    unsigned net_count;
    struct console *const *consoles; /* one virtio console each */
    unsigned console_count;
    unsigned rng_count; /* virtio entropy devices */
    bool debug_exit;    /* isa-debug-exit at the given ports (size 0: testdev.h's defaults) */
    uint16_t debug_exit_base, debug_exit_size;
    bool testdev; /* pc-testdev */
};

#define PC_MIN_MEMORY  ((uint64_t)4 << 20)
#define PC_MAX_MEMORY  ((uint64_t)1 << 40)
#define PC_MAX_CPUS    1024u
#define PC_MAX_INITRDS 64u

/* The parts belong to the machine, which destroys them; pointers are valid until machine_destroy().
 */
struct pc {
    struct machine *machine;
    struct irqchip *irqchip;
    struct pci_host *pci;
    struct serial *serial;
    struct rtc *rtc;
    struct power *power;
    uint64_t
        low_ram_end; /* RAM is [0, low_ram_end) and, when there is more, [4 GiB, high_ram_end) */
    uint64_t high_ram_end;           /* 0: none */
    uint64_t mem64_base, mem64_size; /* PCI's 64-bit window */
    bool loaded;                     /* pc_load_kernel() ran: RAM holds something */
};

/*
 * Builds the machine: RAM, interrupt controllers, PCI host, devices, in this order. m is
 * initialised and empty. 0 or a negative errno (logged); after an error machine_destroy(m) cleans
 * up. The backends of disks and nets belong to the machine from the call on, also after an error;
 * consoles stay the caller's and outlive the machine.
 */
int pc_create(struct pc *pc, struct machine *m, const struct pc_config *cfg);

/*
 * What firmware and boot loader would do: assigns BARs, clears RAM if it was loaded before, writes
 * kernel, initrds, command line and ACPI tables, and says how the boot CPU starts. Called before
 * the first run, and after machine_reset_devices() for each guest reset. 0; -EINVAL and errnos of
 * opening for files that cannot be used (one line logged, naming the file); -EINVAL too when they
 * need more guest memory than there is (the line says how much).
 */
int pc_load_kernel(struct pc *pc, const struct pc_config *cfg, struct x86_entry *entry);

#endif
