/*
 * Power: ACPI hardware-reduced sleep and reset registers, the generic event device's
 * register with the power button, the ACPI PM timer, and two older ways to reset.
 *
 * Everything is on I/O ports:
 *   POWER_SLEEP_CONTROL  byte, ACPI 6.5 §4.8.3.7: SLP_TYP in bits 4:2, SLP_EN bit 5. Writing
 *                        SLP_EN with SLP_TYP POWER_S5_TYPE (0x34) powers the machine off. Other
 *                        types do nothing. Reads 0.
 *   POWER_SLEEP_STATUS   byte: bit 7 WAK_STS, write one to clear. Reads 0 on this machine.
 *   POWER_RESET          byte: writing POWER_RESET_VALUE resets the machine; others do nothing. Reads 0.
 *   POWER_GED_EVENTS     dword: pending events (POWER_EVENT_*). A read of the low byte (so any read that begins at
 *                        the first port) returns all pending bits and clears them, which lowers
 *                        POWER_GED_GSI. Writes do nothing. The DSDT's _EVT reads it with DWordAcc.
 *   POWER_PM_TIMER       dword, read only: 32-bit counter at 3.579545 MHz (ACPI 6.5 §4.8.3.3), for guests
 *                        that want one; FADT X_PM_TMR_BLK, flag TMR_VAL_EXT.
 *   0xCF9                reset control register: bit 2 written from 0 to 1 resets. Lies inside the PCI
 *                        host's address register and is forwarded from there.
 *   0x64                 keyboard controller's command port: 0xFE resets. There is no controller:
 *                        reads give 0xFF.
 * POWER_GED_GSI is level, active high: Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive).
 *
 * Machine lock held everywhere.
 */
#ifndef RINGFORT_DEVICE_POWER_H
#define RINGFORT_DEVICE_POWER_H

#include <stdint.h>

struct machine;
struct pci_host;
struct power;

#define POWER_PORT 0x600u       /* first port of the block */
#define POWER_PORTS 16u
#define POWER_SLEEP_CONTROL 0x600u
#define POWER_SLEEP_STATUS 0x601u
#define POWER_RESET 0x602u
#define POWER_GED_EVENTS 0x604u
#define POWER_PM_TIMER 0x608u

#define POWER_S5_TYPE 5u        /* \_S5 is Package () { 5, 5, 0, 0 } */
#define POWER_RESET_VALUE 0x42u
#define POWER_GED_GSI 9u
#define POWER_PM_TIMER_HZ 3579545u

enum power_event_bit {
    POWER_EVENT_BUTTON = 1u << 0,   /* Notify (\_SB.PWRB, 0x80) */
};

/*
 * Adds the device to the machine. pci: the host bridge that forwards port 0xCF9, or NULL (the port is then
 * claimed here). NULL return: out of resources or ports taken (logged).
 */
struct power *power_create(struct machine *m, struct pci_host *pci);

/* The machine's power device, or NULL. */
struct power *power_find(struct machine *m);

/* A press of the power button: the guest is asked to shut down. */
void power_press_button(struct power *p);

#endif
