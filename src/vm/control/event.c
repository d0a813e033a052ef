/* The ring of events; event.h says how it is read. */
#include "vm/control/event.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct events {
    pthread_mutex_t lock;
    uint64_t next;
    char *line[EVENTS_KEPT]; /* slot: number modulo; NULL: there was no memory for it */
};

struct events *events_create(void)
{
    struct events *e = calloc(1, sizeof(*e));
    if (e)
        pthread_mutex_init(&e->lock, NULL);
    return e;
}

void events_destroy(struct events *e)
{
    if (!e)
        return;
    for (unsigned i = 0; i < EVENTS_KEPT; i++)
        free(e->line[i]);
    pthread_mutex_destroy(&e->lock);
    free(e);
}

/* The text of one event with its newline, or NULL. */
static char *format(uint64_t seq, const char *what, const json_t *more)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    json_t *o = json_pack("{s:I, s:f, s:s}", "seq", (json_int_t)seq, "time",
                          (double)t.tv_sec + (double)(t.tv_nsec / 1000000) / 1000, "event", what);
    if (o && more)
        json_object_update((json_t *)o, (json_t *)more);
    char *text = o ? json_dumps(o, JSON_COMPACT | JSON_REAL_PRECISION(13)) : NULL, *line = NULL;
    if (text && asprintf(&line, "%s\n", text) < 0)
        line = NULL;
    free(text);
    json_decref(o);
    return line;
}

void events_add(struct events *e, const char *what, json_t *more)
{
    pthread_mutex_lock(&e->lock);
    char **slot = &e->line[e->next % EVENTS_KEPT];
    free(*slot);
    *slot = format(e->next, what, more);
    e->next++;
    pthread_mutex_unlock(&e->lock);
    json_decref(more);
}

uint64_t events_next(struct events *e)
{
    pthread_mutex_lock(&e->lock);
    uint64_t next = e->next;
    pthread_mutex_unlock(&e->lock);
    return next;
}

char *events_line(struct events *e, uint64_t *seq)
{
    char *line = NULL;

    pthread_mutex_lock(&e->lock);
    uint64_t oldest = e->next > EVENTS_KEPT ? e->next - EVENTS_KEPT : 0, at = *seq;
    if (at < oldest) {
        json_t *lost = json_pack("{s:I}", "count", (json_int_t)(oldest - at));
        line = format(oldest - 1, "lost", lost);
        json_decref(lost);
        *seq = oldest;
    } else {
        while (!line && *seq < e->next) {
            const char *text = e->line[*seq % EVENTS_KEPT];
            line = text ? strdup(text) : NULL;
            ++*seq;
        }
    }
    pthread_mutex_unlock(&e->lock);
    return line;
}
