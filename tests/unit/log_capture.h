/* What is logged while a test runs: standard error goes to a file in memory. One at a time. */
#ifndef RINGFORT_TEST_LOG_CAPTURE_H
#define RINGFORT_TEST_LOG_CAPTURE_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static int log_capture_fd = -1, log_capture_saved = -1;
static char log_captured[8192];

static inline void log_capture_begin(void)
{
    log_capture_fd = memfd_create("log", MFD_CLOEXEC);
    log_capture_saved = dup(2);
    if (log_capture_fd < 0 || log_capture_saved < 0 || dup2(log_capture_fd, 2) < 0)
        abort();
}

/* Returns the text; it is valid until the next capture. */
static inline const char *log_capture_end(void)
{
    ssize_t n = pread(log_capture_fd, log_captured, sizeof(log_captured) - 1, 0);
    log_captured[n > 0 ? n : 0] = 0;
    if (dup2(log_capture_saved, 2) < 0)
        abort();
    close(log_capture_saved);
    close(log_capture_fd);
    return log_captured;
}

/* Lines in the text. */
static inline unsigned log_capture_lines(const char *text)
{
    unsigned lines = 0;
    for (; (text = strchr(text, '\n')); text++)
        lines++;
    return lines;
}

#endif
