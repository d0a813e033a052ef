/*
 * The source's copying while the guest runs: disks, rounds of memory, and what is done when they do not get closer. See source_internal.h.
 */
#include "migrate/source_internal.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"

/* What standing still costs besides sending the last pages. */
#define OVERHEAD_MS 10u
#define MAX_ROUNDS 100u
/* A local minimum is one among so many rounds: what the guest once left alone it may never leave alone again. */
#define WINDOW 8u
#define THROTTLE_STEP 20u
#define THROTTLE_MAX 99u

/* All pages that the host has given contents; the others are zero, which the target's are, too. */
static void all_with_contents(struct migrate_source *s)
{
    for (unsigned i = 0; i < s->memory->regions; i++) {
        const struct memory_region *r = &s->memory->region[i];
        off_t at = 0, size = (off_t)r->size;

        while (at < size) {
            off_t data = lseek(r->fd, at, SEEK_DATA), hole = data < 0 ? -1 : lseek(r->fd, data, SEEK_HOLE);

            if (data < 0 && errno == ENXIO)
                break;
            if (data < 0 || hole < 0) {
                /* A host that cannot say has contents everywhere. */
                data = at;
                hole = size;
            }
            for (uint64_t page = (uint64_t)data >> GUEST_PAGE_SHIFT; page < ((uint64_t)hole + GUEST_PAGE_SIZE - 1) >> GUEST_PAGE_SHIFT; page++)
                s->todo[i][page / 64] |= 1ull << (page % 64);
            at = hole;
        }
    }
}

/* Sends what is in todo. The rate is measured where there was enough to measure. */
int source_send_round(struct migrate_source *s, uint64_t pages)
{
    uint64_t began = migrate_now_ms(), ms;
    int ret;

    source_streams_begin(s);
    while ((ret = source_streams_wait(s, 100)) == 0) {
        uint64_t now = migrate_now_ms(), handled = atomic_load(&s->handled);

        s->progress.left_pages = pages > handled ? pages - handled : 0;
        if (now - began > 300)
            s->progress.rate = handled * GUEST_PAGE_SIZE * 1000 / (now - began);
        ret = source_send_progress(s);
        if (ret)
            return ret;
        if (atomic_load(&s->cancelled))
            return source_because(s, -ECANCELED, "cancelled");
        source_report(s);
    }
    if (ret < 0) {
        if (!atomic_load(&s->cancelled))
            source_hear_reason(s);
        return atomic_load(&s->cancelled) ? source_because(s, -ECANCELED, "cancelled") : ret;
    }
    s->progress.left_pages = 0;
    ms = migrate_now_ms() - began;
    if (pages >= 2048 || !s->progress.rate)
        s->progress.rate = pages * GUEST_PAGE_SIZE * 1000 / MAX(ms, 1u);
    return 0;
}

/* Of disks, in pages. */
uint64_t source_disk_pages(const struct migrate_source *s) { return disk_bitmaps_count(s->opt->disks, s->disk_todo) * DISK_PAGES; }

static void fetch_disks(struct migrate_source *s)
{
    for (unsigned i = 0; s->opt->disks && i < s->opt->disks->count; i++)
        s->opt->disks->written(s->opt->disks->opaque, i, s->disk_todo[i]);
}

int source_fetch(struct migrate_source *s, uint64_t *pages)
{
    int err = memory_dirty_fetch(s->memory, s->todo);

    fetch_disks(s);
    *pages = memory_bitmaps_count(s->memory, s->todo) + source_disk_pages(s);
    return err ? source_because(s, err, "the guest's writes cannot be logged") : 0;
}

static uint64_t estimate(const struct migrate_source *s, uint64_t pages)
{
    return OVERHEAD_MS + (s->progress.rate ? pages * GUEST_PAGE_SIZE * 1000 / s->progress.rate : 0);
}

static uint64_t least(const uint64_t pages[WINDOW])
{
    uint64_t best = UINT64_MAX;

    for (unsigned i = 0; i < WINDOW; i++)
        best = MIN(best, pages[i]);
    return best;
}

/* What stalled pre-copy is tried with next. */
enum remedy { GO_ON, SWITCH, POST_COPY };

/* best: the fewest pages that one of the latest rounds left. */
static enum remedy relieve(struct migrate_source *s, bool post_copy, uint64_t pages, uint64_t best)
{
    unsigned *throttle = &s->progress.throttle;

    /* What is left of disks does not follow: the guest stands still for it. */
    if (post_copy && estimate(s, source_disk_pages(s)) <= s->opt->downtime_ms && s->opt->post_copy == MIGRATE_POST_COPY_AUTO) {
        log_info("migration: the guest dirties memory faster than it is sent: changing to post-copy");
        return POST_COPY;
    }
    if (*throttle < THROTTLE_MAX && s->ops->throttle) {
        *throttle = MIN(*throttle + THROTTLE_STEP, THROTTLE_MAX);
        log_info("migration: the guest dirties memory faster than it is sent: taking %u %% of its processors' time", *throttle);
        s->ops->throttle(s->opaque, *throttle);
        return GO_ON;
    }
    if (pages <= best + best / 10) {
        log_info("migration: not getting closer: switching at a local minimum, %llu ms of standing still expected",
                 (unsigned long long)s->progress.estimate_ms);
        return SWITCH;
    }
    return GO_ON;
}

/*
 * Disks go first, in rounds as long as these become shorter, since memory that is sent before a disk of gigabytes would have to be
 * sent again.
 */
int source_copy_disks(struct migrate_source *s)
{
    const struct migrate_disks *d = s->opt->disks;
    uint64_t pages, before;
    int err;

    if (!d)
        return 0;
    err = d->start(d->opaque);
    s->disks_logged = !err;
    if (err)
        return source_because(s, err, "writes to the machine's disks cannot be logged");
    for (unsigned i = 0; i < d->count; i++)
        d->contents(d->opaque, i, s->disk_todo[i]);
    s->only_disks = s->fresh = true;
    pages = source_disk_pages(s);
    do {
        before = pages;
        s->progress.left_pages = pages;
        s->progress.total_pages = pages;
        log_info("migration: disks: %llu MiB to look at", (unsigned long long)(pages * GUEST_PAGE_SIZE >> 20));
        err = source_send_round(s, pages);
        if (err)
            return err;
        s->fresh = false;
        fetch_disks(s);
        pages = source_disk_pages(s);
    } while (pages < before / 2 && estimate(s, pages) > s->opt->downtime_ms / 2);
    s->only_disks = false;
    s->progress.total_pages = memory_total(s->memory) >> GUEST_PAGE_SHIFT;
    return 0;
}

int source_pre_copy(struct migrate_source *s, bool can_post_copy, bool *post_copy)
{
    uint64_t pages, before, fetched_at, recent[WINDOW];
    unsigned stalls = 0;
    int err;

    memset(recent, 0xff, sizeof(recent));
    *post_copy = false;
    all_with_contents(s);
    pages = memory_bitmaps_count(s->memory, s->todo) + source_disk_pages(s);
    fetched_at = migrate_now_ms();
    if (s->opt->post_copy == MIGRATE_POST_COPY_NOW) {
        *post_copy = true;
        return 0;
    }
    for (;;) {
        uint64_t now;

        s->progress.round++;
        before = pages;
        err = source_send_round(s, pages);
        if (!err)
            err = source_fetch(s, &pages);
        if (err)
            return err;
        now = migrate_now_ms();
        s->progress.dirty_rate = pages * GUEST_PAGE_SIZE * 1000 / MAX(now - fetched_at, 1u);
        s->progress.left_pages = pages;
        s->progress.estimate_ms = estimate(s, pages);
        fetched_at = now;
        err = source_send_progress(s);
        if (err)
            return err;
        log_info("migration: round %u: %llu pages sent, %llu dirty, %llu ms of standing still expected", s->progress.round,
                 (unsigned long long)before, (unsigned long long)pages, (unsigned long long)s->progress.estimate_ms);
        source_report(s);
        if (s->progress.estimate_ms <= s->opt->downtime_ms &&
            /* Good enough; better only while each round halves what is left. */
            (s->progress.estimate_ms <= 2 * OVERHEAD_MS || pages > before / 2 || s->progress.round >= 10))
            return 0;
        stalls = pages > before - before / 10 ? stalls + 1 : 0;
        if (stalls >= 2 || s->progress.round >= MAX_ROUNDS) {
            enum remedy r = relieve(s, can_post_copy, pages, least(recent));

            *post_copy = r == POST_COPY;
            if (r != GO_ON)
                return 0;
            stalls = 0;
        }
        recent[s->progress.round % WINDOW] = pages;
    }
}
