/*
 * The virtio-pci transport, modern only: virtio 1.2 §4.1.
 *
 * One 64-bit memory BAR holds all structures, each on a page of its own (a page can later be given
 * to an engine's fast path). Interrupts: MSI-X with one vector per queue and one for the
 * configuration, or INTx with the ISR status byte.
 *
 * Odd accesses: reads of any size and alignment see the bytes of the structure and all ones beyond
 * it; writes must match a register exactly (or a 64-bit address as a whole) and are dropped
 * otherwise.
 */
#include "device/virtio/virtio.h"

#include <errno.h>
#include <string.h>

#include <linux/pci_regs.h>
#include <linux/virtio_config.h>
#include <linux/virtio_pci.h>

#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"

#define VIRTIO_VENDOR      0x1af4
#define VIRTIO_DEVICE_BASE 0x1040

/* The BAR. */
enum {
    BAR = 0,
    COMMON_OFFSET = 0x0000,
    ISR_OFFSET = 0x1000,
    DEVICE_OFFSET = 0x2000,
    NOTIFY_OFFSET = 0x3000,
    MSIX_OFFSET = 0x4000,
    PBA_OFFSET = 0x5000,
    BAR_SIZE = 0x8000,

    PAGE = 0x1000,
    NOTIFY_MULTIPLIER = 4,
    COMMON_BYTES = 60, /* up to queue_reset, §4.1.4.3 */
};

_Static_assert(PCI_MAX_MSIX * 16 <= PAGE, "the MSI-X table needs more than its page");
_Static_assert(VIRTIO_MAX_QUEUES < PCI_MAX_MSIX,
               "one vector per queue and one for the configuration");

#define ISR_QUEUE  1
#define ISR_CONFIG 2

static struct virtio_device *from_pci(struct pci_device *pci)
{
    return container_of(pci, struct virtio_device, pci.pci);
}

/* ---- Interrupts. ---- */

static void interrupt(struct virtio_device *v, const struct virtq *q)
{
    struct virtio_pci *t = &v->pci;
    if (pci_msix_enabled(&t->pci)) {
        uint16_t vector = q ? q->vector : t->config_vector;
        if (vector != VIRTQ_NO_VECTOR)
            pci_msix_notify(&t->pci, vector);
        return;
    }
    t->isr |= q ? ISR_QUEUE : ISR_CONFIG;
    pci_set_intx(&t->pci, true);
}

/* §4.1.4.5: reading takes the interrupt back. */
static uint8_t read_isr(struct virtio_device *v)
{
    uint8_t isr = v->pci.isr;
    v->pci.isr = 0;
    pci_set_intx(&v->pci.pci, false);
    return isr;
}

/* ---- Common configuration, §4.1.4.3. ---- */

static struct virtq *selected(struct virtio_device *v)
{
    return v->pci.queue_select < v->queue_count ? &v->queue[v->pci.queue_select] : NULL;
}

static uint32_t half(uint64_t value, uint32_t select)
{
    return select < 2 ? (uint32_t)(value >> (32 * select)) : 0;
}

/* The whole structure as the driver sees it now. */
static void render_common(struct virtio_device *v, uint8_t c[COMMON_BYTES])
{
    const struct virtio_pci *t = &v->pci;
    memset(c, 0, COMMON_BYTES);
    store_le32(c + VIRTIO_PCI_COMMON_DFSELECT, t->device_feature_select);
    store_le32(c + VIRTIO_PCI_COMMON_DF, half(v->offered, t->device_feature_select));
    store_le32(c + VIRTIO_PCI_COMMON_GFSELECT, t->driver_feature_select);
    store_le32(c + VIRTIO_PCI_COMMON_GF, half(v->features, t->driver_feature_select));
    store_le16(c + VIRTIO_PCI_COMMON_MSIX, t->config_vector);
    store_le16(c + VIRTIO_PCI_COMMON_NUMQ, (uint16_t)v->queue_count);
    c[VIRTIO_PCI_COMMON_STATUS] = v->status;
    c[VIRTIO_PCI_COMMON_CFGGENERATION] = v->config_generation;
    store_le16(c + VIRTIO_PCI_COMMON_Q_SELECT, t->queue_select);

    /* A queue that does not exist has size 0 and nothing else (§4.1.5.1.3). */
    const struct virtq *q = selected(v);
    if (!q) {
        store_le16(c + VIRTIO_PCI_COMMON_Q_MSIX, VIRTQ_NO_VECTOR);
        return;
    }
    store_le16(c + VIRTIO_PCI_COMMON_Q_SIZE, q->size);
    store_le16(c + VIRTIO_PCI_COMMON_Q_MSIX, q->vector);
    store_le16(c + VIRTIO_PCI_COMMON_Q_ENABLE, q->enabled);
    store_le16(c + VIRTIO_PCI_COMMON_Q_NOFF, (uint16_t)q->index);
    store_le64(c + VIRTIO_PCI_COMMON_Q_DESCLO, q->desc);
    store_le64(c + VIRTIO_PCI_COMMON_Q_AVAILLO, q->avail);
    store_le64(c + VIRTIO_PCI_COMMON_Q_USEDLO, q->used);
    store_le16(c + VIRTIO_PCI_COMMON_Q_NDATA, (uint16_t)q->index);
    /* queue_reset reads 0: a reset is complete when the write returns. */
}

/* What cannot be served reads back as "no vector". */
static uint16_t accept_vector(const struct virtio_device *v, uint64_t vector)
{
    return vector < v->pci.pci.msix_vectors ? (uint16_t)vector : VIRTQ_NO_VECTOR;
}

static void set_half(uint64_t *value, unsigned which, uint32_t half_value)
{
    unsigned shift = 32 * which;
    *value = (*value & ~((uint64_t)UINT32_MAX << shift)) | (uint64_t)half_value << shift;
}

static void write_features(struct virtio_device *v, uint32_t value)
{
    if (v->pci.driver_feature_select < 2 && !(v->status & VIRTIO_CONFIG_S_FEATURES_OK))
        set_half(&v->features, v->pci.driver_feature_select, value);
}

/* Registers of the selected queue; false: none of them. */
static void write_queue(struct virtio_device *v, uint64_t offset, uint32_t value)
{
    struct virtq *q = selected(v);
    if (!q)
        return;
    switch (offset) {
    case VIRTIO_PCI_COMMON_Q_MSIX:
        q->vector = accept_vector(v, value);
        return;
    case VIRTIO_PCI_COMMON_Q_ENABLE:
        if (value == 1)
            virtio_enable_queue(v, q);
        return;
    case VIRTIO_PCI_COMMON_Q_RESET:
        if (value == 1)
            virtio_reset_queue(v, q);
        return;
    }
    /* The rest is fixed once the queue works. */
    if (q->enabled)
        return;
    switch (offset) {
    case VIRTIO_PCI_COMMON_Q_SIZE:
        if (value && value <= q->max_size && (value & (value - 1)) == 0)
            q->size = (uint16_t)value;
        return;
    case VIRTIO_PCI_COMMON_Q_DESCLO:
    case VIRTIO_PCI_COMMON_Q_DESCHI:
        set_half(&q->desc, offset == VIRTIO_PCI_COMMON_Q_DESCHI, value);
        return;
    case VIRTIO_PCI_COMMON_Q_AVAILLO:
    case VIRTIO_PCI_COMMON_Q_AVAILHI:
        set_half(&q->avail, offset == VIRTIO_PCI_COMMON_Q_AVAILHI, value);
        return;
    case VIRTIO_PCI_COMMON_Q_USEDLO:
    case VIRTIO_PCI_COMMON_Q_USEDHI:
        set_half(&q->used, offset == VIRTIO_PCI_COMMON_Q_USEDHI, value);
        return;
    }
}

/* Width of the writable register that begins at offset; 0: there is none. */
static unsigned common_width(uint64_t offset)
{
    switch (offset) {
    case VIRTIO_PCI_COMMON_STATUS:
        return 1;
    case VIRTIO_PCI_COMMON_MSIX:
    case VIRTIO_PCI_COMMON_Q_SELECT:
    case VIRTIO_PCI_COMMON_Q_SIZE:
    case VIRTIO_PCI_COMMON_Q_MSIX:
    case VIRTIO_PCI_COMMON_Q_ENABLE:
    case VIRTIO_PCI_COMMON_Q_RESET:
        return 2;
    case VIRTIO_PCI_COMMON_DFSELECT:
    case VIRTIO_PCI_COMMON_GFSELECT:
    case VIRTIO_PCI_COMMON_GF:
    case VIRTIO_PCI_COMMON_Q_DESCLO:
    case VIRTIO_PCI_COMMON_Q_DESCHI:
    case VIRTIO_PCI_COMMON_Q_AVAILLO:
    case VIRTIO_PCI_COMMON_Q_AVAILHI:
    case VIRTIO_PCI_COMMON_Q_USEDLO:
    case VIRTIO_PCI_COMMON_Q_USEDHI:
        return 4;
    default:
        return 0;
    }
}

static void write_common(struct virtio_device *v, uint64_t offset, uint64_t value, unsigned size)
{
    struct virtio_pci *t = &v->pci;
    if (size == 8 &&
        (offset == VIRTIO_PCI_COMMON_Q_DESCLO || offset == VIRTIO_PCI_COMMON_Q_AVAILLO ||
         offset == VIRTIO_PCI_COMMON_Q_USEDLO)) {
        write_queue(v, offset, (uint32_t)value);
        write_queue(v, offset + 4, (uint32_t)(value >> 32));
        return;
    }
    if (size != common_width(offset)) {
        log_guest_error("%s: dropped a write of %u bytes at 0x%llx of the common configuration",
                        v->dev.id, size, (unsigned long long)offset);
        return;
    }
    switch (offset) {
    case VIRTIO_PCI_COMMON_DFSELECT:
        t->device_feature_select = (uint32_t)value;
        break;
    case VIRTIO_PCI_COMMON_GFSELECT:
        t->driver_feature_select = (uint32_t)value;
        break;
    case VIRTIO_PCI_COMMON_GF:
        write_features(v, (uint32_t)value);
        break;
    case VIRTIO_PCI_COMMON_MSIX:
        t->config_vector = accept_vector(v, value);
        break;
    case VIRTIO_PCI_COMMON_STATUS:
        virtio_set_status(v, (uint8_t)value);
        break;
    case VIRTIO_PCI_COMMON_Q_SELECT:
        t->queue_select = (uint16_t)value;
        break;
    default:
        write_queue(v, offset, (uint32_t)value);
    }
}

/* ---- The BAR. ---- */

static uint64_t bytes_of(const uint8_t *from, size_t bytes, uint64_t offset, unsigned size)
{
    uint64_t value = UINT64_MAX;
    if (offset < bytes)
        memcpy(&value, from + offset, MIN((size_t)size, bytes - (size_t)offset));
    return value;
}

static uint64_t bar_read(void *opaque, uint64_t offset, unsigned size)
{
    struct virtio_device *v = opaque;
    uint64_t at = offset % PAGE;
    switch (offset - at) {
    case COMMON_OFFSET: {
        uint8_t common[COMMON_BYTES];
        render_common(v, common);
        return bytes_of(common, sizeof(common), at, size);
    }
    case ISR_OFFSET: {
        uint8_t isr = at == 0 ? read_isr(v) : 0;
        return bytes_of(&isr, 1, at, size);
    }
    case DEVICE_OFFSET: {
        uint64_t value = 0;
        virtio_config_get(v, at, &value, size);
        return value;
    }
    case NOTIFY_OFFSET:
        return 0;
    case MSIX_OFFSET:
        return pci_msix_table_read(&v->pci.pci, at, size);
    case PBA_OFFSET:
        return pci_msix_pba_read(&v->pci.pci, at, size);
    default:
        return UINT64_MAX;
    }
}

static void bar_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct virtio_device *v = opaque;
    uint64_t at = offset % PAGE;
    switch (offset - at) {
    case COMMON_OFFSET:
        write_common(v, at, value, size);
        break;
    case DEVICE_OFFSET:
        virtio_config_set(v, at, &value, size);
        break;
    case NOTIFY_OFFSET:
        /* The place says which queue; the value repeats it (§4.1.5.2). */
        if (at % NOTIFY_MULTIPLIER == 0)
            virtio_notify(v, (unsigned)(at / NOTIFY_MULTIPLIER));
        break;
    case MSIX_OFFSET:
        pci_msix_table_write(&v->pci.pci, at, value, size);
        break;
    }
}

/* Of the queues that are processed in the event loop anyway. */
static bool bar_doorbell(void *opaque, unsigned i, uint64_t *offset)
{
    const struct virtio_device *v = opaque;
    for (unsigned q = 0; q < v->queue_count; q++) {
        if (v->ops->at_once >> q & 1)
            continue;
        if (i-- == 0) {
            *offset = NOTIFY_OFFSET + q * NOTIFY_MULTIPLIER;
            return true;
        }
    }
    return false;
}

static const struct bus_ops bar_ops = {.read = bar_read, .write = bar_write, .doorbell = bar_doorbell};

/*
 * ---- Configuration space: the PCI configuration access capability, §4.1.4.9, and the command
 * register: a function that is no bus master must not touch memory. ----
 */

enum { CAP_BAR = 4, CAP_OFFSET = 8, CAP_LENGTH = 12, CAP_DATA = 16, CAP_BYTES = 20 };

/* What the driver's choice of bar, offset and length selects; false: nothing that can be accessed.
 */
static bool window(const struct virtio_device *v, uint32_t *offset, uint32_t *length)
{
    const uint8_t *cap = v->pci.pci.config + v->pci.cfg_cap;
    *offset = load_le32(cap + CAP_OFFSET);
    *length = load_le32(cap + CAP_LENGTH);
    return cap[CAP_BAR] == BAR && (*length == 1 || *length == 2 || *length == 4) &&
           *offset % *length == 0 && *offset <= BAR_SIZE - *length;
}

static bool in_window(const struct virtio_device *v, unsigned offset, unsigned size)
{
    unsigned data = v->pci.cfg_cap + CAP_DATA;
    return offset >= data && size <= 4 && offset + size <= data + 4;
}

static bool config_read(struct pci_device *pci, unsigned offset, unsigned size, uint32_t *value)
{
    struct virtio_device *v = from_pci(pci);
    uint32_t at, length;
    if (in_window(v, offset, size) && window(v, &at, &length)) {
        uint64_t data = bar_read(v, at, length);
        memcpy(pci->config + v->pci.cfg_cap + CAP_DATA, &data, length);
    }
    return false;
}

static bool config_write(struct pci_device *pci, unsigned offset, unsigned size, uint32_t value)
{
    struct virtio_device *v = from_pci(pci);
    uint32_t at, length;
    if (offset <= PCI_COMMAND && offset + size > PCI_COMMAND)
        virtio_set_dma(v, value >> (8 * (PCI_COMMAND - offset)) & PCI_COMMAND_MASTER);
    if (!in_window(v, offset, size))
        return false;
    memcpy(pci->config + offset, &value, size);
    if (window(v, &at, &length)) {
        uint32_t data = 0;
        memcpy(&data, pci->config + v->pci.cfg_cap + CAP_DATA, length);
        bar_write(v, at, data, length);
    }
    return true;
}

static unsigned add_capability(struct pci_device *pci, uint8_t type, unsigned len, uint32_t offset,
                               uint32_t length)
{
    unsigned at = pci_add_capability(pci, PCI_CAP_ID_VNDR, len);
    uint8_t *cap = pci->config + at;
    cap[VIRTIO_PCI_CAP_LEN] = (uint8_t)len;
    cap[VIRTIO_PCI_CAP_CFG_TYPE] = type;
    cap[VIRTIO_PCI_CAP_BAR] = BAR;
    store_le32(cap + VIRTIO_PCI_CAP_OFFSET, offset);
    store_le32(cap + VIRTIO_PCI_CAP_LENGTH, length);
    return at;
}

int virtio_pci_attach(struct virtio_device *v, struct pci_host *host)
{
    struct virtio_pci *t = &v->pci;
    struct pci_device *pci = &t->pci;
    const unsigned cap = sizeof(struct virtio_pci_cap);
    v->interrupt = interrupt;
    t->config_vector = VIRTQ_NO_VECTOR;

    pci->name = v->ops->device.name;
    pci_set_ids(pci, VIRTIO_VENDOR, VIRTIO_DEVICE_BASE + v->ops->id, 1, v->ops->pci_class,
                VIRTIO_VENDOR, VIRTIO_DEVICE_BASE + v->ops->id);
    pci_set_bar(
        pci, BAR,
        &(struct pci_bar){
            .size = BAR_SIZE, .is_64 = true, .prefetchable = true, .ops = &bar_ops, .opaque = v});

    add_capability(pci, VIRTIO_PCI_CAP_COMMON_CFG, cap, COMMON_OFFSET, COMMON_BYTES);
    unsigned at = add_capability(pci, VIRTIO_PCI_CAP_NOTIFY_CFG, cap + 4, NOTIFY_OFFSET,
                                 v->queue_count * NOTIFY_MULTIPLIER);
    store_le32(pci->config + at + VIRTIO_PCI_NOTIFY_CAP_MULT, NOTIFY_MULTIPLIER);
    add_capability(pci, VIRTIO_PCI_CAP_ISR_CFG, cap, ISR_OFFSET, 1);
    if (v->config_size)
        add_capability(pci, VIRTIO_PCI_CAP_DEVICE_CFG, cap, DEVICE_OFFSET, v->config_size);
    t->cfg_cap = add_capability(pci, VIRTIO_PCI_CAP_PCI_CFG, CAP_BYTES, 0, 0);
    pci->writable[t->cfg_cap + CAP_BAR] = 0xff;
    memset(pci->writable + t->cfg_cap + CAP_OFFSET, 0xff, CAP_BYTES - CAP_OFFSET);
    pci->config_read = config_read;
    pci->config_write = config_write;
    pci_add_msix(pci, v->queue_count + 1, BAR, MSIX_OFFSET, PBA_OFFSET);
    pci_add_pcie_capability(pci);
    return pci_add_device(host, pci);
}

void virtio_pci_reset(struct virtio_device *v, bool power_on)
{
    struct virtio_pci *t = &v->pci;
    t->device_feature_select = t->driver_feature_select = 0;
    t->queue_select = 0;
    t->config_vector = VIRTQ_NO_VECTOR;
    read_isr(v);
    if (power_on) {
        pci_reset_device(&t->pci);
        virtio_set_dma(v, false);
    }
}

void virtio_pci_detach(struct virtio_device *v)
{
    pci_remove_device(&v->pci.pci);
}

void virtio_pci_save(struct virtio_device *v, struct state_writer *w)
{
    const struct virtio_pci *t = &v->pci;
    pci_save(&v->pci.pci, w);
    state_put_u64(w, "device_feature_select", t->device_feature_select);
    state_put_u64(w, "driver_feature_select", t->driver_feature_select);
    state_put_u64(w, "queue_select", t->queue_select);
    state_put_u64(w, "config_vector", t->config_vector);
    state_put_u64(w, "isr", t->isr);
}

int virtio_pci_load(struct virtio_device *v, const struct state_reader *r)
{
    struct virtio_pci *t = &v->pci;
    uint64_t device_select, driver_select, queue_select, vector, isr;
    int ret = pci_load(&t->pci, r);
    if (ret)
        return ret;
    if (state_get_u64(r, "device_feature_select", &device_select) ||
        state_get_u64(r, "driver_feature_select", &driver_select) ||
        state_get_u64(r, "queue_select", &queue_select) ||
        state_get_u64(r, "config_vector", &vector) || state_get_u64(r, "isr", &isr) ||
        device_select > UINT32_MAX || driver_select > UINT32_MAX || queue_select > UINT16_MAX ||
        isr > (ISR_QUEUE | ISR_CONFIG) ||
        (vector >= t->pci.msix_vectors && vector != VIRTQ_NO_VECTOR)) {
        log_error("%s: saved state: bad or missing field of the PCI transport", v->dev.id);
        return -EINVAL;
    }
    t->device_feature_select = (uint32_t)device_select;
    t->driver_feature_select = (uint32_t)driver_select;
    t->queue_select = (uint16_t)queue_select;
    t->config_vector = (uint16_t)vector;
    t->isr = (uint8_t)isr;
    virtio_set_dma(v, t->pci.config[PCI_COMMAND] & PCI_COMMAND_MASTER);
    return 0;
}
