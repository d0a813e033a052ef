/*
 * Telling perf what translated code is: /tmp/perf-PID.map (one line for each unit; perf reads it when it reports), or jit-PID.dump
 * in the current directory (with the code itself and the time, for `perf inject --jit`). --translate perf=map|jitdump.
 *
 * A unit's name is guest_ADDRESS or guest_user_ADDRESS, by the guest's privilege. When code memory is emptied its addresses are
 * used again: the map then has both units there, the dump knows which came when. Any vCPU's thread.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_PERF_H
#define RINGFORT_ENGINE_TRANSLATE_PERF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Opens the file for this process. what: enum translate_perf. 0 or a negative errno (logged). Again: no effect. */
int perf_open(unsigned what);
/* Host code [code, code+size), which is written, is a unit that begins with guest code at rip; or, with a name, something else. */
void perf_code(const void *code, size_t size, uint64_t rip, bool user, const char *name);

#endif
