/* A kernel of a few bytes, for machines that need no more. */
#ifndef TESTS_UNIT_TINY_KERNEL_H
#define TESTS_UNIT_TINY_KERNEL_H

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Where it is loaded, and its header with it. */
#define TINY_KERNEL_LOAD 0x100000u

/*
 * A Multiboot kernel (specification 0.6.96 §3.1, with addresses) of this 32-bit code, at most 224 bytes; path is mkstemp()'s, and the
 * file the caller's to remove.
 */
static inline void tiny_kernel_write(char path[], const uint8_t *code, size_t len)
{
    const uint32_t flags = 0x10000, load = TINY_KERNEL_LOAD;
    uint8_t image[256] = {0};
    uint32_t header[8] = {0x1badb002, flags, 0u - 0x1badb002u - flags, load, load, load + sizeof(image), 0, load + sizeof(header)};
    int fd = mkstemp(path);

    assert_true(fd >= 0 && len <= sizeof(image) - sizeof(header));
    memcpy(image, header, sizeof(header));
    memcpy(image + sizeof(header), code, len);
    assert_int_equal(write(fd, image, sizeof(image)), sizeof(image));
    close(fd);
}

#endif
