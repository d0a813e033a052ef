/*
 * Runs in a guest that is moved about: writes a disk at random and checks what it finds there.
 *
 * diskcheck MIB RATE DEVICE [MS [WORD]]: the first MIB of it, which are zero at first; RATE blocks of 4 KiB a second (0: as fast as it goes), past the
 * guest's page cache. Each block holds its number and how often it was written, which is kept in memory too; so a disk and a memory
 * that are not of one moment are found. Prints as memcheck does.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pattern.h"

int main(int argc, char **argv)
{
    uint64_t blocks = strtoull(argc > 1 ? argv[1] : "16", NULL, 0) * 256, rate = strtoull(argc > 2 ? argv[2] : "0", NULL, 0);
    uint64_t checked = 0, batch = rate ? rate / 20 + 1 : 100, *seq = calloc(blocks, 8);
    int fd = open(argc > 3 ? argv[3] : "/dev/vda", O_RDWR | O_DIRECT);
    uint64_t *buf = aligned_alloc(BLOCK, BLOCK);
    struct reports reports = reports_init(argc > 3 ? argv + 4 : argv + argc);

    setvbuf(stdout, NULL, _IOLBF, 0);
    if (fd < 0 || !seq || !buf) {
        printf("@lost: no disk\n");
        return 1;
    }
    printf("@begin\n");
    for (;;) {
        double start = now();

        for (uint64_t n = 0; n < batch; n++) {
            uint64_t block = next_random() % blocks;

            if (pread(fd, buf, BLOCK, (off_t)(block * BLOCK)) != BLOCK) {
                printf("@lost: block %llu cannot be read\n", (unsigned long long)block);
                return 1;
            }
            if (!holds(buf, "block", block, seq[block]))
                return 1;
            write_again(buf, block, ++seq[block]);
            if (pwrite(fd, buf, BLOCK, (off_t)(block * BLOCK)) != BLOCK || (n % 32 == 0 && fdatasync(fd))) {
                printf("@lost: block %llu cannot be written\n", (unsigned long long)block);
                return 1;
            }
            checked++;
        }
        report(&reports, checked);
        if (rate) {
            double rest = (double)batch / (double)rate - (now() - start);

            if (rest > 0)
                usleep((useconds_t)(rest * 1e6));
        }
    }
}
