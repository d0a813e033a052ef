/*
 * Kernel and initrd files from anywhere: bzImage, ELF, notes, Multiboot headers, compressed
 * streams, cpio archives.
 *
 * Input: the first byte names a made-up file of tests/unit/kernel_image.c that loads, the rest are
 * patches to it of four bytes each: offset (2), value (1), how (1: set, add, cut the file there).
 * Other first bytes: the rest is the file. Whatever comes, nothing may be written beyond the
 * guest's memory, and a refusal is -EINVAL or -ENOMEM.
 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/util.h"
#include "board/loader/initrd.h"
#include "board/loader/kernel.h"
#include "board/loader/source.h"
#include "memory/memory.h"
#include "../unit/kernel_image.h"

#define RAM  MIB(24)
#define LOAD MIB(16)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct memory mem;
static struct image base[16];
static unsigned bases;

static void make_bases(void)
{
    struct elf_spec pvh = {.is_64 = true,
                           .paddr = LOAD,
                           .filesz = 0x800,
                           .memsz = 0x1000,
                           .entry = LOAD,
                           .pvh = true,
                           .pvh_entry = LOAD,
                           .linux_note = true};
    struct elf_spec linux64 = pvh, multiboot = pvh;
    linux64.pvh = false;
    multiboot.is_64 = multiboot.pvh = false;
    multiboot.multiboot = true;
    base[bases++] = image_elf(&pvh);
    base[bases++] = image_elf(&linux64);
    base[bases++] = image_elf(&multiboot);
    multiboot.multiboot_flags = 1u << 16;
    const uint32_t addresses[5] = {MIB(2) + 0x300, MIB(2), 0, MIB(3), MIB(2) + 0x400};
    memcpy(multiboot.multiboot_addresses, addresses, sizeof(addresses));
    base[bases++] = image_elf(&multiboot);
    const enum unpack_format formats[] = {UNPACK_NONE, UNPACK_GZIP, UNPACK_XZ,
                                          UNPACK_LZMA, UNPACK_LZ4,  UNPACK_ZSTD};
    for (size_t i = 0; i < ARRAY_SIZE(formats); i++)
        base[bases++] = image_bzimage(formats[i], base[0].data, base[0].size, MIB(1));
    struct image cpio = image_cpio("init", 100);
    base[bases++] = cpio;
    for (size_t i = 1; i < ARRAY_SIZE(formats); i++)
        base[bases++] = image_pack(formats[i], cpio.data, cpio.size);
}

static void patch(struct image *img, const uint8_t *p, size_t size)
{
    for (; size >= 4 && img->size; p += 4, size -= 4) {
        size_t at = load_le16(p) % img->size;
        if (p[3] % 8 == 7)
            img->size = at;
        else if (p[3] & 1)
            img->data[at] = (uint8_t)(img->data[at] + p[2]);
        else
            img->data[at] = p[2];
    }
}

static void expect(int err)
{
    if (err && err != -EINVAL && err != -ENOMEM)
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct source src = {.what = "kernel", .path = "fuzz", .fd = -1};
    if (!bases) {
        if (memory_init(&mem) || memory_add_ram(&mem, 0, RAM))
            abort();
        make_bases();
    }
    if (size == 0)
        return 0;
    unsigned kind = data[0] % 32;
    struct image img = {.size = kind < bases ? base[kind].size : size - 1};
    img.data =
        malloc(img.size); /* exactly as long as the file: a sanitizer sees the first byte too far */
    if (!img.data && img.size)
        return 0;
    if (kind < bases) {
        size_t room = img.size;
        memcpy(img.data, base[kind].data, room);
        patch(&img, data + 1, size - 1);
        if (img.size < room) {
            uint8_t *cut = malloc(img.size);
            memcpy(cut, img.data, img.size);
            free(img.data);
            img.data = cut;
        }
    } else {
        memcpy(img.data, data + 1, size - 1);
    }
    for (int want = BOOT_AUTO; want <= BOOT_LINUX64; want++) {
        struct kernel k;
        int err = kernel_load(&src, img.data, img.size, &mem, RAM, (enum boot_protocol)want, &k);
        expect(err);
        if (!err && (k.start < MIB(1) || k.end > RAM || k.start >= k.end || k.entry >= k.end ||
                     k.entry < k.start || k.setup_header_len > sizeof(k.setup_header)))
            abort();
    }
    expect(initrd_check(&src, img.data, img.size, RAM));
    free(img.data);
    return 0;
}
