/* Saved state: what is written comes back, and a damaged buffer is refused without reading beyond
 * it. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "base/log.h"
#include "base/state.h"
#include "base/util.h"

static void write_example(struct state_writer *w)
{
    state_put_u64(w, "magic", 0x1122334455667788);
    state_begin(w, "serial0", 3);
    state_put_bytes(w, "lcr", "\x1b", 1);
    state_put_u64(w, "baud", 115200);
    state_begin(w, "fifo", 1);
    state_put_bytes(w, "data", "hello", 5);
    state_put_bytes(w, "empty", NULL, 0);
    state_end(w);
    state_end(w);
    state_begin(w, "rtc0", 7);
    state_end(w);
}

/* The buffer's end is the end of a page, and behind it is nothing. */
struct guarded {
    uint8_t *map;
    size_t map_len, len;
    uint8_t *data;
};

static struct guarded guard(const void *data, size_t len)
{
    struct guarded g = {.len = len, .map_len = align_up(len, 4096) + 4096};
    g.map = mmap(NULL, g.map_len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_ptr_not_equal(g.map, MAP_FAILED);
    assert_int_equal(mprotect(g.map + g.map_len - 4096, 4096, PROT_NONE), 0);
    g.data = g.map + g.map_len - 4096 - len;
    if (len)
        memcpy(g.data, data, len);
    return g;
}

static void what_is_written_comes_back(void **state)
{
    struct state_writer *w = state_writer_create();
    write_example(w);
    const void *data;
    size_t len;
    assert_int_equal(state_writer_finish(w, &data, &len), 0);
    struct guarded g = guard(data, len);
    state_writer_free(w);

    struct state_reader root, s, f;
    state_reader_init(&root, g.data, g.len);
    uint64_t v = 0;
    assert_int_equal(state_get_u64(&root, "magic", &v), 0);
    assert_int_equal(v, 0x1122334455667788);
    assert_int_equal(state_open(&root, "serial0", &s), 0);
    assert_int_equal(s.version, 3);
    assert_int_equal(state_get_u64(&s, "lcr", &v), 0);
    assert_int_equal(v, 0x1b);
    assert_int_equal(state_get_u64(&s, "baud", &v), 0);
    assert_int_equal(v, 115200);
    assert_int_equal(state_open(&s, "fifo", &f), 0);
    char five[5];
    assert_int_equal(state_get_bytes(&f, "data", five, 5), 0);
    assert_memory_equal(five, "hello", 5);
    assert_int_equal(state_get_bytes(&f, "data", five, 4), -EINVAL);
    assert_int_equal(state_get_u64(&f, "data", &v), -EINVAL);
    assert_int_equal(v, 115200); /* unchanged */
    const void *blob;
    assert_int_equal(state_get_blob(&f, "empty", &blob, &len), 0);
    assert_int_equal(len, 0);

    /* Names are those of this section only, and kinds are kept apart. */
    assert_int_equal(state_get_u64(&root, "baud", &v), -ENOENT);
    assert_int_equal(state_get_u64(&root, "serial0", &v), -ENOENT);
    assert_int_equal(state_open(&root, "magic", &f), -ENOENT);
    assert_int_equal(state_open(&root, "fifo", &f), -ENOENT);
    assert_int_equal(state_get_u64(&s, "bau", &v), -ENOENT);

    char name[64];
    size_t cursor = 0;
    assert_int_equal(state_next(&root, &cursor, name, &s), 1);
    assert_string_equal(name, "serial0");
    assert_int_equal(state_next(&root, &cursor, name, &s), 1);
    assert_string_equal(name, "rtc0");
    assert_int_equal(s.version, 7);
    assert_int_equal(s.len, 0);
    assert_int_equal(state_next(&root, &cursor, name, &s), 0);
    munmap(g.map, g.map_len);
}

static void writers_mistakes_are_reported(void **state)
{
    const void *data;
    size_t len;
    char longer[65];
    memset(longer, 'x', 64);
    longer[64] = 0;

    struct state_writer *w = state_writer_create();
    state_begin(w, "open", 1);
    assert_int_equal(state_writer_finish(w, &data, &len), -EINVAL);
    state_writer_free(w);

    w = state_writer_create();
    state_end(w);
    assert_int_equal(state_writer_finish(w, &data, &len), -EINVAL);
    state_writer_free(w);

    w = state_writer_create();
    state_put_u64(w, longer, 1);
    assert_int_equal(state_writer_finish(w, &data, &len), -EINVAL);
    state_writer_free(w);

    w = state_writer_create();
    for (int i = 0; i < 100; i++)
        state_begin(w, "deep", 1);
    for (int i = 0; i < 100; i++)
        state_end(w);
    assert_int_equal(state_writer_finish(w, &data, &len), -EINVAL);
    state_writer_free(w);
}

/* Reads everything that can be reached; the count keeps it from being optimized away. */
static unsigned walk(const struct state_reader *r, unsigned depth)
{
    unsigned n = 0;
    struct state_reader s;
    char name[64];
    size_t cursor = 0, len;
    const void *blob;
    uint64_t v;
    while (depth < 8 && state_next(r, &cursor, name, &s) == 1)
        n += 1 + walk(&s, depth + 1);
    if (state_get_blob(r, "data", &blob, &len) == 0)
        for (size_t i = 0; i < len; i++)
            n += ((const uint8_t *)blob)[i];
    n += state_get_u64(r, "baud", &v) == 0;
    n += state_open(r, "no such section", &s) == 0;
    return n;
}

static void every_truncation_and_every_flip_is_survived(void **state)
{
    struct state_writer *w = state_writer_create();
    write_example(w);
    const void *data;
    size_t len;
    assert_int_equal(state_writer_finish(w, &data, &len), 0);
    unsigned refused = 0;
    for (size_t cut = 0; cut < len; cut++) {
        struct guarded g = guard(data, cut);
        struct state_reader r;
        state_reader_init(&r, g.data, g.len);
        walk(&r, 0);
        struct state_reader s;
        int ret = state_open(&r, "nothing", &s);
        assert_true(ret == -ENOENT || ret == -EINVAL);
        refused += ret == -EINVAL;
        munmap(g.map, g.map_len);
    }
    /* Only cuts between the three items of the root leave a whole stream. */
    assert_int_equal(refused, len - 3);
    struct guarded g = guard(data, len);
    for (size_t i = 0; i < len; i++) {
        for (int bit = 0; bit < 8; bit++) {
            g.data[i] ^= (uint8_t)(1 << bit);
            struct state_reader r;
            state_reader_init(&r, g.data, g.len);
            walk(&r, 0);
            g.data[i] ^= (uint8_t)(1 << bit);
        }
    }
    munmap(g.map, g.map_len);
    state_writer_free(w);
}

static void malformed_items_are_refused(void **state)
{
    static const struct {
        const char *bytes;
        size_t len;
    } bad[] = {
        {"F", 1},
        {"X\1a\0\0\0\0", 7},
        {"F\0\0\0\0\0", 6},
        {"F\1a\1\0\0\0", 7},
        {"F\1a\377\377\377\377", 7},
        {"F\377a\0\0\0\0", 7},
        {"S\1a\1\0\0\0\377\377\377\377", 11},
        {"F\2a\0\0\0\0\0", 8},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        struct guarded g = guard(bad[i].bytes, bad[i].len);
        struct state_reader r, s;
        char name[64];
        uint64_t v;
        size_t cursor = 0;
        state_reader_init(&r, g.data, g.len);
        assert_int_equal(state_get_u64(&r, "b", &v), -EINVAL);
        assert_int_equal(state_open(&r, "b", &s), -EINVAL);
        assert_int_equal(state_next(&r, &cursor, name, &s), -EINVAL);
        munmap(g.map, g.map_len);
    }
}

int main(void)
{
    log_set_level(-1); /* thousands of lines about damaged files */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_written_comes_back),
        cmocka_unit_test(writers_mistakes_are_reported),
        cmocka_unit_test(every_truncation_and_every_flip_is_survived),
        cmocka_unit_test(malformed_items_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
