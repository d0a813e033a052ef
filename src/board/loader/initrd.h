/*
 * Checks an initramfs the way Linux reads it, so that a broken one is told before the boot and not
 * by a panic.
 *
 * An initramfs is a row of cpio archives ("newc"), each plain or compressed, with zeroes between
 * (Documentation/driver-api/early-userspace/buffer-format.rst). One thread.
 */
#ifndef RINGFORT_BOARD_INITRD_H
#define RINGFORT_BOARD_INITRD_H

#include <stdint.h>

struct source;

/*
 * Walks the whole archive, compressed parts included, which are unpacked to nowhere. memory_bytes:
 * what it may unpack to. 0; -EINVAL (logged) for a file that is no initramfs, is truncated, corrupt
 * or too big; -ENOMEM. What follows a sound archive and is no archive is only warned about: Linux
 * ignores it, too.
 */
int initrd_check(const struct source *src, const uint8_t *data, uint64_t size,
                 uint64_t memory_bytes);

#endif
