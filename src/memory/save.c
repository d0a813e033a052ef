/*
 * Saving RAM as it was at one moment: copy before write. See memory.h for the promise.
 *
 * PAGE_SAVE is set on every page while nothing runs, and cleared once the page is copied, under the lock; so each page is
 * copied exactly once, and a writer that sees the flag clear comes after the copy. Setting the flags is the only part whose
 * time grows with RAM: a millisecond for some ten GiB.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/util.h"
#include "memory/memory.h"

static void set_flags(struct memory_region *r)
{
    uint64_t pages = r->size >> GUEST_PAGE_SHIFT, page = 0;
    const uint64_t save = PAGE_SAVE * 0x0101010101010101ull;

    /* Nobody else changes flags now, so eight at a time need not be atomic together. */
    for (; page + 8 <= pages; page += 8)
        *(uint64_t *)(void *)&r->flags[page] |= save;
    for (; page < pages; page++)
        atomic_fetch_or_explicit(&r->flags[page], PAGE_SAVE, memory_order_relaxed);
}

int memory_save_begin(struct memory *m, memory_save_fn *copy, void *opaque)
{
    int err = 0;

    pthread_mutex_lock(&m->dirty_lock);
    if (atomic_load(&m->saving)) {
        err = -EBUSY;
    } else {
        pthread_mutex_lock(&m->save_lock);
        m->save_copy = copy;
        m->save_opaque = opaque;
        m->save_region = 0;
        m->save_data_begin = m->save_data_end = 0;
        pthread_mutex_unlock(&m->save_lock);
        for (unsigned i = 0; i < m->regions; i++)
            set_flags(&m->region[i]);
        atomic_store(&m->saving, true);
        memory_rearm(m);
    }
    pthread_mutex_unlock(&m->dirty_lock);
    return err;
}

static void clear_flag(struct memory_region *r, uint64_t page)
{
    atomic_fetch_and(&r->flags[page], (uint8_t)~PAGE_SAVE);
}

static bool is_pending(const struct memory_region *r, uint64_t page)
{
    return atomic_load_explicit(&r->flags[page], memory_order_relaxed) & PAGE_SAVE;
}

void memory_before_write(struct memory *m, gpa_t gpa)
{
    struct memory_region *r = memory_find(m, gpa);
    uint64_t page = (gpa - r->base) >> GUEST_PAGE_SHIFT;

    pthread_mutex_lock(&m->save_lock);
    /* Seen pending before the lock, but saving may have ended meanwhile. */
    if (is_pending(r, page) && m->save_copy)
        m->save_copy(m->save_opaque, r->base + (page << GUEST_PAGE_SHIFT), r->host + (page << GUEST_PAGE_SHIFT));
    clear_flag(r, page);
    pthread_mutex_unlock(&m->save_lock);
}

void memory_prepare_write_slow(struct memory *m, gpa_t gpa, size_t len)
{
    while (len) {
        struct memory_region *r = memory_find(m, gpa);
        size_t n = MIN(len, GUEST_PAGE_SIZE - (gpa & ~GUEST_PAGE_MASK));

        if (!r)
            return;
        if (is_pending(r, (gpa - r->base) >> GUEST_PAGE_SHIFT))
            memory_before_write(m, gpa);
        gpa += n;
        len -= n;
    }
}

/*
 * Where the next byte of the region's memfd is that somebody touched. A page that was not is zero; reading it through the
 * mapping would make it take memory.
 */
static uint64_t skip_holes(struct memory *m, const struct memory_region *r, uint64_t offset)
{
    off_t data, hole;

    if (r->fd < 0)
        return offset;
    if (offset >= m->save_data_begin && offset < m->save_data_end)
        return offset;
    data = lseek(r->fd, (off_t)offset, SEEK_DATA);
    if (data < 0 && errno == ENXIO)
        return r->size;
    hole = data < 0 ? -1 : lseek(r->fd, data, SEEK_HOLE);
    if (hole < 0) {             /* a kernel that cannot tell */
        m->save_data_begin = 0;
        m->save_data_end = r->size;
        return offset;
    }
    m->save_data_begin = align_down((uint64_t)data, GUEST_PAGE_SIZE);
    m->save_data_end = (uint64_t)hole;
    return MAX(offset, m->save_data_begin);
}

/* Pages that were never touched: nothing to copy, also not later. */
static void clear_flags(struct memory_region *r, uint64_t from, uint64_t to)
{
    for (uint64_t page = from >> GUEST_PAGE_SHIFT; page < to >> GUEST_PAGE_SHIFT; page++)
        if (is_pending(r, page))
            clear_flag(r, page);
}

unsigned memory_save_next(struct memory *m, uint64_t *cursor, unsigned max, gpa_t gpa[], uint8_t *buf)
{
    unsigned count = 0;
    uint64_t before = 0;        /* of the regions before */

    for (unsigned i = 0; i < m->regions && count < max; before += m->region[i++].size) {
        struct memory_region *r = &m->region[i];
        uint64_t offset;

        if (*cursor >= before + r->size)
            continue;
        if (m->save_region != i) {
            m->save_region = i;
            m->save_data_begin = m->save_data_end = 0;
        }
        pthread_mutex_lock(&m->save_lock);
        for (offset = *cursor - before; offset < r->size && count < max; offset += GUEST_PAGE_SIZE) {
            uint64_t data = skip_holes(m, r, offset), page;

            clear_flags(r, offset, data);
            offset = data;
            page = offset >> GUEST_PAGE_SHIFT;
            if (offset >= r->size)
                break;
            if (!is_pending(r, page))
                continue;
            memcpy(buf + (size_t)count * GUEST_PAGE_SIZE, r->host + offset, GUEST_PAGE_SIZE);
            gpa[count++] = r->base + offset;
            clear_flag(r, page);
        }
        pthread_mutex_unlock(&m->save_lock);
        *cursor = before + MIN(offset, r->size);
    }
    return count;
}

void memory_save_end(struct memory *m)
{
    pthread_mutex_lock(&m->dirty_lock);
    pthread_mutex_lock(&m->save_lock);
    m->save_copy = NULL;
    for (unsigned i = 0; i < m->regions; i++)
        clear_flags(&m->region[i], 0, m->region[i].size);
    pthread_mutex_unlock(&m->save_lock);
    atomic_store(&m->saving, false);
    pthread_mutex_unlock(&m->dirty_lock);
}
