/*
 * The saved-state format: writer and reader of a tree of named sections and fields.
 *
 * The writer collects into one growing buffer and remembers the first error. The reader never
 * allocates and never trusts: each item is parsed within the bounds of what encloses it. One thread
 * at a time.
 */
#include "base/state.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/util.h"

#define MAX_NAME  63
#define MAX_DEPTH 16

struct state_writer {
    uint8_t *data;
    size_t len, capacity;
    int error;
    unsigned depth;
    size_t length_at[MAX_DEPTH]; /* where each open section's length field is */
};

struct state_writer *state_writer_create(void)
{
    return calloc(1, sizeof(struct state_writer));
}

void state_writer_free(struct state_writer *w)
{
    if (!w)
        return;
    free(w->data);
    free(w);
}

/* Room for n more bytes, or NULL after an error, now or before. */
static uint8_t *extend(struct state_writer *w, size_t n)
{
    if (w->error)
        return NULL;
    if (n > w->capacity - w->len) {
        size_t capacity = w->capacity ? w->capacity : 4096;
        while (capacity - w->len < n) {
            if (capacity > SIZE_MAX / 2) {
                w->error = -ENOMEM;
                return NULL;
            }
            capacity *= 2;
        }
        uint8_t *data = realloc(w->data, capacity);
        if (!data) {
            w->error = -ENOMEM;
            return NULL;
        }
        w->data = data;
        w->capacity = capacity;
    }
    uint8_t *p = w->data + w->len;
    w->len += n;
    return p;
}

/* The head of an item: its tag and name, then extra bytes, to which a pointer is returned. */
static uint8_t *put_head(struct state_writer *w, char tag, const char *name, size_t extra)
{
    size_t n = strlen(name);
    if (n == 0 || n > MAX_NAME) {
        w->error = w->error ? w->error : -EINVAL;
        return NULL;
    }
    uint8_t *p = extend(w, 2 + n + extra);
    if (!p)
        return NULL;
    p[0] = (uint8_t)tag;
    p[1] = (uint8_t)n;
    memcpy(p + 2, name, n);
    return p + 2 + n;
}

void state_begin(struct state_writer *w, const char *section, uint32_t version)
{
    if (w->depth == MAX_DEPTH)
        w->error = w->error ? w->error : -EINVAL;
    uint8_t *p = put_head(w, 'S', section, 8);
    if (!p)
        return;
    store_le32(p, version);
    store_le32(p + 4, 0);
    w->length_at[w->depth++] = (size_t)(p + 4 - w->data);
}

void state_end(struct state_writer *w)
{
    if (w->error)
        return;
    if (w->depth == 0) {
        w->error = -EINVAL;
        return;
    }
    size_t at = w->length_at[--w->depth];
    size_t body = w->len - at - 4;
    if (body > UINT32_MAX) {
        w->error = -EINVAL;
        return;
    }
    store_le32(w->data + at, (uint32_t)body);
}

void state_put_bytes(struct state_writer *w, const char *name, const void *data, size_t len)
{
    if (len > UINT32_MAX) {
        w->error = w->error ? w->error : -EINVAL;
        return;
    }
    uint8_t *p = put_head(w, 'F', name, 4 + len);
    if (!p)
        return;
    store_le32(p, (uint32_t)len);
    if (len)
        memcpy(p + 4, data, len);
}

void state_put_u64(struct state_writer *w, const char *name, uint64_t v)
{
    uint8_t bytes[8];
    store_le64(bytes, v);
    state_put_bytes(w, name, bytes, sizeof(bytes));
}

int state_writer_finish(struct state_writer *w, const void **data, size_t *len)
{
    if (!w->error && w->depth)
        w->error = -EINVAL;
    if (w->error)
        return w->error;
    *data = w->data;
    *len = w->len;
    return 0;
}

/* Reading. */

struct item {
    char tag;
    const uint8_t *name;
    size_t name_len;
    uint32_t version;
    const uint8_t *body;
    size_t body_len;
};

void state_reader_init(struct state_reader *r, const void *data, size_t len)
{
    *r = (struct state_reader){.data = data, .len = len, .path = "state"};
}

static int malformed(const struct state_reader *r, const char *what)
{
    log_error("saved state, section %s: %s; the file is damaged or was not made by ringfort",
              r->path, what);
    return -EINVAL;
}

/* 1: *it is the item at *cursor, which moves past it; 0: end; -EINVAL. */
static int next_item(const struct state_reader *r, size_t *cursor, struct item *it)
{
    if (*cursor >= r->len)
        return 0;
    const uint8_t *p = r->data + *cursor;
    size_t left = r->len - *cursor;
    if (left < 2)
        return malformed(r, "ends within an item");
    it->tag = (char)p[0];
    it->name_len = p[1];
    if (it->tag != 'S' && it->tag != 'F')
        return malformed(r, "an item of unknown kind");
    if (it->name_len == 0 || it->name_len > MAX_NAME)
        return malformed(r, "an item's name has a bad length");
    size_t head = 2 + it->name_len + (it->tag == 'S' ? 8 : 4);
    if (left < head)
        return malformed(r, "ends within an item");
    it->name = p + 2;
    if (memchr(it->name, 0, it->name_len))
        return malformed(r, "an item's name has a bad character");
    it->version = it->tag == 'S' ? load_le32(p + head - 8) : 0;
    it->body = p + head;
    it->body_len = load_le32(p + head - 4);
    if (it->body_len > left - head)
        return malformed(r, "an item is longer than what holds it");
    *cursor += head + it->body_len;
    return 1;
}

static int find(const struct state_reader *r, char tag, const char *name, struct item *it)
{
    size_t cursor = 0, n = strlen(name);
    int ret;
    while ((ret = next_item(r, &cursor, it)) > 0)
        if (it->tag == tag && it->name_len == n && memcmp(it->name, name, n) == 0)
            return 0;
    return ret ? ret : -ENOENT;
}

int state_open(const struct state_reader *r, const char *section, struct state_reader *out)
{
    struct item it;
    int ret = find(r, 'S', section, &it);
    if (ret == 0)
        *out = (struct state_reader){
            .data = it.body, .len = it.body_len, .version = it.version, .path = section};
    return ret;
}

int state_next(const struct state_reader *r, size_t *cursor, char name[64],
               struct state_reader *out)
{
    struct item it;
    int ret;
    while ((ret = next_item(r, cursor, &it)) > 0) {
        if (it.tag != 'S')
            continue;
        memcpy(name, it.name, it.name_len);
        name[it.name_len] = 0;
        *out = (struct state_reader){
            .data = it.body, .len = it.body_len, .version = it.version, .path = name};
        return 1;
    }
    return ret;
}

int state_get_blob(const struct state_reader *r, const char *name, const void **out, size_t *len)
{
    struct item it;
    int ret = find(r, 'F', name, &it);
    if (ret == 0) {
        *out = it.body;
        *len = it.body_len;
    }
    return ret;
}

int state_get_bytes(const struct state_reader *r, const char *name, void *out, size_t len)
{
    const void *p;
    size_t n;
    int ret = state_get_blob(r, name, &p, &n);
    if (ret)
        return ret;
    if (n != len) {
        log_error("saved state, section %s: field %s has %zu bytes instead of %zu", r->path, name,
                  n, len);
        return -EINVAL;
    }
    if (len)
        memcpy(out, p, len);
    return 0;
}

int state_get_u64(const struct state_reader *r, const char *name, uint64_t *out)
{
    const void *p;
    size_t n;
    int ret = state_get_blob(r, name, &p, &n);
    if (ret)
        return ret;
    switch (n) {
    case 1:
        *out = *(const uint8_t *)p;
        return 0;
    case 2:
        *out = load_le16(p);
        return 0;
    case 4:
        *out = load_le32(p);
        return 0;
    case 8:
        *out = load_le64(p);
        return 0;
    default:
        log_error("saved state, section %s: field %s has %zu bytes and is no integer", r->path,
                  name, n);
        return -EINVAL;
    }
}
