/*
 * The one format for saved state: a tree of named sections with named, typed fields.
 *
 * The stream describes itself: each field carries its name, type and length, so that a
 * reader finds fields by name, skips what it does not know and uses defaults for
 * what is absent; a section carries the version of its writer. The writer
 * collects into memory; snapshots and migration move that buffer.
 *
 * Layout, little-endian:
 *   section: 'S' u8 namelen, name, u32 version, u32 length of the body; the body: fields and sections
 *   field:   'F' u8 namelen, name, u32 length; the bytes
 * A reader gets a buffer from outside: every length is checked against what encloses it.
 */
#ifndef RINGFORT_BASE_STATE_H
#define RINGFORT_BASE_STATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct state_writer;

/* Out of memory is remembered and reported by state_writer_finish(). */
struct state_writer *state_writer_create(void);
void state_writer_free(struct state_writer *w);
void state_begin(struct state_writer *w, const char *section, uint32_t version);
void state_end(struct state_writer *w);
void state_put_bytes(struct state_writer *w, const char *name, const void *data, size_t len);
void state_put_u64(struct state_writer *w, const char *name, uint64_t v);
/* *data is owned by the writer and lives until it is freed. 0, -ENOMEM, -EINVAL for unbalanced sections. */
int state_writer_finish(struct state_writer *w, const void **data, size_t *len);

/* A view of one section's body; copied freely, borrows the buffer. */
struct state_reader {
    const uint8_t *data;
    size_t len;
    uint32_t version;           /* the section's; 0 at the root */
    const char *path;           /* for messages; borrowed */
};

void state_reader_init(struct state_reader *r, const void *data, size_t len);
/* The first section of that name inside r. 0, -ENOENT (silent), -EINVAL (malformed: logged). */
int state_open(const struct state_reader *r, const char *section, struct state_reader *out);
/* All sections in order: start with *cursor = 0; 1: got one (name copied, at most 63 chars), 0: end, -EINVAL. */
int state_next(const struct state_reader *r, size_t *cursor, char name[64], struct state_reader *out);
/* Exactly len bytes, or -ENOENT, -EINVAL (other length: logged). out unchanged on error. */
int state_get_bytes(const struct state_reader *r, const char *name, void *out, size_t len);
/* Borrow the bytes of a field of any length. */
int state_get_blob(const struct state_reader *r, const char *name, const void **out, size_t *len);
/* An integer of 1, 2, 4 or 8 bytes. */
int state_get_u64(const struct state_reader *r, const char *name, uint64_t *out);

#endif
