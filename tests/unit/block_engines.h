/* For programs that test disks on files with each engine there is. One such program includes it once. */
#ifndef TESTS_UNIT_BLOCK_ENGINES_H
#define TESTS_UNIT_BLOCK_ENGINES_H

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include "backend/block/block_impl.h"

/* Of this run; NULL: the best of this host. */
static const struct block_engine *engine;

/* How many tests failed. */
#define RUN_WITH_EACH_ENGINE(tests)                              \
    ({                                                           \
        print_message("--- engine: the best of this host\n");    \
        int failed_ = cmocka_run_group_tests(tests, NULL, NULL); \
        print_message("--- engine: threads\n");                  \
        engine = &block_engine_threads;                          \
        failed_ + cmocka_run_group_tests(tests, NULL, NULL);     \
    })

#endif
