/*
 * The target's side of post-copy: pages that are missing (memory/missing.h) are asked for when they are touched, through the urgent
 * connection; whoever receives pages places them here. A page that nobody misses (the source never had to send it) is zero.
 */
#ifndef RINGFORT_MIGRATE_POSTCOPY_H
#define RINGFORT_MIGRATE_POSTCOPY_H

#include <stdbool.h>

#include "memory/missing.h"
#include "migrate/channel.h"

struct postcopy;

/* Whether this host lets this process do it; else why not. kernel: faults of the kernel have to be stopped, too. */
bool postcopy_usable(bool kernel, char why[CHANNEL_ERROR_MAX]);

/* Empties the pages in missing (taken over: freed by postcopy_destroy) and waits for touches from then on. NULL: error. */
struct postcopy *postcopy_create(struct memory *m, uint64_t *missing[MEMORY_MAX_REGIONS], char error[CHANNEL_ERROR_MAX]);
/* Touches are not waited for any more. All pages have to be there, or nobody may touch what is not. NULL is allowed. */
void postcopy_destroy(struct postcopy *p);
/* Where requests go, from now on; those without an answer go there anew. NULL: nowhere, they are kept. Any thread. */
void postcopy_connect(struct postcopy *p, struct channel *urgent);
/*
 * Pages will not come any more, and nobody is going to run the machine: whoever waits, or touches one later, finds zeros. For
 * a machine that is abandoned while its state is loaded, never for one that has run. Any thread.
 */
void postcopy_give_up(struct postcopy *p);
/* A page has come: contents, NULL for zeros. One that is there already stays. Any thread. 0 or a negative errno. */
int postcopy_place(struct postcopy *p, unsigned region, uint64_t page, const uint8_t *contents);
/* Pages that are missing still. Any thread. */
uint64_t postcopy_missing(const struct postcopy *p);
uint64_t postcopy_requested(const struct postcopy *p);
/* The bits, for a source that goes on after the link broke. They may become fewer at any time. */
uint64_t *const *postcopy_bitmaps(const struct postcopy *p);

#endif
