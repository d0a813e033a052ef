/*
 * What has happened to a machine lately: numbered lines of JSON that any number of followers read at their own pace.
 *
 * Any thread; the lock is a leaf.
 */
#ifndef RINGFORT_VM_CONTROL_EVENT_H
#define RINGFORT_VM_CONTROL_EVENT_H

#include <jansson.h>
#include <stdint.h>

#define EVENTS_KEPT 256u /* a follower who is further behind than this has lost some, and is told so */

struct events;

struct events *events_create(void);
void events_destroy(struct events *e);
/* Adds {"seq": …, "time": seconds since 1970, "event": what, …more}; more is consumed, NULL: nothing. */
void events_add(struct events *e, const char *what, json_t *more);
/* The number of the next event. */
uint64_t events_next(struct events *e);
/*
 * The line (with newline) of event *seq, which goes up by one; NULL: it has not happened yet. When it is too old to be
 * known, an event "lost" with the number of those, and *seq moves past them. The caller frees it.
 */
char *events_line(struct events *e, uint64_t *seq);

#endif
