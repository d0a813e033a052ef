/*
 * A file that goes into guest memory: kernel or initrd.
 *
 * Files come from people and networks: only regular files are taken, and what is wrong with one is
 * said in one line that begins with its role and name. One thread.
 */
#ifndef RINGFORT_BOARD_SOURCE_H
#define RINGFORT_BOARD_SOURCE_H

#include <stdint.h>

struct source {
    const char *what; /* "kernel", "initrd": for messages; borrowed */
    const char *path; /* borrowed */
    int fd;           /* -1 for a source that is only a buffer's name */
    uint64_t size;    /* bytes, never 0 after source_open() */
};

/* 0, the errno of opening, -EINVAL for what is not a regular file or empty (logged). */
int source_open(struct source *s, const char *what, const char *path);
void source_close(struct source *s);
/* All size bytes. 0, -EIO, or -EINVAL when the file has become shorter (logged). */
int source_read(const struct source *s, void *buf);
/* Logs "<what> <path>: <text>" and returns -EINVAL. */
int source_error(const struct source *s, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));

#endif
