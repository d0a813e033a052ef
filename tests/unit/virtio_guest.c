/* A guest without a processor: see virtio_guest.h. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "virtio_guest.h"

#include <linux/pci_regs.h>
#include <linux/virtio_config.h>
#include <linux/virtio_pci.h>
#include <linux/virtio_ring.h>

#include "base/util.h"

static void set_gsi(void *opaque, unsigned gsi, bool level)
{
    struct guest *g = opaque;
    /* No assertion here: it would leave the test with the machine's lock held. */
    if (gsi < ARRAY_SIZE(g->gsi))
        g->gsi[gsi] = level;
}

static void send_msi(void *opaque, uint64_t address, uint32_t data)
{
    struct guest *g = opaque;
    g->msi_count++;
    if (address == 0xfee00000 && data < ARRAY_SIZE(g->msi_seen))
        g->msi_seen[data]++;
}

void guest_init(struct guest *g)
{
    memset(g, 0, sizeof(*g));
    assert_int_equal(machine_init(&g->m, true), 0);
    g->m.irq = (struct irq_router){.set_gsi = set_gsi, .send_msi = send_msi, .opaque = g};
    assert_int_equal(memory_add_ram(&g->m.memory, 0, GUEST_RAM_SPLIT), 0);
    assert_int_equal(memory_add_ram(&g->m.memory, GUEST_RAM_SPLIT, GUEST_RAM_END - GUEST_RAM_SPLIT),
                     0);
    g->host = pci_host_create(&g->m, &(struct pci_host_config){.ecam_base = GUEST_ECAM,
                                                               .ecam_size = 0x100000,
                                                               .mem32_base = 0xc0000000,
                                                               .mem32_size = 0x1000000,
                                                               .mem64_base = 0x4000000000,
                                                               .mem64_size = 0x100000000,
                                                               .io_base = 0x6000,
                                                               .io_size = 0x1000,
                                                               .intx_gsi = {16, 17, 18, 19}});
    assert_non_null(g->host);
    g->next_free = 0x10000;
}

void guest_destroy(struct guest *g)
{
    machine_destroy(&g->m);
}

gpa_t guest_alloc(struct guest *g, size_t len, size_t align)
{
    gpa_t at = align_up(g->next_free, align);
    g->next_free = at + len;
    assert_true(g->next_free <= GUEST_RAM_SPLIT);
    assert_int_equal(memory_fill(&g->m.memory, at, 0, len), 0);
    return at;
}

void guest_put(struct guest *g, gpa_t at, const void *data, size_t len)
{
    assert_int_equal(memory_write(&g->m.memory, at, data, len), 0);
}

void guest_get(struct guest *g, gpa_t at, void *data, size_t len)
{
    assert_int_equal(memory_read(&g->m.memory, at, data, len), 0);
}

uint16_t guest_get16(struct guest *g, gpa_t at)
{
    uint16_t v;
    guest_get(g, at, &v, 2);
    return v;
}

uint32_t guest_get32(struct guest *g, gpa_t at)
{
    uint32_t v;
    guest_get(g, at, &v, 4);
    return v;
}

void guest_put16(struct guest *g, gpa_t at, uint16_t v)
{
    guest_put(g, at, &v, 2);
}

struct rounds {
    struct loop *loop;
    struct loop_call call;
    unsigned left;
};

static void round_done(void *opaque)
{
    struct rounds *r = opaque;
    if (--r->left)
        loop_schedule(r->loop, &r->call);
    else
        loop_stop(r->loop);
}

void guest_run_loop(struct guest *g)
{
    struct rounds r = {.loop = g->m.loop, .left = 40};
    r.call = (struct loop_call){.fn = round_done, .opaque = &r};
    loop_schedule(g->m.loop, &r.call);
    assert_int_equal(loop_run(g->m.loop), 0);
}

void guest_run(struct guest *g)
{
    guest_run_loop(g);
    pthread_mutex_lock(&g->m.lock);
    clock_advance(g->m.clock, VIRTIO_SIGNAL_DELAY_NS);
    pthread_mutex_unlock(&g->m.lock);
    guest_run_loop(g);
}

/* ---- The driver. ---- */

uint32_t driver_config_read(struct driver *d, unsigned offset, unsigned size)
{
    return (uint32_t)bus_read(&d->g->m.mmio, GUEST_ECAM + ((uint64_t)d->slot << 15) + offset, size);
}

void driver_config_write(struct driver *d, unsigned offset, uint32_t value, unsigned size)
{
    bus_write(&d->g->m.mmio, GUEST_ECAM + ((uint64_t)d->slot << 15) + offset, value, size);
}

void driver_find(struct driver *d, struct guest *g, uint16_t pci_device)
{
    *d = (struct driver){.g = g};
    pthread_mutex_lock(&g->m.lock);
    pci_assign_bars(g->host);
    pthread_mutex_unlock(&g->m.lock);
    for (d->slot = 0; d->slot < 32; d->slot++)
        if (driver_config_read(d, 0, 4) == (0x1af4u | (uint32_t)pci_device << 16))
            break;
    assert_true(d->slot < 32);
    assert_true(driver_config_read(d, PCI_REVISION_ID, 1) >= 1);
    uint32_t low = driver_config_read(d, PCI_BASE_ADDRESS_0, 4);
    assert_int_equal(low & 7, PCI_BASE_ADDRESS_MEM_TYPE_64);
    d->bar = (low & ~15u) | (uint64_t)driver_config_read(d, PCI_BASE_ADDRESS_1, 4) << 32;
    assert_true(d->bar != 0);

    assert_true(driver_config_read(d, PCI_STATUS, 2) & PCI_STATUS_CAP_LIST);
    for (unsigned at = driver_config_read(d, PCI_CAPABILITY_LIST, 1); at;
         at = driver_config_read(d, at + 1, 1)) {
        if (driver_config_read(d, at, 1) == PCI_CAP_ID_MSIX) {
            d->msix_cap = at;
            uint32_t table = driver_config_read(d, at + 4, 4);
            assert_int_equal(table & 7, 0);
            d->msix_table = d->bar + table;
        }
        if (driver_config_read(d, at, 1) != PCI_CAP_ID_VNDR)
            continue;
        assert_true(driver_config_read(d, at + VIRTIO_PCI_CAP_LEN, 1) >= 16);
        uint64_t where = d->bar + driver_config_read(d, at + VIRTIO_PCI_CAP_OFFSET, 4);
        switch (driver_config_read(d, at + VIRTIO_PCI_CAP_CFG_TYPE, 1)) {
        case VIRTIO_PCI_CAP_COMMON_CFG:
            assert_true(driver_config_read(d, at + VIRTIO_PCI_CAP_LENGTH, 4) >= 56);
            d->common = where;
            break;
        case VIRTIO_PCI_CAP_NOTIFY_CFG:
            d->notify = where;
            d->notify_multiplier = driver_config_read(d, at + VIRTIO_PCI_NOTIFY_CAP_MULT, 4);
            break;
        case VIRTIO_PCI_CAP_ISR_CFG:
            d->isr = where;
            break;
        case VIRTIO_PCI_CAP_DEVICE_CFG:
            d->device = where;
            break;
        case VIRTIO_PCI_CAP_PCI_CFG:
            d->cfg_cap = at;
            break;
        }
    }
    assert_true(d->common && d->notify && d->isr && d->cfg_cap && d->msix_cap);
}

uint64_t driver_read(struct driver *d, unsigned reg, unsigned size)
{
    return bus_read(&d->g->m.mmio, d->common + reg, size);
}

void driver_write(struct driver *d, unsigned reg, uint64_t value, unsigned size)
{
    bus_write(&d->g->m.mmio, d->common + reg, value, size);
}

uint8_t driver_status(struct driver *d)
{
    return (uint8_t)driver_read(d, VIRTIO_PCI_COMMON_STATUS, 1);
}

void driver_set_status(struct driver *d, uint8_t status)
{
    driver_write(d, VIRTIO_PCI_COMMON_STATUS, status, 1);
}

uint64_t driver_features(struct driver *d)
{
    driver_write(d, VIRTIO_PCI_COMMON_DFSELECT, 0, 4);
    uint64_t features = driver_read(d, VIRTIO_PCI_COMMON_DF, 4);
    driver_write(d, VIRTIO_PCI_COMMON_DFSELECT, 1, 4);
    return features | driver_read(d, VIRTIO_PCI_COMMON_DF, 4) << 32;
}

void driver_accept(struct driver *d, uint64_t features)
{
    for (unsigned i = 0; i < 2; i++) {
        driver_write(d, VIRTIO_PCI_COMMON_GFSELECT, i, 4);
        driver_write(d, VIRTIO_PCI_COMMON_GF, (uint32_t)(features >> (32 * i)), 4);
    }
}

void driver_msix(struct driver *d)
{
    unsigned vectors = (driver_config_read(d, d->msix_cap + 2, 2) & 0x7ff) + 1;
    for (unsigned i = 0; i < vectors; i++) {
        uint64_t entry = d->msix_table + 16 * i;
        bus_write(&d->g->m.mmio, entry, 0xfee00000, 4);
        bus_write(&d->g->m.mmio, entry + 4, 0, 4);
        bus_write(&d->g->m.mmio, entry + 8, 0x40 + i, 4);
        bus_write(&d->g->m.mmio, entry + 12, 0, 4);
    }
    driver_config_write(d, d->msix_cap + 2, 0x8000, 2);
}

void driver_negotiate(struct driver *d, uint64_t features)
{
    driver_set_status(d, 0);
    assert_int_equal(driver_status(d), 0);
    driver_set_status(d, VIRTIO_CONFIG_S_ACKNOWLEDGE);
    driver_set_status(d, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER);
    driver_accept(d, features | VIRTIO_BIT(VIRTIO_F_VERSION_1));
    driver_set_status(d, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER |
                             VIRTIO_CONFIG_S_FEATURES_OK);
    assert_true(driver_status(d) & VIRTIO_CONFIG_S_FEATURES_OK);
    driver_write(d, VIRTIO_PCI_COMMON_MSIX, 0, 2);
}

void driver_start(struct driver *d)
{
    driver_set_status(d, VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER |
                             VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
}

/* ---- Rings. ---- */

void ring_setup(struct ring *r, struct driver *d, unsigned index, unsigned size)
{
    *r = (struct ring){.d = d, .index = index, .size = size};
    r->desc = guest_alloc(d->g, 16 * size, 16);
    r->avail = guest_alloc(d->g, 6 + 2 * size, 2);
    r->used = guest_alloc(d->g, 6 + 8 * size, 4);
    driver_write(d, VIRTIO_PCI_COMMON_Q_SELECT, index, 2);
    assert_true(driver_read(d, VIRTIO_PCI_COMMON_Q_SIZE, 2) >= size);
    driver_write(d, VIRTIO_PCI_COMMON_Q_SIZE, size, 2);
    assert_int_equal(driver_read(d, VIRTIO_PCI_COMMON_Q_SIZE, 2), size);
    const unsigned regs[] = {VIRTIO_PCI_COMMON_Q_DESCLO, VIRTIO_PCI_COMMON_Q_AVAILLO,
                             VIRTIO_PCI_COMMON_Q_USEDLO};
    const gpa_t at[] = {r->desc, r->avail, r->used};
    for (unsigned i = 0; i < 3; i++) {
        driver_write(d, regs[i], (uint32_t)at[i], 4);
        driver_write(d, regs[i] + 4, (uint32_t)(at[i] >> 32), 4);
    }
    driver_write(d, VIRTIO_PCI_COMMON_Q_MSIX, index + 1, 2);
    driver_write(d, VIRTIO_PCI_COMMON_Q_ENABLE, 1, 2);
    assert_int_equal(driver_read(d, VIRTIO_PCI_COMMON_Q_ENABLE, 2), 1);
}

void ring_desc(struct ring *r, unsigned i, gpa_t at, uint32_t len, uint16_t flags, uint16_t next)
{
    const struct vring_desc desc = {.addr = at, .len = len, .flags = flags, .next = next};
    guest_put(r->d->g, r->desc + 16 * i, &desc, sizeof(desc));
}

void ring_add_head(struct ring *r, uint16_t head)
{
    guest_put16(r->d->g, r->avail + 4 + 2 * (r->avail_idx % r->size), head);
    r->avail_idx++;
    guest_put16(r->d->g, r->avail + 2, r->avail_idx);
}

uint16_t ring_add(struct ring *r, const struct buffer *b, unsigned count)
{
    uint16_t head = (uint16_t)(r->next_desc % r->size);
    for (unsigned i = 0; i < count; i++) {
        unsigned at = r->next_desc++ % r->size;
        ring_desc(r, at, b[i].at, b[i].len,
                  (b[i].in ? VRING_DESC_F_WRITE : 0) | (i + 1 < count ? VRING_DESC_F_NEXT : 0),
                  (uint16_t)(r->next_desc % r->size));
    }
    ring_add_head(r, head);
    return head;
}

void ring_notify(struct ring *r)
{
    driver_write(r->d, VIRTIO_PCI_COMMON_Q_SELECT, r->index, 2);
    uint64_t off = driver_read(r->d, VIRTIO_PCI_COMMON_Q_NOFF, 2);
    bus_write(&r->d->g->m.mmio, r->d->notify + off * r->d->notify_multiplier, r->index, 2);
}

bool ring_used(struct ring *r, uint32_t *head, uint32_t *len)
{
    if (guest_get16(r->d->g, r->used + 2) == r->seen)
        return false;
    gpa_t at = r->used + 4 + 8 * (r->seen++ % r->size);
    *head = guest_get32(r->d->g, at);
    *len = guest_get32(r->d->g, at + 4);
    return true;
}
