/* See thread.h. */
#include "base/thread.h"

#include <signal.h>

int thread_start(pthread_t *thread, size_t stack, void *(*fn)(void *opaque), void *opaque)
{
    pthread_attr_t attr;
    sigset_t all;
    int err = pthread_attr_init(&attr);

    if (err)
        return -err;
    /* Before it runs: set by itself, a signal might come first. */
    sigfillset(&all);
    err = pthread_attr_setsigmask_np(&attr, &all);
    if (!err && stack)
        err = pthread_attr_setstacksize(&attr, stack);
    if (!err)
        err = pthread_create(thread, &attr, fn, opaque);
    pthread_attr_destroy(&attr);
    return -err;
}
