/* What --trace-exec was given (trace.h). */
#ifndef RINGFORT_ENGINE_INTERP_TRACE_OPTIONS_H
#define RINGFORT_ENGINE_INTERP_TRACE_OPTIONS_H

#include <stdbool.h>
#include <stdint.h>

/* An instruction is a line of some 60 bytes, so files fill within seconds. What counts is mostly the end of a run. */
struct trace_options {
    const char *path;           /* NULL: no trace */
    bool registers;
    /*
     * A regular file is full when it has this many bytes. It then gets ".1" appended to its name, an older one of that name ".2", and so on;
     * the files-th is removed. With files 1 the trace ends there.
     */
    uint64_t size;
    unsigned files;
};
#define TRACE_MIN_SIZE UINT64_C(0x10000)
#define TRACE_DEFAULT_SIZE UINT64_C(0x20000000)         /* 512 MiB */
#define TRACE_DEFAULT_FILES 2u
#define TRACE_MAX_FILES 1000u

#endif
