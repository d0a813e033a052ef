/*
 * Runs in a guest that is moved about: writes memory at random and checks what it finds there.
 *
 * memcheck MIB RATE [MS [WORD]]: so much memory, RATE pages a second (0: as fast as it goes). What each page should hold is kept
 * apart, as a number of writes; each word of the page follows from it. Prints "@check N" (WORD in place of @check) each second of
 * guest time, or after each MS of it (0: after each batch, which are of one size), where N is the number of pages that were right
 * so far, and "@lost …" for the first that is not.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "pattern.h"

int main(int argc, char **argv)
{
    uint64_t pages = strtoull(argc > 1 ? argv[1] : "64", NULL, 0) * 256, rate = strtoull(argc > 2 ? argv[2] : "0", NULL, 0);
    uint64_t checked = 0, batch = rate ? rate / 100 + 1 : 500, *seq = calloc(pages, 8);
    uint64_t *memory = mmap(NULL, pages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct reports reports = reports_init(argc > 2 ? argv + 3 : argv + argc);

    if (!seq || memory == MAP_FAILED)
        return 1;
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("@begin\n");
    for (;;) {
        double start = now();

        for (uint64_t n = 0; n < batch; n++) {
            uint64_t page = next_random() % pages, *p = memory + page * WORDS;

            if (!holds(p, "page", page, seq[page]))
                return 1;
            write_again(p, page, ++seq[page]);
            checked++;
        }
        report(&reports, checked);
        if (rate && now() - start < 0.01)
            nanosleep(&(struct timespec){ .tv_nsec = 10000000 - (long)((now() - start) * 1e9) }, NULL);
    }
}
