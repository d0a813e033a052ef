/* Made-up kernels and archives. See kernel_image.h. */
#include "kernel_image.h"

#include <elf.h>
#include <lz4.h>
#include <lzma.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zlib.h>
#include <zstd.h>

#include "base/util.h"

static void need(bool ok)
{
    if (!ok) {
        fprintf(stderr, "cannot make a test image\n");
        abort();
    }
}

static size_t put_note(uint8_t *p, uint32_t type, const void *desc, uint32_t len)
{
    store_le32(p, 4);
    store_le32(p + 4, len);
    store_le32(p + 8, type);
    memcpy(p + 12, "Xen", 4);
    memcpy(p + 16, desc, len);
    return align_up(16 + len, 4);
}

static void put_segment(uint8_t *p, bool is_64, uint32_t type, uint64_t offset, uint64_t paddr,
                        uint64_t filesz, uint64_t memsz)
{
    if (is_64) {
        Elf64_Phdr h = {.p_type = type,
                        .p_flags = 7,
                        .p_offset = offset,
                        .p_vaddr = paddr,
                        .p_paddr = paddr,
                        .p_filesz = filesz,
                        .p_memsz = memsz,
                        .p_align = type == PT_NOTE ? 4 : 16};
        memcpy(p, &h, sizeof(h));
    } else {
        Elf32_Phdr h = {.p_type = type,
                        .p_flags = 7,
                        .p_offset = (uint32_t)offset,
                        .p_vaddr = (uint32_t)paddr,
                        .p_paddr = (uint32_t)paddr,
                        .p_filesz = (uint32_t)filesz,
                        .p_memsz = (uint32_t)memsz,
                        .p_align = type == PT_NOTE ? 4 : 16};
        memcpy(p, &h, sizeof(h));
    }
}

struct elf_spec image_linux_spec(uint32_t load)
{
    return (struct elf_spec){.is_64 = true,
                             .paddr = load,
                             .filesz = 0x3000,
                             .memsz = 0x8000,
                             .entry = load,
                             .pvh = true,
                             .pvh_entry = load + 0x50,
                             .linux_note = true};
}

struct image image_elf(const struct elf_spec *s)
{
    size_t second = ELF_FIRST_OFFSET + align_up(s->filesz, 16);
    struct image img = {.size = second + SECOND_SIZE};
    img.data = calloc(1, img.size);
    need(img.data);
    unsigned machine = s->machine ? s->machine : s->is_64 ? EM_X86_64 : EM_386;
    size_t phdr = s->is_64 ? sizeof(Elf64_Ehdr) : sizeof(Elf32_Ehdr);
    size_t phsize = s->is_64 ? sizeof(Elf64_Phdr) : sizeof(Elf32_Phdr);
    const uint8_t ident[EI_NIDENT] = {
        0x7f, 'E', 'L', 'F', s->is_64 ? ELFCLASS64 : ELFCLASS32, ELFDATA2LSB, EV_CURRENT};
    if (s->is_64) {
        Elf64_Ehdr h = {.e_type = ET_EXEC,
                        .e_machine = (uint16_t)machine,
                        .e_version = 1,
                        .e_entry = s->entry,
                        .e_phoff = phdr,
                        .e_ehsize = sizeof(h),
                        .e_phentsize = (uint16_t)phsize,
                        .e_phnum = 3};
        memcpy(h.e_ident, ident, sizeof(ident));
        memcpy(img.data, &h, sizeof(h));
    } else {
        Elf32_Ehdr h = {.e_type = ET_EXEC,
                        .e_machine = (uint16_t)machine,
                        .e_version = 1,
                        .e_entry = (uint32_t)s->entry,
                        .e_phoff = (uint32_t)phdr,
                        .e_ehsize = sizeof(h),
                        .e_phentsize = (uint16_t)phsize,
                        .e_phnum = 3};
        memcpy(h.e_ident, ident, sizeof(ident));
        memcpy(img.data, &h, sizeof(h));
    }

    size_t notes = 0x200, at = notes;
    if (s->linux_note)
        at += put_note(img.data + at, 6, "linux", 6);
    if (s->pvh)
        at += put_note(img.data + at, 18, &s->pvh_entry, 4);
    put_segment(img.data + phdr, s->is_64, PT_LOAD, ELF_FIRST_OFFSET, s->paddr, s->filesz,
                s->memsz);
    put_segment(img.data + phdr + phsize, s->is_64, PT_LOAD, second, s->paddr + SECOND_SEGMENT,
                SECOND_SIZE, SECOND_SIZE);
    put_segment(img.data + phdr + 2 * phsize, s->is_64, PT_NOTE, notes, 0, at - notes, at - notes);

    if (s->multiboot) {
        uint8_t *h = img.data + 0x300;
        store_le32(h, 0x1badb002);
        store_le32(h + 4, s->multiboot_flags);
        store_le32(h + 8, 0u - 0x1badb002u - s->multiboot_flags);
        for (int i = 0; i < 5; i++)
            store_le32(h + 12 + 4 * i, s->multiboot_addresses[i]);
    }
    for (size_t i = 0; i < s->filesz; i++)
        img.data[ELF_FIRST_OFFSET + i] = image_pattern(0, i);
    for (size_t i = 0; i < SECOND_SIZE; i++)
        img.data[second + i] = image_pattern(1, i);
    return img;
}

static size_t pack_lz4(const uint8_t *data, size_t size, uint8_t *out, size_t cap)
{
    store_le32(out, 0x184c2102);
    size_t at = 4;
    for (size_t pos = 0; pos < size;) {
        int part = (int)MIN(size - pos, MIB(8));
        int n = LZ4_compress_default((const char *)data + pos, (char *)out + at + 4, part,
                                     (int)(cap - at - 4));
        need(n > 0);
        store_le32(out + at, (uint32_t)n);
        at += 4 + (size_t)n;
        pos += (size_t)part;
    }
    return at;
}

static size_t pack_gzip(const uint8_t *data, size_t size, uint8_t *out, size_t cap)
{
    z_stream z = {0};
    need(deflateInit2(&z, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) == Z_OK);
    z.next_in = (Bytef *)data;
    z.avail_in = (uInt)size;
    z.next_out = out;
    z.avail_out = (uInt)cap;
    need(deflate(&z, Z_FINISH) == Z_STREAM_END);
    deflateEnd(&z);
    return cap - z.avail_out;
}

static size_t pack_lzma(const uint8_t *data, size_t size, uint8_t *out, size_t cap)
{
    lzma_options_lzma opt;
    lzma_stream z = LZMA_STREAM_INIT;
    need(!lzma_lzma_preset(&opt, 1));
    need(lzma_alone_encoder(&z, &opt) == LZMA_OK);
    z.next_in = data;
    z.avail_in = size;
    z.next_out = out;
    z.avail_out = cap;
    need(lzma_code(&z, LZMA_FINISH) == LZMA_STREAM_END);
    lzma_end(&z);
    return cap - z.avail_out;
}

struct image image_pack(enum unpack_format format, const uint8_t *data, size_t size)
{
    size_t cap = size + size / 4 + 4096;
    struct image img = {.data = malloc(cap)};
    need(img.data);
    switch (format) {
    case UNPACK_NONE:
        memcpy(img.data, data, size);
        img.size = size;
        break;
    case UNPACK_GZIP:
        img.size = pack_gzip(data, size, img.data, cap);
        break;
    case UNPACK_XZ:
        need(lzma_easy_buffer_encode(1, LZMA_CHECK_CRC32, NULL, data, size, img.data, &img.size,
                                     cap) == LZMA_OK);
        break;
    case UNPACK_LZMA:
        img.size = pack_lzma(data, size, img.data, cap);
        break;
    case UNPACK_LZ4:
        img.size = pack_lz4(data, size, img.data, cap);
        break;
    case UNPACK_ZSTD:
        img.size = ZSTD_compress(img.data, cap, data, size, 3);
        need(!ZSTD_isError(img.size));
        break;
    case UNPACK_BZIP2: /* nothing here makes these: only their first bytes */
        memcpy(img.data, "BZh91AY&SY", img.size = 10);
        break;
    case UNPACK_LZO:
        memcpy(img.data, "\x89LZO\0\r\n\x1a\n", img.size = 9);
        break;
    }
    return img;
}

struct image image_bzimage(enum unpack_format format, const uint8_t *payload, size_t size,
                           uint32_t init_size)
{
    enum { SETUP = 2 * 512, PAYLOAD_OFFSET = 0x300 };
    struct image packed = image_pack(format, payload, size);
    bool tail = format != UNPACK_GZIP && format != UNPACK_NONE; /* the appended size */
    uint32_t payload_len = (uint32_t)packed.size + (tail ? 4 : 0);
    uint32_t code_len = (uint32_t)align_up(PAYLOAD_OFFSET + payload_len, 16);
    struct image img = {.size = SETUP + code_len};
    uint8_t *d = img.data = calloc(1, img.size);
    need(d);
    d[0x1f1] = 1; /* setup sectors beside the boot sector */
    store_le32(d + 0x1f4, code_len / 16);
    store_le16(d + 0x1fe, 0xaa55);
    d[0x200] = 0xeb;
    d[0x201] = 0x268 - 0x202;
    memcpy(d + 0x202, "HdrS", 4);
    store_le16(d + 0x206, 0x020f);
    d[0x211] = 1;
    store_le32(d + 0x22c, 0x7fffffff);
    store_le32(d + 0x230, 0x200000);
    d[0x234] = 1;
    store_le16(d + 0x236, 0x7f);
    store_le32(d + 0x238, 2047);
    store_le32(d + 0x248, PAYLOAD_OFFSET);
    store_le32(d + 0x24c, payload_len);
    store_le64(d + 0x258, 0x1000000);
    store_le32(d + 0x260, init_size);
    memcpy(d + SETUP + PAYLOAD_OFFSET, packed.data, packed.size);
    if (tail)
        store_le32(d + SETUP + PAYLOAD_OFFSET + packed.size, (uint32_t)size);
    free(packed.data);
    return img;
}

static size_t put_cpio(uint8_t *p, const char *name, uint32_t mode, uint32_t file_size)
{
    size_t name_len = strlen(name) + 1, body = align_up(110 + name_len, 4);
    char header[111];
    snprintf(header, sizeof(header), "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
             1u, mode, 0u, 0u, 1u, 0u, file_size, 0u, 0u, 0u, 0u, (unsigned)name_len, 0u);
    memcpy(p, header, 110);
    memcpy(p + 110, name, name_len);
    for (uint32_t i = 0; i < file_size; i++)
        p[body + i] = image_pattern(2, i);
    return align_up(body + file_size, 4);
}

struct image image_cpio(const char *name, uint32_t file_size)
{
    struct image img = {.data = calloc(1, strlen(name) + file_size + 1024)};
    need(img.data);
    img.size = put_cpio(img.data, name, 0100644, file_size);
    img.size += put_cpio(img.data + img.size, "TRAILER!!!", 0, 0);
    return img;
}
