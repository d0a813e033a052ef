/*
 * The ACPI tables of the PC board: RSDP, XSDT (and RSDT), FADT (hardware-reduced), MADT, MCFG, DSDT
 * (dsdt.asl) and an SSDT with what depends on the configuration. ACPI 6.5 chapter 5; PCI Firmware
 * Specification 3.3 §4.1.2.
 */
#ifndef RINGFORT_BOARD_ACPI_H
#define RINGFORT_BOARD_ACPI_H

#include <stddef.h>
#include <stdint.h>

struct acpi_config {
    unsigned cpus;                   /* APIC ids 0…cpus-1 */
    uint64_t mem64_base, mem64_size; /* PCI's 64-bit window */
};

/*
 * Writes the tables to buf, which will be at guest address base (16-aligned, below 4 GiB); the RSDP
 * is at its start. *len: bytes used. 0, or -ENOSPC (silent) when cap is too small.
 */
int acpi_build(const struct acpi_config *cfg, uint64_t base, uint8_t *buf, size_t cap, size_t *len);

#endif
