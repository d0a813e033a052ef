/* The Multiboot 1 header. See multiboot.h. */
#include "board/loader/multiboot.h"

#include "base/util.h"
#include "board/loader/source.h"

#define HEADER_MAGIC   0x1badb002u
#define HEADER_SEARCH  8192u /* it lies within the first bytes of the file, 4-aligned */
#define FLAG_ADDRESSES (1u << 16)
#define FLAGS_KNOWN    0x7u /* of the bits 0…15, which a loader must refuse if it does not know them \
                             */

int multiboot_parse(const struct source *src, const uint8_t *data, uint64_t size,
                    struct multiboot *mb)
{
    uint64_t end = MIN(size, HEADER_SEARCH), at;
    for (at = 0; at + 12 <= end; at += 4)
        if (load_le32(data + at) == HEADER_MAGIC &&
            load_le32(data + at) + load_le32(data + at + 4) + load_le32(data + at + 8) == 0)
            break;
    if (at + 12 > end)
        return 0;

    *mb = (struct multiboot){.flags = load_le32(data + at + 4)};
    if (mb->flags & 0xffffu & ~FLAGS_KNOWN)
        return source_error(
            src, "has a Multiboot header that asks for unknown features (flags %#x)", mb->flags);
    if (!(mb->flags & FLAG_ADDRESSES))
        return 1;

    if (at + 32 > size)
        return source_error(src, "is truncated inside its Multiboot header");
    uint32_t header_addr = load_le32(data + at + 12), load_addr = load_le32(data + at + 16);
    uint32_t load_end = load_le32(data + at + 20), bss_end = load_le32(data + at + 24);
    if (load_addr > header_addr || header_addr - load_addr > at)
        return source_error(src, "has a corrupt Multiboot header (load address %#x)", load_addr);
    mb->load_offset = at - (header_addr - load_addr);
    uint64_t len = size - mb->load_offset;
    if (load_end) {
        if (load_end < load_addr)
            return source_error(src, "has a corrupt Multiboot header (load end %#x)", load_end);
        if (load_end - load_addr > len)
            return source_error(
                src, "is truncated: its Multiboot header promises %u bytes more than there are",
                (unsigned)(load_end - load_addr - len));
        len = load_end - load_addr;
    }
    if (len > UINT32_MAX - load_addr)
        return source_error(src, "has a corrupt Multiboot header (it loads past 4 GiB)");
    if (bss_end && bss_end < load_addr + len)
        return source_error(src, "has a corrupt Multiboot header (bss end %#x)", bss_end);
    mb->has_addresses = true;
    mb->load_addr = load_addr;
    mb->load_len = (uint32_t)len;
    mb->memsz = bss_end ? bss_end - load_addr : (uint32_t)len;
    mb->entry = load_le32(data + at + 28);
    if (mb->entry - load_addr >= mb->memsz)
        return source_error(src, "has a corrupt Multiboot header (entry %#x)", mb->entry);
    return 1;
}
