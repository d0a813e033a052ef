/*
 * Frames on a channel; see frame.h.
 */
#include "migrate/frame.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/util.h"
#include "migrate/disks.h"
#include "migrate/pages.h"

#define MAGIC 0x314d4652u       /* "RFM1" */
#define TEXT_LIMIT 1024u
#define JSON_LIMIT MIB(1)
#define STATE_LIMIT MIB(256)

static const struct {
    const char *name;
    uint32_t limit;
} types[FRAME_TYPES] = {
    [FRAME_HELLO] = { "hello", 256 },
    [FRAME_REFUSE] = { "refuse", TEXT_LIMIT },
    [FRAME_OFFER] = { "offer", JSON_LIMIT },
    [FRAME_READY] = { "ready", JSON_LIMIT },
    [FRAME_PROGRESS] = { "progress", JSON_LIMIT },
    [FRAME_PAGES] = { "pages", PAGES_MAX_PAYLOAD },
    [FRAME_FENCE] = { "fence", 8 },
    [FRAME_MISSING] = { "missing", MIB(32) },
    [FRAME_STATE] = { "state", STATE_LIMIT },
    [FRAME_PREPARED] = { "prepared", 8 },
    [FRAME_COMMIT] = { "commit", 8 },
    [FRAME_RUNNING] = { "running", 8 },
    [FRAME_REQUEST] = { "request", 16 },
    [FRAME_COMPLETE] = { "complete", 8 },
    [FRAME_STATUS] = { "status", 8 },
    [FRAME_DISK] = { "disk", DISK_MAX_PAYLOAD },
};

uint32_t frame_limit(unsigned type) { return type < FRAME_TYPES ? types[type].limit : 0; }
const char *frame_name(unsigned type) { return type < FRAME_TYPES && types[type].name ? types[type].name : "unknown"; }

static void put_header(uint8_t header[FRAME_HEADER_SIZE], unsigned type, unsigned flags, const void *data, uint32_t length)
{
    store_le32(header, MAGIC);
    store_le16(header + 4, (uint16_t)type);
    store_le16(header + 6, (uint16_t)flags);
    store_le32(header + 8, length);
    store_le32(header + 12, 0);
    store_le64(header + 16, XXH3_64bits(data, length));
}

int frame_send(struct channel *c, unsigned type, unsigned flags, const void *data, uint32_t length)
{
    uint8_t header[FRAME_HEADER_SIZE];

    put_header(header, type, flags, data, length);
    return channel_send_parts(c, (struct iovec[]){ { header, sizeof(header) }, { (void *)data, length } }, length ? 2 : 1);
}

int frame_send_in_place(struct channel *c, unsigned type, unsigned flags, uint8_t *buffer, uint32_t length)
{
    put_header(buffer, type, flags, buffer + FRAME_HEADER_SIZE, length);
    return channel_send(c, buffer, FRAME_HEADER_SIZE + length);
}

/* Room grows with what arrives, so that a length alone costs nothing. */
static int receive_payload(struct channel *c, struct frame *f, char error[CHANNEL_ERROR_MAX])
{
    uint32_t have = 0;

    while (have < f->length || !f->room) {
        uint32_t part = MIN(f->length - have, (uint32_t)MIB(1));
        int err;

        if (f->room < (size_t)have + part + 1) {
            size_t room = MAX((size_t)have + part + 1, MIN(f->room * 2, (size_t)f->length + 1));
            uint8_t *data = realloc(f->data, room);

            if (!data) {
                snprintf(error, CHANNEL_ERROR_MAX, "out of memory");
                return -ENOMEM;
            }
            f->data = data;
            f->room = room;
        }
        err = channel_recv(c, f->data + have, part);
        if (err) {
            snprintf(error, CHANNEL_ERROR_MAX, "%s", channel_error(c));
            return err;
        }
        have += part;
    }
    f->data[f->length] = 0;
    return 0;
}

int frame_recv(struct channel *c, struct frame *f, char error[CHANNEL_ERROR_MAX])
{
    uint8_t header[FRAME_HEADER_SIZE];
    int err = channel_recv(c, header, sizeof(header));

    if (err) {
        snprintf(error, CHANNEL_ERROR_MAX, "%s", channel_error(c));
        return err;
    }
    if (load_le32(header) != MAGIC) {
        snprintf(error, CHANNEL_ERROR_MAX, "what the other side sends is not a migration of ringfort");
        return -EPROTO;
    }
    f->type = load_le16(header + 4);
    f->flags = load_le16(header + 6);
    f->length = load_le32(header + 8);
    if (!frame_limit(f->type) || load_le32(header + 12) != 0) {
        snprintf(error, CHANNEL_ERROR_MAX, "the stream has a part of unknown type %u: it is damaged, or made by a newer version",
                 f->type);
        return -EPROTO;
    }
    if (f->length > frame_limit(f->type)) {
        snprintf(error, CHANNEL_ERROR_MAX, "the stream is damaged: a part '%s' of %u bytes", frame_name(f->type), f->length);
        return -EPROTO;
    }
    err = receive_payload(c, f, error);
    if (err)
        return err;
    if (XXH3_64bits(f->data, f->length) != load_le64(header + 16)) {
        snprintf(error, CHANNEL_ERROR_MAX, "the stream is damaged: the checksum of a part '%s' is wrong", frame_name(f->type));
        return -EPROTO;
    }
    return 0;
}

void frame_free(struct frame *f)
{
    free(f->data);
    *f = (struct frame){ 0 };
}
