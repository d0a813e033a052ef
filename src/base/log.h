/*
 * Messages to the person who runs the machine.
 *
 * One line per message, on standard error, as "ringfort: <machine>: <text>".
 * A function that finds an error logs it once, where the cause is known, and
 * returns a negative errno; its callers pass the number on and stay silent.
 * Any thread; a line is written by one write(2), so lines do not mix.
 */
#ifndef RINGFORT_BASE_LOG_H
#define RINGFORT_BASE_LOG_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>

enum log_level { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

/* Messages above this level are dropped. Default LOG_WARN. */
void log_set_level(enum log_level level);
/* When set, each line begins with the time (UTC): it goes to a file. */
void log_set_times(bool on);
bool log_enabled(enum log_level level);
/* The name shown with every message; copied. NULL: none. */
void log_set_machine(const char *name);
/* When set, line ends are "\r\n": the terminal is in raw mode. */
void log_set_raw_terminal(bool raw);

/*
 * Errors of this thread are also kept in buf, the first one, without the line's beginning: for whoever asked from elsewhere.
 * NULL: no more.
 */
void log_keep_error(char *buf, size_t size);
/* The same, and the first one is not printed: it is the caller's to tell. log_keep_error(NULL, 0) ends it. */
void log_hold_error(char *buf, size_t size);

void log_at(enum log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

#define log_error(...) log_at(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) log_at(LOG_WARN, __VA_ARGS__)
#define log_info(...) log_at(LOG_INFO, __VA_ARGS__)
#define log_debug(...) \
    do { \
        if (log_enabled(LOG_DEBUG)) \
            log_at(LOG_DEBUG, __VA_ARGS__); \
    } while (0)

/*
 * A guest can repeat its mistakes a million times a second: each call site
 * that reports what a guest did logs its first few occurrences only.
 */
#define log_guest_error(...) \
    do { \
        static unsigned log_count_; \
        if (__atomic_fetch_add(&log_count_, 1, __ATOMIC_RELAXED) < 5) \
            log_at(LOG_WARN, __VA_ARGS__); \
    } while (0)

#endif
