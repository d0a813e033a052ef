/*
 * What has been written to a console, for those who read it besides the host's end: the last bytes, by position.
 *
 * A position counts bytes since the console was opened and never goes back. A reader keeps its own and asks for what
 * comes after it; one that is too slow finds that its position has moved on to the oldest byte still there. So
 * readers cost the writer nothing, and none of them can hold the guest back.
 *
 * Any thread; the history's own lock is a leaf.
 */
#ifndef RINGFORT_BACKEND_CONSOLE_HISTORY_H
#define RINGFORT_BACKEND_CONSOLE_HISTORY_H

#include <stddef.h>
#include <stdint.h>

#define HISTORY_SIZE (1u << 20) /* bytes that are kept; a power of two */

struct history;

/* NULL: out of memory. Memory becomes resident as it is written. */
struct history *history_create(void);
void history_destroy(struct history *h);
void history_write(struct history *h, const void *data, size_t len);
/* The position after the last byte. */
uint64_t history_end(struct history *h);
/*
 * Copies up to len bytes that begin at *at into buf and moves *at behind them; an *at that is too old is moved to the
 * oldest byte first, one past the end to the end. Returns how many bytes.
 */
size_t history_read(struct history *h, uint64_t *at, void *buf, size_t len);
/* The position where the last so many lines begin (UINT64_MAX: all that is kept). */
uint64_t history_lines(struct history *h, uint64_t lines);
/* Runs the watcher as if something had been written. */
void history_touch(struct history *h);
/*
 * fn runs after each write, in the writer's thread with the machine lock held: quick, and without locks that
 * somebody holds who calls functions here. NULL: nobody waits; after that returned the old one does not run any more.
 */
void history_set_watcher(struct history *h, void (*fn)(void *opaque), void *opaque);

#endif
