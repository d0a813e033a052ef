/*
 * A 16550A UART on the I/O ports, with its 16-byte FIFOs, behind a host console.
 *
 * Transmission takes no guest time: a byte written to THR is with the console at once, so
 * THR is empty again when the write returns. Only a console that takes no more
 * (console_can_write() false) keeps THRE low until it does again.
 * Input stays with the console while the receive FIFO is full; the guest's reads kick it.
 *
 * Machine lock held everywhere. NS PC16550D data sheet.
 */
#ifndef RINGFORT_DEVICE_SERIAL_H
#define RINGFORT_DEVICE_SERIAL_H

#include <stdint.h>

struct console;
struct machine;
struct serial;

#define SERIAL_COM1_PORT 0x3f8u
#define SERIAL_COM1_GSI 4u
#define SERIAL_PORTS 8u         /* I/O ports of one UART */
#define SERIAL_CLOCK_HZ 1843200u

/*
 * Makes a UART at ports base…base+7 whose interrupt (active high, level) is GSI gsi, and adds it to the
 * machine's devices, which own it from then on. console is borrowed and outlives it; NULL: output vanishes,
 * no input. NULL return: out of resources or the ports are taken (logged).
 */
struct serial *serial_create(struct machine *m, uint64_t base, unsigned gsi, struct console *console);

/*
 * Input from the line, as from the console: returns how many of the bytes found room. For tests;
 * the console is connected to this by serial_create().
 */
unsigned serial_receive(struct serial *s, const uint8_t *data, unsigned len);

#endif
