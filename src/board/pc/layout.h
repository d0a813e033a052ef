/*
 * Addresses of the PC board. docs/machine.md has the picture.
 *
 * C and the ASL compiler both read this file: plain #define lines only, numbers without suffix.
 */
#ifndef RINGFORT_BOARD_LAYOUT_H
#define RINGFORT_BOARD_LAYOUT_H

/* Guest physical address space below 4 GiB. */
#define PC_LOW_RAM_MAX 0xC0000000
#define PC_MEM32_BASE 0xC0000000
#define PC_MEM32_SIZE 0x20000000
#define PC_MEM32_LAST 0xDFFFFFFF
#define PC_ECAM_BASE 0xE0000000
#define PC_ECAM_SIZE 0x10000000
#define PC_IOAPIC_BASE 0xFEC00000
#define PC_LAPIC_BASE 0xFEE00000

/* The first MiB. */
#define PC_GDT 0x500
#define PC_BOOT_INFO 0x6000
#define PC_BOOT_MODULES 0x6100
#define PC_BOOT_MEMMAP 0x7000
#define PC_ZERO_PAGE 0x8000
#define PC_PAGE_TABLES 0x9000
#define PC_CMDLINE 0x20000
#define PC_CMDLINE_SIZE 0x10000
#define PC_STRINGS 0x30000
#define PC_STRINGS_SIZE 0x10000
#define PC_BASE_MEMORY_END 0x9FC00
#define PC_ACPI_BASE 0xE0000
#define PC_ACPI_SIZE 0x1F000
#define PC_RESET_VECTOR 0xFFFF0
#define PC_EXTENDED_MEMORY 0x100000

/* Selectors of the descriptor table at PC_GDT, as Linux's 64-bit boot protocol wants them. */
#define PC_GDT_CODE 0x10
#define PC_GDT_DATA 0x18
#define PC_GDT_TSS 0x20

/* I/O ports that PCI may hand out; the legacy devices are all below. */
#define PC_PCI_IO_BASE 0xC000
#define PC_PCI_IO_SIZE 0x4000
#define PC_PCI_IO_LAST 0xFFFF

/* Devices that the DSDT describes; acpi.c asserts that they agree with the devices' own headers. */
#define PC_COM1_PORT 0x3F8
#define PC_COM1_PORTS 8
#define PC_COM1_GSI 4
#define PC_RTC_PORT 0x70
#define PC_RTC_PORTS 2
#define PC_RTC_GSI 8
#define PC_POWER_PORT 0x600
#define PC_POWER_PORTS 16
#define PC_GED_EVENTS 0x604
#define PC_GED_GSI 9
#define PC_GED_BUTTON 1
#define PC_S5_TYPE 5

/* INTA of slot 0; the four inputs rotate with the slot. */
#define PC_INTX_GSI 16

#endif
