/* See pack.h. */
#include "migrate/pack.h"

#include <stdlib.h>
#include <string.h>
#include <zstd.h>

#include "migrate/frame.h"

/* The fastest: links are about as fast as it is. */
#define LEVEL 1

struct packer {
    ZSTD_CCtx *zstd;            /* NULL: as it is */
};

struct packer *packer_create(bool compress)
{
    struct packer *p = calloc(1, sizeof(*p));

    if (!p || !compress)
        return p;
    p->zstd = ZSTD_createCCtx();
    if (!p->zstd) {
        free(p);
        return NULL;
    }
    ZSTD_CCtx_setParameter(p->zstd, ZSTD_c_compressionLevel, LEVEL);
    return p;
}

void packer_free(struct packer *p)
{
    if (p)
        ZSTD_freeCCtx(p->zstd);
    free(p);
}

size_t packer_put(struct packer *p, uint8_t *out, const uint8_t *contents, size_t len, unsigned *flags)
{
    size_t packed = p->zstd && len ? ZSTD_compress2(p->zstd, out, len, contents, len) : len;

    if (!ZSTD_isError(packed) && packed < len) {
        *flags = FRAME_FLAG_ZSTD;
        return packed;
    }
    *flags = 0;
    memcpy(out, contents, len);
    return len;
}

struct unpacker {
    ZSTD_DCtx *zstd;
    size_t most;
    uint8_t contents[];
};

struct unpacker *unpacker_create(size_t most)
{
    struct unpacker *u = calloc(1, sizeof(*u) + most);

    if (!u)
        return NULL;
    u->most = most;
    u->zstd = ZSTD_createDCtx();
    if (!u->zstd) {
        free(u);
        return NULL;
    }
    return u;
}

void unpacker_free(struct unpacker *u)
{
    if (u)
        ZSTD_freeDCtx(u->zstd);
    free(u);
}

const uint8_t *unpacker_take(struct unpacker *u, unsigned flags, const uint8_t *packed, size_t *len)
{
    if (flags & ~FRAME_FLAG_ZSTD)
        return NULL;
    if (!(flags & FRAME_FLAG_ZSTD))
        return *len <= u->most ? packed : NULL;
    *len = ZSTD_decompressDCtx(u->zstd, u->contents, u->most, packed, *len);
    return ZSTD_isError(*len) ? NULL : u->contents;
}
