/*
 * Fuzz target: saved state. Hexadecimal digits are the bytes of a stream, given to the reader in
 * memory of exactly its size; "w" and then letters are calls of the writer, and what it made must
 * read back as what was put in.
 */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/state.h"
#include "base/util.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static volatile unsigned sink;

/* Reads all that can be reached. */
static void walk(const struct state_reader *r, unsigned depth)
{
    struct state_reader s;
    char name[64];
    size_t cursor = 0, len;
    const void *blob;
    uint64_t v;
    int ret;
    while (depth < 20 && (ret = state_next(r, &cursor, name, &s)) > 0) {
        if (s.data < r->data || s.data + s.len > r->data + r->len || strlen(name) > 63 ||
            cursor > r->len)
            abort();
        walk(&s, depth + 1);
        struct state_reader again;
        if (state_open(r, name, &again) != 0)
            abort();
    }
    static const char *const names[] = {"a", "b", "data", "value"};
    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        if (state_get_blob(r, names[i], &blob, &len) == 0)
            for (size_t k = 0; k < len; k++)
                sink += ((const uint8_t *)blob)[k];
        state_get_u64(r, names[i], &v);
        state_get_bytes(r, names[i], &v, sizeof(v));
    }
}

static void read_stream(const uint8_t *data, size_t size)
{
    /* Digits in pairs; anything else is left out. The malloc'ed size is exact, for the address
     * sanitizer. */
    uint8_t *bytes = malloc(size / 2 + 1);
    size_t n = 0;
    int high = -1;
    for (size_t i = 0; i < size; i++) {
        static const char digits[] = "0123456789abcdef";
        const char *d = data[i] ? strchr(digits, data[i]) : NULL;
        if (!d)
            continue;
        if (high < 0) {
            high = (int)(d - digits);
        } else {
            bytes[n++] = (uint8_t)(high << 4 | (int)(d - digits));
            high = -1;
        }
    }
    uint8_t *exact = malloc(n ? n : 1);
    memcpy(exact, bytes, n);
    struct state_reader r;
    state_reader_init(&r, exact, n);
    walk(&r, 0);
    free(exact);
    free(bytes);
}

/* Each letter is a call: "(" and ")" begin and end a section, others put an integer of that name.
 */
static void write_stream(const uint8_t *data, size_t size)
{
    struct state_writer *w = state_writer_create();
    unsigned depth = 0;
    bool bad = false;
    for (size_t i = 0; i < size; i++) {
        char name[2] = {(char)data[i], 0};
        if (data[i] == '(') {
            bad |= depth++ == 16;
            state_begin(w, "section", (uint32_t)i);
        } else if (data[i] == ')') {
            bad |= depth == 0;
            depth--;
            state_end(w);
        } else {
            bad |= !name[0];
            state_put_u64(w, name, i);
        }
        if (bad)
            break;
    }
    const void *stream;
    size_t len;
    int ret = state_writer_finish(w, &stream, &len);
    if ((ret == 0) != (!bad && depth == 0))
        abort();
    struct state_reader r, s;
    if (ret == 0) {
        state_reader_init(&r, stream, len);
        /* The first integer and the first section of the root. */
        unsigned level = 0;
        bool section_seen = false;
        bool seen[256] = {false};
        for (size_t i = 0; i < size; i++) {
            char name[2] = {(char)data[i], 0};
            uint64_t v;
            if (data[i] == '(' && level++ == 0 && !section_seen) {
                section_seen = true;
                if (state_open(&r, "section", &s) || s.version != (uint32_t)i)
                    abort();
            } else if (data[i] == ')') {
                level--;
            } else if (data[i] != '(' && level == 0 && !seen[data[i]]) {
                seen[data[i]] = true;
                if (state_get_u64(&r, name, &v) || v != i)
                    abort();
            }
        }
    }
    state_writer_free(w);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    log_set_level(-1);
    if (size && data[0] == 'w')
        write_stream(data + 1, size - 1);
    else
        read_stream(data, size);
    return 0;
}
