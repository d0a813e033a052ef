/*
 * The source in post-copy: the target has the machine, and all that is left of it is sent, through as many connections as that takes. See
 * source_internal.h.
 */
#include "migrate/source_internal.h"

#include <errno.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"

/* Sends what is left in todo until the target has all. */
static int push_rest(struct migrate_source *s)
{
    struct frame f = { 0 };
    char error[CHANNEL_ERROR_MAX];
    uint64_t pages = memory_bitmaps_count(s->memory, s->todo);
    int ret;

    source_streams_begin(s);
    do {
        uint64_t handled = atomic_load(&s->handled);

        s->progress.left_pages = pages > handled ? pages - handled : 0;
        source_report(s);
        ret = source_streams_wait(s, 100);
        if (ret < 0)
            return ret;
        if (source_send_progress(s))
            return -EIO;
        ret = channel_wait(s->control, 0);
    } while (ret == 0);
    if (ret < 0)
        return source_because(s, ret, channel_error(s->control));
    ret = frame_recv(s->control, &f, error);
    if (ret)
        source_because(s, ret, error);
    else if (f.type != FRAME_COMPLETE)
        ret = source_because(s, -EPROTO, "the target answers something else than was asked");
    frame_free(&f);
    return ret;
}

/* A new set of connections for what the target still misses. 1: it misses nothing. -EACCES: it knows nothing of the machine. */
static int recover(struct migrate_source *s)
{
    char error[CHANNEL_ERROR_MAX];
    struct frame f = { 0 };
    struct channel *c;
    int err;

    source_streams_close(s);
    source_control_close(s);
    s->reason[0] = 0;
    err = source_connect(s, HELLO_RECOVER, 0, &c, s->reason);
    if (err)
        return err;
    pthread_mutex_lock(&s->lock);
    s->control = c;
    pthread_mutex_unlock(&s->lock);
    for (unsigned i = 0; i < s->memory->regions; i++)
        memset(s->todo[i], 0, memory_bitmap_words(&s->memory->region[i]) * 8);
    while (!(err = frame_recv(c, &f, error)) && f.type == FRAME_MISSING && !(err = missing_take(&f, s->memory, s->todo, error)))
        ;
    if (err)
        source_because(s, err, error);
    else if (f.type == FRAME_COMPLETE)
        err = 1;
    else if (f.type != FRAME_READY)
        err = source_because(s, -EPROTO, "the target answers something else than was asked");
    frame_free(&f);
    if (!err) {
        err = source_streams_open(s);
        if (!err)
            err = source_urgent_open(s);
        /* Whoever refuses these has not forgotten the machine. */
        if (err == -EACCES)
            err = -EAGAIN;
    }
    return err;
}

enum migrate_stage source_post_copy_rest(struct migrate_source *s)
{
    int err;

    source_set_stage(s, MIGRATE_POST_COPYING);
    err = push_rest(s);
    while (err) {
        log_warn("migration of %s: the connection failed (%s); the target waits for memory that is here: connecting again. If it has died, so has the machine: `ringfort stop --force %s`",
                 s->opt->name, s->reason, s->opt->name);
        do {
            if (atomic_load(&s->cancelled))
                return MIGRATE_LOST;
            source_nap(500);
            err = recover(s);
            /* The target is there and does not know of it any more: it has given the machine up. */
            if (err == -EACCES)
                return MIGRATE_LOST;
            if (err == 1)
                return MIGRATE_DONE;
        } while (err);
        log_warn("migration of %s: connected again", s->opt->name);
        err = push_rest(s);
    }
    return MIGRATE_DONE;
}
