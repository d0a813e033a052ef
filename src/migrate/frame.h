/*
 * Frames: the unit of everything that crosses a migration's connection.
 *
 *     u32 magic "RFM1"   u16 type   u16 flags   u32 length   u32 0   u64 XXH3-64 of the payload   payload
 *
 * little-endian. The other side is not trusted: magic, type, length and hash are checked before anybody sees the
 * payload; how long a payload may be is the type's (frame_limit()). A frame that fails is the connection's end.
 */
#ifndef RINGFORT_MIGRATE_FRAME_H
#define RINGFORT_MIGRATE_FRAME_H

#include <stddef.h>
#include <stdint.h>

#include "migrate/channel.h"

#define FRAME_HEADER_SIZE 24u

/* docs/migration.md says who sends which when. */
enum frame_type {
    FRAME_HELLO = 1,    /* both ways: struct hello */
    FRAME_REFUSE,       /* both ways: why this migration ends; text */
    FRAME_OFFER,        /* → what machine it is: JSON */
    FRAME_READY,        /* ← the target has room reserved: JSON */
    FRAME_PROGRESS,     /* → once a second, for the target's log and against silence: JSON */
    FRAME_PAGES,        /* → pages; pages.h */
    FRAME_FENCE,        /* both ways: "all before this has arrived" and "it has": u64 number */
    FRAME_MISSING,      /* → post-copy: pages of a region that are still the source's; struct missing and a bitmap */
    FRAME_STATE,        /* → everything but RAM: the saved state */
    FRAME_PREPARED,     /* ← the target could run it, and will not yet */
    FRAME_COMMIT,       /* → the machine is the target's */
    FRAME_RUNNING,      /* ← it runs: u64 milliseconds since the source came */
    FRAME_REQUEST,      /* ← post-copy: a page that the guest waits for; struct request */
    FRAME_COMPLETE,     /* ← post-copy: all pages have arrived */
    FRAME_STATUS,       /* ← answer to a HELLO that asks: u32 enum migrate_outcome */
    FRAME_DISK,         /* → a part of a disk; disks.h */
    FRAME_TYPES
};

#define FRAME_FLAG_ZSTD 1u

/* The longest payload of a type; 0 for no such type. */
uint32_t frame_limit(unsigned type);
const char *frame_name(unsigned type);

struct frame {
    unsigned type, flags;
    uint32_t length;
    /* The payload and one zero byte, so that text is a string; valid until the next receiving into this frame. */
    uint8_t *data;
    size_t room;
};

/* -EPROTO with channel-independent words in error for anything that is no frame; else channel_recv()'s with its words. f: zeroed at first. */
int frame_recv(struct channel *c, struct frame *f, char error[CHANNEL_ERROR_MAX]);
void frame_free(struct frame *f);
/* data: length bytes, which do not change meanwhile. Any thread: a frame is sent as a whole. */
int frame_send(struct channel *c, unsigned type, unsigned flags, const void *data, uint32_t length);
/* For a caller that has room of FRAME_HEADER_SIZE in front of the payload: one write less. */
int frame_send_in_place(struct channel *c, unsigned type, unsigned flags, uint8_t *buffer, uint32_t length);

#endif
