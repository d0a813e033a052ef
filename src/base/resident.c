/* Resident memory beyond guest RAM. See resident.h. */
#include "base/resident.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/util.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    uint64_t own_shared;
    uint64_t peak;
    uint64_t peak_guest; /* most guest RAM of any sample */
} figures;

/* A line "Name:   123 kB", in bytes. */
static uint64_t field(const char *text, const char *name)
{
    const char *p = strstr(text, name);
    return p ? strtoull(p + strlen(name), NULL, 10) * 1024 : 0;
}

static bool read_status(char *text, size_t size)
{
    int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, size - 1);
    close(fd);
    text[MAX(n, 0)] = 0;
    return n > 0;
}

bool resident_read(struct resident *out)
{
    char text[4096];
    pthread_mutex_lock(&lock);
    bool known = read_status(text, sizeof(text));
    if (known) {
        uint64_t shared = field(text, "\nRssShmem:"), own = MIN(figures.own_shared, shared);
        *out = (struct resident){
            .shared = shared - own,
            .own = field(text, "\nRssAnon:") + field(text, "\nRssFile:") + own,
        };
    }
    pthread_mutex_unlock(&lock);
    return known;
}

bool resident_note(void)
{
    char text[4096];
    pthread_mutex_lock(&lock);
    bool known = read_status(text, sizeof(text));
    if (known) {
        uint64_t shared = field(text, "\nRssShmem:"), own = MIN(figures.own_shared, shared);
        uint64_t mark = field(text, "\nVmHWM:");
        uint64_t now = field(text, "\nRssAnon:") + field(text, "\nRssFile:") + own;
        figures.peak_guest = MAX(figures.peak_guest, shared - own);
        if (mark > figures.peak_guest)
            now = MAX(now, mark - figures.peak_guest);
        figures.peak = MAX(figures.peak, now);
    }
    pthread_mutex_unlock(&lock);
    return known;
}

void resident_add_shared(size_t bytes)
{
    pthread_mutex_lock(&lock);
    figures.own_shared += bytes;
    pthread_mutex_unlock(&lock);
}

void resident_remove_shared(size_t bytes)
{
    pthread_mutex_lock(&lock);
    figures.own_shared -= MIN(figures.own_shared, bytes);
    pthread_mutex_unlock(&lock);
}

uint64_t resident_peak(void)
{
    pthread_mutex_lock(&lock);
    uint64_t peak = figures.peak;
    pthread_mutex_unlock(&lock);
    return peak;
}
