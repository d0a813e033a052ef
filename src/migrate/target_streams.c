/*
 * The target's connections that carry pages and parts of disks: a thread for each puts them where they belong. See target_internal.h.
 */
#include "migrate/target_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "migrate/disks.h"
#include "migrate/pages.h"

/* Of disks, on one stream, until they are handed to the host's disk. */
#define SYNC_BYTES MIB(32)

static int store_page(void *opaque, unsigned region, uint64_t page, const uint8_t *contents)
{
    struct migrate_target *t = opaque;
    uint8_t *to = t->memory->region[region].host + (page << GUEST_PAGE_SHIFT);

    if (t->postcopy)
        return postcopy_place(t->postcopy, region, page, contents);
    if (contents)
        memcpy(to, contents, GUEST_PAGE_SIZE);
    else
        memset(to, 0, GUEST_PAGE_SIZE);
    return 0;
}

static bool receives(struct migrate_target *t)
{
    bool yes;

    pthread_mutex_lock(&t->lock);
    yes = t->owner == TARGET_RECEIVING;
    pthread_mutex_unlock(&t->lock);
    return yes;
}

/* Now and then, so that little is left when the guest stands still and when somebody waits for the fence. */
static int sync_disks(struct migrate_target *t, struct target_stream *s, char error[CHANNEL_ERROR_MAX])
{
    int err = s->unsynced ? t->ops->disk_sync(t->opaque) : 0;

    s->unsynced = 0;
    if (err)
        snprintf(error, CHANNEL_ERROR_MAX, "a disk cannot be written: %s", strerror(-err));
    return err;
}

static int take_disk(struct migrate_target *t, struct target_stream *s, struct disk_decoder *d, const struct frame *f,
                     char error[CHANNEL_ERROR_MAX])
{
    int err = disk_decoder_take(d, f, t->ops->disk_write, t->opaque, error);

    s->unsynced += f->length;
    return err || s->unsynced < SYNC_BYTES ? err : sync_disks(t, s, error);
}

static int stream_frame(struct migrate_target *t, struct target_stream *s, struct page_decoder *d, struct disk_decoder *disks,
                        const struct frame *f, char error[CHANNEL_ERROR_MAX])
{
    int err;

    if (f->type == FRAME_PAGES) {
        pthread_rwlock_rdlock(&t->placing);
        err = page_decoder_take(d, f, store_page, t, error);
        pthread_rwlock_unlock(&t->placing);
        return err;
    }
    if (f->type == FRAME_DISK && t->ops->disk_write && receives(t))
        return take_disk(t, s, disks, f, error);
    if (f->type == FRAME_FENCE && f->length == 8) {
        err = sync_disks(t, s, error);
        if (err)
            return err;
        err = frame_send(s->channel, FRAME_FENCE, 0, f->data, 8);
        if (err)
            snprintf(error, CHANNEL_ERROR_MAX, "%s", channel_error(s->channel));
        return err;
    }
    snprintf(error, CHANNEL_ERROR_MAX, "the stream is damaged: '%s' where pages should be", frame_name(f->type));
    return -EPROTO;
}

/* A failure of this side, or damage that it saw; not of the link. */
static bool is_ours(int err)
{
    return err == -EPROTO || err == -ENOMEM || err == -ENOSPC || err == -EIO || err == -EFBIG || err == -EDQUOT;
}

static void *stream_main(void *opaque)
{
    struct target_stream *s = opaque;
    struct migrate_target *t = s->target;
    struct page_decoder *d = page_decoder_create(t->memory);
    struct disk_decoder *disks = disk_decoder_create();
    char error[CHANNEL_ERROR_MAX] = "out of memory";
    struct frame f = { 0 };
    int err = d && disks ? 0 : -ENOMEM;

    while (!err) {
        /* Between rounds there is silence; whether the source lives the control connection tells. */
        err = channel_wait(s->channel, -1);
        if (err < 0)
            snprintf(error, sizeof(error), "%s", channel_error(s->channel));
        else
            err = frame_recv(s->channel, &f, error);
        if (!err)
            err = stream_frame(t, s, d, disks, &f, error);
    }
    frame_free(&f);
    page_decoder_free(d);
    disk_decoder_free(disks);
    pthread_mutex_lock(&t->lock);
    /* Once all is here the connections may go. */
    if (t->owner != TARGET_TAKEN || (t->postcopy && postcopy_missing(t->postcopy))) {
        target_set_broken(t, error);
        if (t->control && err != -ECANCELED) {
            /*
             * Whoever reads the control connection is to look. What it was goes to the source first, which goes on with the machine
             * when it hears it: so it is given up before, and once it is the target's the source only sees the connection break.
             */
            if (is_ours(err) && t->owner != TARGET_TAKEN) {
                t->owner = TARGET_GIVEN_UP;
                target_refuse(t->control, error);
            }
            channel_abort(t->control);
        }
    }
    pthread_mutex_unlock(&t->lock);
    return NULL;
}

int target_stream_start(struct migrate_target *t, unsigned index, struct channel *c)
{
    struct target_stream *s = &t->stream[index];

    s->target = t;
    s->channel = c;
    if (pthread_create(&s->thread, NULL, stream_main, s)) {
        s->channel = NULL;
        return -EAGAIN;
    }
    s->started = true;
    return 0;
}

void target_close_connections(struct migrate_target *t)
{
    struct channel *control;

    pthread_mutex_lock(&t->lock);
    t->streams_wanted = false;
    pthread_mutex_unlock(&t->lock);
    if (t->postcopy)
        postcopy_connect(t->postcopy, NULL);
    for (unsigned i = 0; i < TARGET_STREAMS; i++) {
        struct target_stream *s = &t->stream[i];

        pthread_mutex_lock(&t->lock);
        if (s->channel)
            channel_abort(s->channel);
        pthread_mutex_unlock(&t->lock);
        if (!s->started)
            continue;
        pthread_join(s->thread, NULL);
        pthread_mutex_lock(&t->lock);
        t->closed_bytes += channel_bytes(s->channel);
        channel_close(s->channel);
        *s = (struct target_stream){ 0 };
        pthread_mutex_unlock(&t->lock);
    }
    pthread_mutex_lock(&t->lock);
    control = t->control;
    t->control = NULL;
    if (control)
        t->closed_bytes += channel_bytes(control);
    pthread_mutex_unlock(&t->lock);
    channel_close(control);
}
