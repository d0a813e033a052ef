/*
 * A byte stream on the host behind a serial port or virtio console.
 *
 * Kinds: the terminal (raw mode, Ctrl-] leaves), a pty, a file (output only), a Unix socket (one client at a time),
 * none. Callbacks: event loop's thread, machine lock held. Output never blocks the guest for
 * long: what the host does not take is buffered up to a bound, then the oldest is dropped
 * for pty and socket without reader, and can_write() says false for terminal and file.
 */
#ifndef RINGFORT_BACKEND_CONSOLE_H
#define RINGFORT_BACKEND_CONSOLE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct history;
struct loop;
struct console;

/*
 * spec: "stdio", "pty", "file:PATH", "unix:PATH", "none". Logs one line with the cause.
 * -EINVAL bad spec, or the errno of opening. For pty the name of the slave is logged at LOG_WARN level so that people see it.
 */
int console_open(struct loop *loop, const char *spec, struct console **out);
void console_close(struct console *c);          /* flushes (bounded), restores the terminal */
/* From the device. Lock held. */
void console_write(struct console *c, const void *data, size_t len);
/* True while a good device should go on sending (buffer below its bound). */
bool console_can_write(const struct console *c);
/*
 * receive: input from the host; returns how many bytes the device took; the rest is kept until console_kick().
 * escape: the user pressed Ctrl-] on the terminal (only stdio). writable: can_write() became true again. Each may be NULL.
 */
struct console_ops {
    size_t (*receive)(void *opaque, const uint8_t *data, size_t len);
    void (*escape)(void *opaque);
    void (*writable)(void *opaque);
};
void console_connect(struct console *c, const struct console_ops *ops, void *opaque);
/* The escape handler apart from the device that reads: set by the VM. */
void console_set_escape(struct console *c, void (*escape)(void *opaque), void *opaque);
/*
 * The size of the terminal behind the console; false when it has none. resized: it changed (event loop's
 * thread, lock held); NULL: nobody asks.
 */
bool console_size(const struct console *c, unsigned *columns, unsigned *rows);
void console_set_resized(struct console *c, void (*resized)(void *opaque), void *opaque);
/*
 * Everybody else who looks at the console and types into it, besides the host's end that the spec names. The
 * history lives as long as the console; NULL for "none". console_feed(): any thread; how many bytes were taken as
 * input; after fewer than len the history's watcher runs when there is room.
 */
struct history *console_history(struct console *c);
size_t console_feed(struct console *c, const void *data, size_t len);
/* The device has room again: deliver kept input. Callbacks must not close the console. */
void console_kick(struct console *c);

#endif
