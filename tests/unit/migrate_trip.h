/*
 * A migration between two machines of a few lines of C, over a real socket, for tests.
 *
 * The machine is a thread that writes pages by memory_write() and checks what it finds there. What each page should hold is in
 * its saved state, so a page that was lost on the way is found. machines_running counts the machines that run in this process: two
 * would end the test at once. Everything asserts by cmocka.
 */
#ifndef RINGFORT_TESTS_MIGRATE_TRIP_H
#define RINGFORT_TESTS_MIGRATE_TRIP_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>
#include <pthread.h>

#include "migrate/migrate.h"

#define PAGES 1024u
#define WORDS (GUEST_PAGE_SIZE / 8)
/* A disk of pages: some granules, and a part of one. */
#define BLOCKS (8 * (MIGRATE_DISK_GRANULE / GUEST_PAGE_SIZE) + 1)

extern char trip_folder[64];    /* for sockets; made by trip_tests() */
extern _Atomic int machines_running;

/* xorshift; *x: not 0. */
uint64_t trip_random(uint64_t *x);

/* ---- a machine ---- */

struct machine {
    struct memory memory;
    bool made;
    struct {                    /* what is saved: what each page and block holds, as its number of writes */
        uint64_t page[PAGES], block[BLOCKS];
    } seq;
    bool disk_moves;            /* the disk is used, and copied */
    uint64_t disk[BLOCKS][WORDS];
    _Atomic uint64_t written;   /* granules */
    uint64_t random;
    unsigned pause_us;          /* between two writes */
    unsigned hot_pages;         /* that are written; 0: none by the thread */
    bool by_reports;            /* pages are written at each report of pre-copy instead: faster than any link */
    pthread_t thread;
    bool started;
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool run, end, in_write, counted;
    _Atomic unsigned throttled;
    const char *refuse_prepare, *refuse_load, *refuse_activate;
    int activating[2], activate[2];     /* pipes, when not 0: it says that it is being activated, and waits for a byte */
    bool abandoned, orphaned;
    unsigned stages;            /* bits that were seen */
    _Atomic uint64_t sent;      /* bytes of pre-copy */
    uint64_t bad;               /* pages found with other contents */
};

/* Lets it run, or stops it; it stands still when this returns. */
void machine_run(struct machine *m, bool run);
/* Stands still; every page is what it should be. */
void machine_check(struct machine *m);

/* ---- one migration ---- */

struct trip {
    struct migrate_source_options options;
    struct migrate_disks disks;
    struct migrate_target_options target_options;
    struct machine a, b;
    struct migrate_source *source;
    struct migrate_target *target;
    struct migrate_result sent, received;
    _Atomic bool over;          /* at the source */
    pthread_t thread;
    char to[128], listen[128];
};

/* The source's machine (a) has contents; the target's (b) waits for them. Options may be changed before the sides begin. */
struct trip *trip_make(void);
/* They have a disk, which comes along. */
void trip_with_disk(struct trip *t);
/* The target begins, in a thread. tls: NULL: in clear. */
void trip_target(struct trip *t, const char *tls);
/* Lets the source's machine run, and makes the source. */
void trip_source_make(struct trip *t);
/* The source, to its end. */
void trip_source(struct trip *t);
/* It arrived: only the target's runs, and all of it is there. Ends the trip. */
void trip_arrived(struct trip *t);
/* It stayed, and why is said: only the source's runs. Ends the trip. */
void trip_stayed(struct trip *t, const char *why);
void trip_end(struct trip *t);

/* A Unix socket that listens at path, or is connected to it; -1: it cannot be. */
int trip_socket(const char *path, bool listening);
/* Runs a program's tests. MIGRATE_LOG=1 shows what is logged. */
#define trip_tests(tests) trip_run_tests(#tests, tests, sizeof(tests) / sizeof((tests)[0]))
int trip_run_tests(const char *name, const struct CMUnitTest *tests, size_t count);

#endif
