/*
 * The source's connections that carry pages, one thread each.
 *
 * Pages are dealt out by 64, a word of the bitmap: a page always goes the same way, so that what is sent of it first arrives
 * first, and the hash of what was sent last has one writer. At the end of a round each stream sends a fence and waits for
 * it to come back: then all before it is in the target's memory.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/util.h"
#include "migrate/source_internal.h"

static int flush(struct source_stream *t)
{
    unsigned flags;
    uint32_t length;
    uint8_t *buffer = page_encoder_take(t->encoder, &length, &flags);

    if (!length)
        return 0;
    limit_take(&t->source->limit, length + FRAME_HEADER_SIZE, &t->source->stop);
    return frame_send_in_place(t->channel, FRAME_PAGES, flags, buffer, length);
}

static int fence(struct source_stream *t, uint64_t number, char reason[CHANNEL_ERROR_MAX])
{
    struct frame f = { 0 };
    uint8_t payload[8];
    int err;

    store_le64(payload, number);
    err = frame_send(t->channel, FRAME_FENCE, 0, payload, 8);
    if (err)
        snprintf(reason, CHANNEL_ERROR_MAX, "%s", channel_error(t->channel));
    else
        err = frame_recv(t->channel, &f, reason);
    if (!err && (f.type != FRAME_FENCE || f.length != 8 || load_le64(f.data) != number)) {
        snprintf(reason, CHANNEL_ERROR_MAX, "the target answers something else than was asked");
        err = -EPROTO;
    }
    frame_free(&f);
    return err;
}

static int send_granule(struct source_stream *t, unsigned disk, uint64_t granule, char reason[CHANNEL_ERROR_MAX])
{
    struct migrate_source *s = t->source;
    uint32_t length;
    unsigned flags;
    int err;
    uint8_t *buffer = disk_encoder_put(t->disk_encoder, disk, granule, s->fresh, &length, &flags, &err);

    if (err)
        snprintf(reason, CHANNEL_ERROR_MAX, "a disk cannot be read: %s", strerror(-err));
    if (err || !length)
        return err;
    atomic_fetch_add_explicit(&s->disk_bytes, length, memory_order_relaxed);
    limit_take(&s->limit, length + FRAME_HEADER_SIZE, &s->stop);
    return frame_send_in_place(t->channel, FRAME_DISK, flags, buffer, length);
}

/* This stream's part of the disks. */
static int send_disks(struct source_stream *t, char reason[CHANNEL_ERROR_MAX])
{
    struct migrate_source *s = t->source;
    const struct migrate_disks *d = s->opt->disks;
    int err = 0;

    for (unsigned i = 0; i < d->count && !err; i++)
        for (size_t w = t->index; w < disk_bitmap_words(d->size[i]) && !err; w += s->streams)
            for (uint64_t bits = __atomic_exchange_n(&s->disk_todo[i][w], 0, __ATOMIC_ACQ_REL); bits && !err; bits &= bits - 1) {
                err = send_granule(t, i, w * 64 + (uint64_t)__builtin_ctzll(bits), reason);
                atomic_fetch_add_explicit(&s->handled, DISK_PAGES, memory_order_relaxed);
                if (!err && atomic_load(&s->stop))
                    err = -ECANCELED;
            }
    return err;
}

/* This stream's part of the round. */
static int send_round(struct source_stream *t, uint64_t number, char reason[CHANNEL_ERROR_MAX])
{
    struct migrate_source *s = t->source;
    unsigned region = 0;
    size_t w = t->index;
    int err = 0;

    while (!s->only_disks && region < s->memory->regions && !err) {
        uint64_t bits, handled = 0;

        if (w >= memory_bitmap_words(&s->memory->region[region])) {
            /* A frame has pages of one region. */
            err = flush(t);
            region++;
            w = t->index;
            continue;
        }
        bits = __atomic_load_n(&s->todo[region][w], __ATOMIC_RELAXED) ? __atomic_exchange_n(&s->todo[region][w], 0, __ATOMIC_ACQ_REL) : 0;
        for (; bits && !err; bits &= bits - 1, handled++)
            if (page_encoder_add(t->encoder, region, w * 64 + (uint64_t)__builtin_ctzll(bits)))
                err = flush(t);
        if (handled)
            atomic_fetch_add_explicit(&s->handled, handled, memory_order_relaxed);
        if (atomic_load(&s->stop))
            err = err ? err : -ECANCELED;
        w += s->streams;
    }
    if (!err && t->disk_encoder)
        err = send_disks(t, reason);
    if (err) {
        if (!reason[0])
            snprintf(reason, CHANNEL_ERROR_MAX, "%s", channel_error(t->channel));
        return err;
    }
    return fence(t, number, reason);
}

static void *stream_main(void *opaque)
{
    struct source_stream *t = opaque;
    struct migrate_source *s = t->source;
    uint64_t done = 0;

    pthread_mutex_lock(&s->lock);
    for (;;) {
        char reason[CHANNEL_ERROR_MAX] = "";
        int err;

        while (s->round == done && !s->streams_end)
            pthread_cond_wait(&s->changed, &s->lock);
        if (s->streams_end)
            break;
        done = s->round;
        pthread_mutex_unlock(&s->lock);
        err = send_round(t, done, reason);
        pthread_mutex_lock(&s->lock);
        if (err && !s->broken) {
            s->broken = true;
            snprintf(s->broken_reason, sizeof(s->broken_reason), "%s", reason);
        }
        s->working--;
        pthread_cond_broadcast(&s->changed);
        if (err)
            break;
    }
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

int source_connect(struct migrate_source *s, unsigned kind, unsigned index, struct channel **out, char reason[CHANNEL_ERROR_MAX])
{
    struct hello hello = s->hello, answer;
    struct frame f = { 0 };
    uint8_t payload[HELLO_SIZE];
    struct channel *c = channel_connect(s->opt->to, &s->channel_options, reason);
    int err;

    *out = NULL;
    if (!c)
        return -ECONNREFUSED;
    hello.kind = kind;
    hello.index = index;
    hello_put(&hello, payload);
    err = frame_send(c, FRAME_HELLO, 0, payload, sizeof(payload));
    if (err)
        snprintf(reason, CHANNEL_ERROR_MAX, "%s", channel_error(c));
    else
        err = frame_recv(c, &f, reason);
    if (err == -ECONNRESET && !s->opt->tls_dir)
        snprintf(reason, CHANNEL_ERROR_MAX, "the target closed the connection at once: does it want TLS?");
    if (!err && f.type == FRAME_REFUSE) {
        snprintf(reason, CHANNEL_ERROR_MAX, "the target refuses: %.480s", (const char *)f.data);
        err = -EACCES;
    } else if (!err) {
        err = hello_get(&f, &answer, reason);
    }
    frame_free(&f);
    if (err) {
        channel_close(c);
        return err;
    }
    *out = c;
    return 0;
}

int source_streams_open(struct migrate_source *s)
{
    s->streams_end = s->broken = false;
    s->working = 0;
    atomic_store(&s->stop, atomic_load(&s->cancelled));
    s->streams = s->opt->streams;
    for (unsigned i = 0; i < s->streams; i++) {
        struct source_stream *t = &s->stream[i];
        int err;

        t->source = s;
        t->index = i;
        t->encoder = page_encoder_create(s->memory, s->hashes.region[0] ? &s->hashes : NULL, s->opt->compress);
        if (s->opt->disks)
            t->disk_encoder = disk_encoder_create(s->opt->disks, s->opt->compress);
        err = t->encoder && (t->disk_encoder || !s->opt->disks) ? source_connect(s, HELLO_STREAM, i, &t->channel, s->reason) : -ENOMEM;
        if (!err)
            err = -pthread_create(&t->thread, NULL, stream_main, t);
        if (err) {
            if (!s->reason[0])
                snprintf(s->reason, sizeof(s->reason), "%s", strerror(-err));
            return err;
        }
        t->started = true;
    }
    return 0;
}

void source_streams_begin(struct migrate_source *s)
{
    pthread_mutex_lock(&s->lock);
    atomic_store(&s->handled, 0);
    s->working = s->streams;
    s->round++;
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

int source_streams_wait(struct migrate_source *s, unsigned ms)
{
    struct timespec until;
    int ret = 0;

    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += (long)(ms % 1000) * 1000000;
    until.tv_sec += ms / 1000 + until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_mutex_lock(&s->lock);
    while (s->working && !s->broken && ret == 0)
        ret = pthread_cond_timedwait(&s->changed, &s->lock, &until);
    ret = s->broken ? -EIO : s->working ? 0 : 1;
    if (s->broken)
        snprintf(s->reason, sizeof(s->reason), "%s", s->broken_reason);
    pthread_mutex_unlock(&s->lock);
    return ret;
}

int source_streams_forget(struct migrate_source *s)
{
    page_hashes_destroy(&s->hashes);
    for (unsigned i = 0; i < s->streams; i++) {
        struct page_encoder *e = page_encoder_create(s->memory, NULL, s->opt->compress);

        if (!e)
            return -ENOMEM;
        s->result->pages_sent += page_encoder_counts(s->stream[i].encoder)->raw;
        s->result->pages_zero += page_encoder_counts(s->stream[i].encoder)->zero;
        s->result->pages_skipped += page_encoder_counts(s->stream[i].encoder)->skipped;
        page_encoder_free(s->stream[i].encoder);
        s->stream[i].encoder = e;
    }
    return 0;
}

/* ---- post-copy ---- */

static int serve(struct migrate_source *s, struct page_encoder *e, const struct frame *f, char reason[CHANNEL_ERROR_MAX])
{
    uint64_t region, page;
    unsigned flags;
    uint32_t length;
    uint8_t *buffer;
    int err;

    if (f->type != FRAME_REQUEST || f->length != 16)
        goto damaged;
    region = load_le64(f->data);
    page = load_le64(f->data + 8);
    if (region >= s->memory->regions || page >= s->memory->region[region].size >> GUEST_PAGE_SHIFT)
        goto damaged;
    /* Whether it is on its way already does not matter: the guest waits, and the target keeps the first. */
    __atomic_fetch_and(&s->todo[region][page / 64], ~(1ull << (page % 64)), __ATOMIC_ACQ_REL);
    atomic_fetch_add(&s->requested, 1);
    page_encoder_add(e, (unsigned)region, page);
    buffer = page_encoder_take(e, &length, &flags);
    err = frame_send_in_place(s->urgent, FRAME_PAGES, flags, buffer, length);
    if (err)
        snprintf(reason, CHANNEL_ERROR_MAX, "%s", channel_error(s->urgent));
    return err;
damaged:
    snprintf(reason, CHANNEL_ERROR_MAX, "the target asks for a page that cannot be");
    return -EPROTO;
}

static void *urgent_main(void *opaque)
{
    struct migrate_source *s = opaque;
    struct page_encoder *e = page_encoder_create(s->memory, NULL, false);
    char reason[CHANNEL_ERROR_MAX] = "out of memory";
    struct frame f = { 0 };
    int err = e ? 0 : -ENOMEM;

    while (!err) {
        /* Silence is usual here: whether the target lives the control connection tells. */
        err = channel_wait(s->urgent, -1);
        if (err < 0)
            snprintf(reason, sizeof(reason), "%s", channel_error(s->urgent));
        else
            err = frame_recv(s->urgent, &f, reason);
        if (!err)
            err = serve(s, e, &f, reason);
    }
    frame_free(&f);
    page_encoder_free(e);
    pthread_mutex_lock(&s->lock);
    if (!s->broken && !s->streams_end) {
        s->broken = true;
        snprintf(s->broken_reason, sizeof(s->broken_reason), "%s", reason);
    }
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

int source_urgent_open(struct migrate_source *s)
{
    int err = source_connect(s, HELLO_URGENT, 0, &s->urgent, s->reason);

    if (err)
        return err;
    err = -pthread_create(&s->urgent_thread, NULL, urgent_main, s);
    if (err) {
        snprintf(s->reason, sizeof(s->reason), "%s", strerror(-err));
        channel_close(s->urgent);
        s->urgent = NULL;
        return err;
    }
    s->urgent_started = true;
    return 0;
}

/* ---- end ---- */

void source_streams_close(struct migrate_source *s)
{
    pthread_mutex_lock(&s->lock);
    s->streams_end = true;
    atomic_store(&s->stop, true);
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    for (unsigned i = 0; i < MIGRATE_MAX_STREAMS; i++) {
        struct source_stream *t = &s->stream[i];

        if (t->channel)
            channel_abort(t->channel);
        if (t->started)
            pthread_join(t->thread, NULL);
        if (t->encoder && s->result) {
            s->result->pages_sent += page_encoder_counts(t->encoder)->raw;
            s->result->pages_zero += page_encoder_counts(t->encoder)->zero;
            s->result->pages_skipped += page_encoder_counts(t->encoder)->skipped;
        }
        if (t->channel)
            s->closed_bytes += channel_bytes(t->channel);
        channel_close(t->channel);
        page_encoder_free(t->encoder);
        disk_encoder_free(t->disk_encoder);
        *t = (struct source_stream){ 0 };
    }
    if (s->urgent) {
        channel_abort(s->urgent);
        if (s->urgent_started)
            pthread_join(s->urgent_thread, NULL);
        s->closed_bytes += channel_bytes(s->urgent);
        channel_close(s->urgent);
        s->urgent = NULL;
        s->urgent_started = false;
    }
}

uint64_t source_bytes(struct migrate_source *s)
{
    uint64_t n = s->closed_bytes;

    for (unsigned i = 0; i < s->streams; i++)
        if (s->stream[i].channel)
            n += channel_bytes(s->stream[i].channel);
    if (s->urgent)
        n += channel_bytes(s->urgent);
    if (s->control)
        n += channel_bytes(s->control);
    return n;
}
