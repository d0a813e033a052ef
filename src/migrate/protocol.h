/*
 * What both sides of a migration share: the first frame of each connection, and small helpers.
 */
#ifndef RINGFORT_MIGRATE_PROTOCOL_H
#define RINGFORT_MIGRATE_PROTOCOL_H

#include <stdbool.h>
#include <stdint.h>

#include "migrate/frame.h"
#include "migrate/migrate.h"

#define HELLO_SIZE 64u
#define SESSION_SIZE 16u

/* What a connection is for. */
enum hello_kind {
    HELLO_CONTROL,      /* a migration begins */
    HELLO_STREAM,       /* its pages, index 0…15 */
    HELLO_URGENT,       /* post-copy: pages that the guest waits for */
    HELLO_QUERY,        /* who owns the machine? The answer is STATUS */
    HELLO_RECOVER,      /* post-copy goes on after the link broke: a new control connection */
    HELLO_KINDS
};

/*
 * Layout: 16 bytes "ringfort migrate", u32 oldest and newest version that the sender speaks, u32 kind, u32 index, session. The
 * target answers with the same, where both versions are the one that it chose.
 */
struct hello {
    uint32_t oldest, newest, kind, index;
    uint8_t session[SESSION_SIZE];      /* random, from the source: what belongs together */
};

void hello_put(const struct hello *h, uint8_t out[HELLO_SIZE]);
/* -EPROTO with error when it is none, or of a version that this program does not speak. */
int hello_get(const struct frame *f, struct hello *h, char error[CHANNEL_ERROR_MAX]);

/* Answers to HELLO_QUERY. */
enum owner { OWNER_SOURCE = 1, OWNER_TARGET };

uint64_t migrate_now_ms(void);

/* MISSING frames, in either direction: the bits of all regions, in as many frames as they need. */
int missing_send(struct channel *c, const struct memory *m, uint64_t *const bitmap[]);
/* Adds one frame's bits. -EPROTO with error. */
int missing_take(const struct frame *f, const struct memory *m, uint64_t *const bitmap[], char error[CHANNEL_ERROR_MAX]);

#endif
