/* Requests to a disk in a test: one at a time, and many under way. */
#ifndef TESTS_UNIT_BLOCK_REQUESTS_H
#define TESTS_UNIT_BLOCK_REQUESTS_H

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <string.h>

#include "backend/block/block.h"
#include "loop_helper.h"

#define REQUEST_IOVS 24

struct request {
    struct block_request r;
    struct iovec iov[REQUEST_IOVS];
    int status;
    bool done;
};

static inline void request_done(void *opaque, int status)
{
    struct request *q = opaque;

    assert_false(q->done);
    q->status = status;
    q->done = true;
}

/* buf in one piece; NULL: the operation has none. */
static inline void request_set(struct request *q, enum block_op op, uint64_t offset, void *buf, uint64_t len)
{
    memset(q, 0, sizeof(*q));
    q->iov[0] = (struct iovec){buf, len};
    q->r = (struct block_request){
        .op = op, .offset = offset, .len = len, .iov = q->iov, .iovcnt = buf ? 1 : 0, .done = request_done, .opaque = q};
}

/* The status of one that was submitted. */
static inline int request_wait(struct loop *loop, struct request *q, unsigned ms)
{
    assert_true(run_until(loop, flag_is_set, &q->done, ms));
    return q->status;
}

/* Submits it, checks that done() comes later and from the loop; its status. */
static inline int request_perform(struct loop *loop, struct block *b, struct request *q)
{
    block_submit(b, &q->r);
    assert_false(q->done);
    return request_wait(loop, q, 60000);
}

#endif
