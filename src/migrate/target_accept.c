/*
 * The target's acceptor: whose a new connection is, and the answers to who owns the machine. A thread of its own; the owner is decided
 * here and in target.c under one lock. See target_internal.h.
 */
#include "migrate/target_internal.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/log.h"
#include "base/util.h"

void target_refuse(struct channel *c, const char *reason)
{
    frame_send(c, FRAME_REFUSE, 0, reason, (uint32_t)strlen(reason));
}

static int answer_hello(struct channel *c, const struct hello *h)
{
    struct hello answer = *h;
    uint8_t payload[HELLO_SIZE];

    answer.oldest = answer.newest = MIGRATE_VERSION;
    hello_put(&answer, payload);
    return frame_send(c, FRAME_HELLO, 0, payload, sizeof(payload));
}

/* Lock held. The connection is taken over on 0. */
static int take_stream(struct migrate_target *t, struct channel *c, const struct hello *h)
{
    unsigned index = h->kind == HELLO_URGENT ? TARGET_URGENT : h->index;

    if (!t->memory || !t->streams_wanted || index >= TARGET_STREAMS || (h->kind == HELLO_STREAM && index >= t->streams) || t->stream[index].channel)
        return -EINVAL;
    if (answer_hello(c, h))
        return -EIO;
    if (target_stream_start(t, index, c))
        return -EAGAIN;
    if (h->kind == HELLO_URGENT && t->postcopy)
        postcopy_connect(t->postcopy, c);
    pthread_cond_broadcast(&t->changed);
    return 0;
}

/* The source asks whose the machine is. What is not the target's yet never will be. True: it was told that it is the target's. */
static bool answer_query(struct migrate_target *t, struct channel *c, const struct hello *h)
{
    uint8_t payload[4];

    if (t->owner == TARGET_TAKEN && !atomic_load(&t->activated)) {
        /* Should that fail, the machine is the source's after all: it asks again. */
        target_refuse(c, "it is about to be activated");
        return false;
    }
    if (t->owner != TARGET_TAKEN) {
        t->owner = TARGET_GIVEN_UP;
        target_set_broken(t, "the source goes on with the machine");
        if (t->control)
            channel_abort(t->control);
    }
    store_le32(payload, t->owner == TARGET_TAKEN ? OWNER_TARGET : OWNER_SOURCE);
    return answer_hello(c, h) == 0 && frame_send(c, FRAME_STATUS, 0, payload, 4) == 0 && t->owner == TARGET_TAKEN;
}

/* After the answer to a question: an answer that was sent may have been too late, or got lost, and then the source asks again. */
static void hear_thanks(struct migrate_target *t, struct channel *c)
{
    char error[CHANNEL_ERROR_MAX];
    struct frame f = { 0 };

    channel_set_deadline(c, t->channel_options.connect_ms);
    if (frame_recv(c, &f, error) == 0 && f.type == FRAME_COMPLETE) {
        pthread_mutex_lock(&t->lock);
        /* With memory missing the source comes back, to send it. */
        t->known = !t->postcopy;
        if (t->known && t->control)
            channel_abort(t->control);
        pthread_cond_broadcast(&t->changed);
        pthread_mutex_unlock(&t->lock);
    }
    frame_free(&f);
}

/* Lock held. True: the connection is somebody's now. *asked: it is not, and its answer may be confirmed. */
static bool dispatch(struct migrate_target *t, struct channel *c, const struct hello *h, bool *asked)
{
    bool ours = t->owner != TARGET_NOTHING && memcmp(h->session, t->hello.session, SESSION_SIZE) == 0;

    switch (h->kind) {
    case HELLO_CONTROL:
        if (t->owner != TARGET_NOTHING) {
            target_refuse(c, "another migration is under way here");
            return false;
        }
        if (answer_hello(c, h)) {
            log_warn("a connection for a migration was turned away: %s", channel_error(c));
            return false;
        }
        t->hello = *h;
        t->owner = TARGET_RECEIVING;
        t->next = c;
        pthread_cond_broadcast(&t->changed);
        return true;
    case HELLO_STREAM:
    case HELLO_URGENT:
        if (ours && take_stream(t, c, h) == 0)
            return true;
        target_refuse(c, "this connection belongs to no migration that is under way here");
        return false;
    case HELLO_QUERY:
        if (ours)
            *asked = answer_query(t, c, h);
        else
            target_refuse(c, "the machine is not known here");
        return false;
    default: /* HELLO_RECOVER */
        if (!ours || t->owner != TARGET_TAKEN || !t->postcopy) {
            target_refuse(c, "the machine does not wait for memory here");
            return false;
        }
        if (answer_hello(c, h))
            return false;
        /* One that nobody has looked at yet is of a link that broke again. */
        channel_close(t->next);
        t->next = c;
        target_set_broken(t, "the source connected anew");
        if (t->control)
            channel_abort(t->control);
        return true;
    }
}

static void greet(struct migrate_target *t, struct channel *c)
{
    char error[CHANNEL_ERROR_MAX];
    struct frame f = { 0 };
    struct hello h;
    bool kept = false, asked = false;
    int err;

    /* One after the other: a slow stranger must not keep the source waiting for long. */
    channel_set_deadline(c, t->channel_options.connect_ms);
    err = channel_handshake(c);
    if (err)
        snprintf(error, sizeof(error), "%s", channel_error(c));
    else
        err = frame_recv(c, &f, error);
    if (!err) {
        err = hello_get(&f, &h, error);
        if (err)
            target_refuse(c, error);
    }
    channel_set_deadline(c, 0);
    frame_free(&f);
    if (err) {
        log_warn("a connection for a migration was turned away: %s", error);
    } else {
        pthread_mutex_lock(&t->lock);
        kept = dispatch(t, c, &h, &asked);
        pthread_mutex_unlock(&t->lock);
    }
    if (asked)
        hear_thanks(t, c);
    if (!kept)
        channel_close(c);
}

void *target_acceptor_main(void *opaque)
{
    struct migrate_target *t = opaque;
    char error[CHANNEL_ERROR_MAX];
    struct channel *c;
    int err;

    for (;;) {
        err = channel_accept(t->listener, &t->channel_options, -1, &c, error);
        if (err == -ECANCELED)
            return NULL;
        if (err) {
            log_warn("migration: %s", error);
            nanosleep(&(struct timespec){ .tv_nsec = 100000000 }, NULL);
            continue;
        }
        greet(t, c);
    }
}
