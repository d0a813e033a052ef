/* Threads that do one job beside the main loop. */
#ifndef RINGFORT_BASE_THREAD_H
#define RINGFORT_BASE_THREAD_H

#include <pthread.h>
#include <stddef.h>

/*
 * A thread to which no signal is delivered: those are for the threads that expect them. stack: bytes, 0 for the usual size. The
 * caller joins it. 0 or a negative errno (silent).
 */
int thread_start(pthread_t *thread, size_t stack, void *(*fn)(void *opaque), void *opaque);

#endif
