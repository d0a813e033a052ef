/*
 * The user's terminal while it shows a guest's console: raw mode, and what must not be shown twice.
 */
#ifndef RINGFORT_CLI_TERMINAL_H
#define RINGFORT_CLI_TERMINAL_H

#include <stdbool.h>
#include <stddef.h>

/*
 * Takes out of old output what a terminal would answer or remember: requests for its position, size and kind (whose answers
 * would be typed into the guest, long after it asked), titles and other strings. Zero it at first; what begins in one piece may
 * end in the next.
 */
struct terminal_filter {
    enum { FILTER_TEXT, FILTER_ESCAPE, FILTER_CSI, FILTER_STRING, FILTER_STRING_ESCAPE } state;
    char held[64]; /* a sequence whose end decides */
    size_t held_len;
};
/* Writes what is left of len bytes to out, which has room for len + sizeof(f->held). Returns how many. */
size_t terminal_filter(struct terminal_filter *f, const char *in, size_t len, char *out);

/* Puts the terminal at fd into raw mode; it is put back by terminal_restore(), at exit() and by the signals that end
 * the process. False: it is none. keys_only: keys come at once and unseen, but Ctrl-C works and output is as ever. */
bool terminal_raw(int fd, bool keys_only);
void terminal_restore(void);

#endif
