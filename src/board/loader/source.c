/* Files that go into guest memory: opening, reading, complaining. See source.h. */
#include "board/loader/source.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"

int source_error(const struct source *s, const char *fmt, ...)
{
    char text[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    log_error("%s %s: %s", s->what, s->path, text);
    return -EINVAL;
}

int source_open(struct source *s, const char *what, const char *path)
{
    *s = (struct source){.what = what, .path = path, .fd = -1};
    /* Non-blocking: opening a FIFO must not wait for its writer. */
    s->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (s->fd < 0) {
        int err = errno;
        source_error(s, "cannot open: %s", strerror(err));
        return -err;
    }
    struct stat st;
    int err = 0;
    if (fstat(s->fd, &st) < 0) {
        err = -errno;
        source_error(s, "cannot stat: %s", strerror(-err));
    } else if (!S_ISREG(st.st_mode)) {
        err = source_error(s, "is not a regular file");
    } else if (st.st_size == 0) {
        err = source_error(s, "is empty");
    }
    if (err) {
        source_close(s);
        return err;
    }
    s->size = (uint64_t)st.st_size;
    return 0;
}

void source_close(struct source *s)
{
    if (s->fd >= 0)
        close(s->fd);
    s->fd = -1;
}

int source_read(const struct source *s, void *buf)
{
    uint64_t done = 0;
    while (done < s->size) {
        ssize_t n = pread(s->fd, (char *)buf + done, s->size - done, (off_t)done);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            source_error(s, "cannot read at offset %llu: %s", (unsigned long long)done,
                         strerror(errno));
            return -EIO;
        }
        if (n == 0)
            return source_error(s, "became shorter while it was read");
        done += (uint64_t)n;
    }
    return 0;
}
