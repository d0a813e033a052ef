/*
 * Fuzz target: the whole receiving side of a migration (migrate/target.c, with its threads and sockets), as a source plays with it
 * that does what the input says. The input is a list of steps:
 *
 *     'o' b           opens connection number b & 7 (closing what it was): HELLO of kind b >> 3 & 7, of another session if bit 6 is
 *                     set, of another version if bit 7 is; its index is the number
 *     'f' b t s…      a frame on connection b & 7 of type t & 31, flags t >> 7; the payload is what follows (below)
 *     'r' b n …       n bytes that follow, as they are
 *     'c' b           closes connection b & 7
 *     't'             a person takes the machine
 *     'w'             a moment passes
 *
 * A payload: 'j' n: the nth offer of a table; 'd' lo hi …: so many bytes of the input; 'z' lo hi: so many zeroes; 'p' region page kind:
 * such a page, whose contents would not fit into an input; anything else: none.
 * After a step that the target answers, its answer is waited for a moment, so that the following steps find it where they should.
 *
 * Whatever comes, it ends soon, with a machine that runs or with one that is given up; it runs only after COMMIT or by the person, and
 * never once the source was told, by refusal or by answer, that it has the machine; its disk and memory are not left; and memory that
 * the process needs stays bounded.
 */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "memory/memory.h"
#include "migrate/migrate.h"
#include "migrate/protocol.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define CONNECTIONS 8u
#define STEPS 48u
#define PAGES 64u
#define DISK KIB(256)
#define TIMEOUT_MS 40u
#define ANSWER_MS 20u
#define HANG_S 20u
#ifdef __SANITIZE_ADDRESS__
#define MOST_KIB (1024 * 1024)  /* what was freed is kept for a while */
#else
#define MOST_KIB (128 * 1024)
#endif

#define MUST(condition) \
    do { \
        if (!(condition)) { \
            printf("fuzz_receive: not so: %s (line %d)\n", #condition, __LINE__); \
            fflush(stdout); \
            abort(); \
        } \
    } while (0)

/* ---- the machine ---- */

static struct {
    struct memory memory;
    _Atomic bool made, loaded, activated, abandoned, may_run;
    bool refuse_load, refuse_activate;
} machine;

static int prepare(void *opaque, const char *description, size_t len, struct memory **memory, char reason[MIGRATE_TEXT])
{
    MUST(!machine.made && description[len] == 0);
    machine.made = true;
    if (strstr(description, "\"no\"")) {
        snprintf(reason, MIGRATE_TEXT, "not such a machine");
        return -EINVAL;
    }
    machine.refuse_load = strstr(description, "\"load\"");
    machine.refuse_activate = strstr(description, "\"activate\"");
    *memory = &machine.memory;
    return 0;
}

static bool in_kernel(void *opaque) { return false; }

static int load(void *opaque, const void *data, size_t len, char reason[MIGRATE_TEXT])
{
    uint64_t first;

    MUST(machine.made && !machine.loaded && !machine.activated && !machine.abandoned);
    if (machine.refuse_load) {
        snprintf(reason, MIGRATE_TEXT, "no");
        return -EINVAL;
    }
    /* In post-copy perhaps one that has to come first. */
    memory_read(&machine.memory, 3 * GUEST_PAGE_SIZE, &first, sizeof(first));
    machine.loaded = true;
    return 0;
}

static int activate(void *opaque, char reason[MIGRATE_TEXT])
{
    MUST(machine.loaded && !machine.activated && !machine.abandoned && machine.may_run);
    if (machine.refuse_activate) {
        snprintf(reason, MIGRATE_TEXT, "no");
        return -EINVAL;
    }
    machine.activated = true;
    return 0;
}

/* Devices that look at memory. */
static void run(void *opaque)
{
    uint64_t first;

    MUST(machine.activated && !machine.abandoned);
    memory_read(&machine.memory, 4 * GUEST_PAGE_SIZE, &first, sizeof(first));
}

static void abandon(void *opaque)
{
    MUST(!machine.activated && !machine.abandoned);
    machine.abandoned = true;
}

static void orphan(void *opaque) { MUST(machine.loaded && !machine.activated); }

static int disk_write(void *opaque, unsigned disk, uint64_t offset, const void *buf, size_t len)
{
    static uint8_t contents[DISK];

    MUST(machine.made && !machine.activated && len && len <= MIGRATE_DISK_GRANULE && offset % MIGRATE_DISK_GRANULE == 0);
    if (disk || offset > DISK || len > DISK - offset)
        return -EPROTO;
    if (buf)
        memcpy(contents + offset, buf, len);
    return 0;
}

static int disk_sync(void *opaque) { return 0; }

static const struct migrate_target_ops ops = { prepare, in_kernel, load, activate, run, abandon, orphan, NULL, disk_write, disk_sync };

/* ---- the source ---- */

static const char *const offers[] = {
    "{\"machine\":{\"kind\":\"test\"},\"streams\":2,\"post_copy\":false,\"memory\":[[0,131072],[4294967296,131072]]}",
    "{\"machine\":{\"kind\":\"test\"},\"streams\":2,\"post_copy\":true,\"memory\":[[0,131072],[4294967296,131072]]}",
    "{\"machine\":{\"kind\":\"no\"},\"streams\":2,\"post_copy\":true,\"memory\":[[0,131072],[4294967296,131072]]}",
    "{\"machine\":{\"kind\":\"load\"},\"streams\":1,\"post_copy\":true,\"memory\":[[0,131072],[4294967296,131072]]}",
    "{\"machine\":{\"kind\":\"activate\"},\"streams\":16,\"post_copy\":true,\"memory\":[[0,131072],[4294967296,131072]]}",
    "{\"machine\":{\"kind\":\"test\"},\"streams\":2,\"post_copy\":false,\"memory\":[[0,262144]]}",
    "{\"machine\":7,\"streams\":-1}",
    "{",
};

struct connection {
    int fd;                     /* -1: none */
    unsigned kind;
    bool greeted;               /* HELLO was answered */
    uint8_t heard[4096];        /* frames of the target, until they are whole */
    size_t len;
};

struct play {
    char path[96], address[104];
    struct migrate_target *target;
    struct migrate_result result;
    pthread_t thread;
    struct connection c[CONNECTIONS];
    bool kept;                  /* the source was told that it has the machine */
    bool gone;                  /* and that it has not */
    const uint8_t *at, *end;
};

static unsigned next(struct play *p) { return p->at < p->end ? *p->at++ : 0; }

/* What the source knows by these frames. */
static void hear(struct play *p, struct connection *c)
{
    size_t at = 0;

    while (c->len - at >= FRAME_HEADER_SIZE) {
        unsigned type = load_le16(c->heard + at + 4);
        uint32_t length = load_le32(c->heard + at + 8);
        const uint8_t *payload = c->heard + at + FRAME_HEADER_SIZE;

        MUST(length <= frame_limit(type));
        if (c->len - at < FRAME_HEADER_SIZE + length)
            break;
        c->greeted |= type == FRAME_HELLO;
        /* A second control connection is refused without a word about the machine. */
        p->kept |= c->greeted && c->kind == HELLO_CONTROL && type == FRAME_REFUSE;
        p->kept |= type == FRAME_STATUS && load_le32(payload) == OWNER_SOURCE;
        p->gone |= type == FRAME_RUNNING || (type == FRAME_STATUS && load_le32(payload) == OWNER_TARGET);
        at += FRAME_HEADER_SIZE + length;
    }
    memmove(c->heard, c->heard + at, c->len - at);
    c->len -= at;
}

/* Waits at most ms for bytes, and takes what is there. */
static void take(struct play *p, struct connection *c, int ms)
{
    struct pollfd fd = { .fd = c->fd, .events = POLLIN };
    ssize_t n;

    while (c->fd >= 0 && poll(&fd, 1, ms) == 1) {
        if (c->len == sizeof(c->heard))
            return;             /* bitmaps of pages: nothing that is looked for */
        n = recv(c->fd, c->heard + c->len, sizeof(c->heard) - c->len, MSG_DONTWAIT);
        if (n <= 0) {
            close(c->fd);
            c->fd = -1;
            return;
        }
        c->len += (size_t)n;
        hear(p, c);
        ms = 0;
    }
}

static void put(struct connection *c, const void *data, size_t len)
{
    if (c->fd >= 0 && send(c->fd, data, len, MSG_NOSIGNAL | MSG_DONTWAIT) < 0 && errno != EAGAIN) {
        /* What it said before is still to be heard. */
        shutdown(c->fd, SHUT_WR);
    }
}

/* By the code that makes frames, into a buffer. */
static void put_frame(struct play *p, struct connection *c, unsigned type, unsigned flags, const void *data, uint32_t length)
{
    int fd[2];
    struct channel *channel;
    static uint8_t bytes[FRAME_HEADER_SIZE + 65536];
    ssize_t n;

    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fd) || !(channel = channel_from_fd(fd[0], 1000)))
        abort();
    MUST(frame_send(channel, type, flags, data, length) == 0);
    n = recv(fd[1], bytes, FRAME_HEADER_SIZE + length, MSG_WAITALL);
    channel_close(channel);
    close(fd[1]);
    MUST(n == (ssize_t)(FRAME_HEADER_SIZE + length));
    if (type == FRAME_COMMIT && c->kind == HELLO_CONTROL)
        machine.may_run = true;
    put(c, bytes, (size_t)n);
    if (type == FRAME_HELLO || type == FRAME_OFFER || type == FRAME_STATE || type == FRAME_COMMIT || type == FRAME_FENCE)
        take(p, c, ANSWER_MS);
}

static void open_connection(struct play *p, unsigned b)
{
    struct connection *c = &p->c[b & 7];
    struct sockaddr_un un = { .sun_family = AF_UNIX };
    struct hello h = { .oldest = MIGRATE_VERSION, .newest = MIGRATE_VERSION, .kind = b >> 3 & 7, .index = b & 7, .session = "played" };
    uint8_t hello[HELLO_SIZE];

    if (c->fd >= 0) {
        take(p, c, 0);
        close(c->fd);
    }
    *c = (struct connection){ .fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0), .kind = h.kind };
    snprintf(un.sun_path, sizeof(un.sun_path), "%s", p->path);
    if (connect(c->fd, (struct sockaddr *)&un, sizeof(un)) < 0) {
        close(c->fd);
        c->fd = -1;
        return;
    }
    if (b & 0x40)
        h.session[0] = 'x';
    if (b & 0x80)
        h.oldest = h.newest = 77;
    hello_put(&h, hello);
    put_frame(p, c, FRAME_HELLO, 0, hello, sizeof(hello));
}

static void frame_step(struct play *p)
{
    static const uint8_t zeroes[65536];
    static uint8_t page[16 + GUEST_PAGE_SIZE];
    struct connection *c = &p->c[next(p) & 7];
    unsigned b = next(p), what = next(p), type = b & 31;
    const void *data = NULL;
    uint32_t length = 0;

    if (what == 'j') {
        data = offers[next(p) % ARRAY_SIZE(offers)];
        length = (uint32_t)strlen(data);
    } else if (what == 'd' || what == 'z') {
        length = next(p);
        length |= next(p) << 8;
        data = zeroes;
        if (what == 'd') {
            length = (uint32_t)MIN(length, (size_t)(p->end - p->at));
            data = p->at;
            p->at += length;
        }
    } else if (what == 'p') {
        store_le16(page, (uint16_t)next(p));
        store_le16(page + 2, 1);
        store_le64(page + 8, (uint64_t)next(p) << 8);
        page[8] = (uint8_t)next(p);
        memset(page + 16, 0x5a, GUEST_PAGE_SIZE);
        data = page;
        length = page[8] ? sizeof(page) : 16;
    }
    put_frame(p, c, type, b >> 7, data, length);
}

static void raw_step(struct play *p)
{
    struct connection *c = &p->c[next(p) & 7];
    size_t n = next(p);

    n = MIN(n, (size_t)(p->end - p->at));
    /* Something that is COMMIT's frame may be in there. */
    machine.may_run = true;
    put(c, p->at, n);
    p->at += n;
}

static void step(struct play *p)
{
    struct connection *c;

    switch (next(p)) {
    case 'o':
        open_connection(p, next(p));
        break;
    case 'f':
        frame_step(p);
        break;
    case 'r':
        raw_step(p);
        break;
    case 'c':
        c = &p->c[next(p) & 7];
        take(p, c, 0);
        if (c->fd >= 0)
            close(c->fd);
        c->fd = -1;
        break;
    case 't':
        machine.may_run = true;
        p->gone |= migrate_target_take(p->target);
        break;
    case 'w':
        nanosleep(&(struct timespec){ .tv_nsec = 3000000 }, NULL);
        break;
    default:
        break;
    }
}

/* ---- one input ---- */

static void hung(int number)
{
    static const char text[] = "fuzz_receive: it does not end\n";
    ssize_t ignored = write(STDOUT_FILENO, text, sizeof(text) - 1);

    (void)ignored;
    abort();
}

static void *target_main(void *opaque)
{
    struct play *p = opaque;

    migrate_target_run(p->target, &p->result);
    return NULL;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct migrate_target_options options = { .timeout_ms = TIMEOUT_MS, .settle_ms = 1 };
    struct play *p = calloc(1, sizeof(*p));
    struct rusage usage;
    bool known;

    log_set_level(-1);
    signal(SIGALRM, hung);
    alarm(HANG_S);
    memset(&machine, 0, sizeof(machine));
    if (!p || memory_init(&machine.memory) || memory_add_ram(&machine.memory, 0, PAGES / 2 * GUEST_PAGE_SIZE) ||
        memory_add_ram(&machine.memory, GIB(4), PAGES / 2 * GUEST_PAGE_SIZE))
        abort();
    snprintf(p->path, sizeof(p->path), "/tmp/fuzz_receive.%d", (int)getpid());
    snprintf(p->address, sizeof(p->address), "unix:%s", p->path);
    options.listen = p->address;
    for (unsigned i = 0; i < CONNECTIONS; i++)
        p->c[i].fd = -1;
    p->at = data;
    p->end = data + size;
    p->target = migrate_target_create(&options, &ops, NULL);
    MUST(p->target);
    if (pthread_create(&p->thread, NULL, target_main, p))
        abort();
    for (unsigned i = 0; i < STEPS && p->at < p->end; i++)
        step(p);
    for (unsigned i = 0; i < CONNECTIONS; i++)
        take(p, &p->c[i], 0);
    migrate_target_cancel(p->target);
    pthread_join(p->thread, NULL);
    for (unsigned i = 0; i < CONNECTIONS; i++) {
        take(p, &p->c[i], 0);
        if (p->c[i].fd >= 0)
            close(p->c[i].fd);
    }
    known = p->result.end == MIGRATE_DONE || p->result.end == MIGRATE_LOST;
    MUST(known || p->result.end == MIGRATE_FAILED);
    MUST(machine.activated == known && machine.abandoned == !known);
    MUST(!(p->kept && machine.activated));
    MUST(!(p->gone && !machine.activated) || machine.refuse_activate);
    migrate_target_free(p->target);
    memory_destroy(&machine.memory);
    free(p);
    alarm(0);
    getrusage(RUSAGE_SELF, &usage);
    MUST(usage.ru_maxrss < MOST_KIB);
    return 0;
}
