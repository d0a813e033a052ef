/*
 * The CMOS real-time clock (MC146818) at ports 0x70 and 0x71: time of day, alarm,
 * periodic and update-ended interrupts, 114 bytes of memory, and the century at 0x32.
 *
 * Time is UTC from clock_wall_ns(); what the guest sets is kept as an offset from it. The
 * interrupt is GSI 8, active high, level until register C is read.
 *
 * Machine lock held everywhere. Motorola MC146818A data sheet; ACPI 6.5 §5.2.9 (CENTURY).
 */
#ifndef RINGFORT_DEVICE_RTC_H
#define RINGFORT_DEVICE_RTC_H

#include <stdint.h>

struct machine;
struct rtc;

#define RTC_PORT 0x70u          /* index; data at RTC_PORT + 1 */
#define RTC_PORTS 2u
#define RTC_GSI 8u
#define RTC_CENTURY 0x32u       /* CMOS index of the century, for the FADT */

/* Adds the clock to the machine's devices. NULL: out of resources or the ports are taken (logged). */
struct rtc *rtc_create(struct machine *m);

/* Presets one byte of CMOS memory (index 0x0e…0x7f), for firmware that looks there; kept over resets. */
void rtc_set_cmos(struct rtc *r, uint8_t index, uint8_t value);

#endif
