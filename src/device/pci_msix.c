/*
 * MSI-X: the vector table, the pending bits, and sending (PCI Local Bus 3.0 §6.8.2).
 *
 * Table and pending bits lie in a BAR of the device, whose owner forwards accesses here. Machine lock held.
 */
#include <errno.h>

#include "base/log.h"
#include "device/machine.h"
#include "device/pci_internal.h"

#define CONTROL_ENABLE (1u << 15)
#define CONTROL_MASK_ALL (1u << 14)
#define ENTRY_SIZE 16u
#define ENTRY_MASKED 1u

void pci_add_msix(struct pci_device *pci, unsigned vectors, unsigned bar, uint32_t table_off,
                  uint32_t pba_off)
{
    if (vectors == 0 || vectors > PCI_MAX_MSIX) {
        log_error("%s: %u MSI-X vectors, possible are 1 to %u", pci->name, vectors, PCI_MAX_MSIX);
        __builtin_trap();
    }
    unsigned at = pci_add_capability(pci, PCI_CAP_ID_MSIX, 12);
    store_le16(&pci->config[at + 2], (uint16_t)(vectors - 1));
    store_le16(&pci->writable[at + 2], CONTROL_ENABLE | CONTROL_MASK_ALL);
    store_le32(&pci->config[at + 4], table_off | bar);
    store_le32(&pci->config[at + 8], pba_off | bar);
    pci->msix_cap = at;
    pci->msix_vectors = vectors;
    pci_msix_reset(pci);
}

void pci_msix_reset(struct pci_device *pci)
{
    memset(pci->msix, 0, sizeof(pci->msix));
    for (unsigned i = 0; i < PCI_MAX_MSIX; i++)
        pci->msix[i].control = ENTRY_MASKED;
    pci->msix_pending = 0;
}

bool pci_msix_enabled(const struct pci_device *pci)
{
    return pci->msix_cap && (load_le16(&pci->config[pci->msix_cap + 2]) & CONTROL_ENABLE);
}

static bool may_send(const struct pci_device *pci, unsigned vector)
{
    return !(load_le16(&pci->config[pci->msix_cap + 2]) & CONTROL_MASK_ALL) &&
           !(pci->msix[vector].control & ENTRY_MASKED) &&
           (load_le16(&pci->config[PCI_COMMAND]) & PCI_COMMAND_MASTER);
}

static void send(struct pci_device *pci, unsigned vector)
{
    pci->msix_pending &= ~(UINT64_C(1) << vector);
    msi_send(&pci->host->machine->irq, pci->msix[vector].address, pci->msix[vector].data);
}

void pci_msix_notify(struct pci_device *pci, unsigned vector)
{
    if (vector >= pci->msix_vectors || !pci_msix_enabled(pci) || !pci->host)
        return;
    if (may_send(pci, vector))
        send(pci, vector);
    else
        pci->msix_pending |= UINT64_C(1) << vector;
}

void pci_msix_update(struct pci_device *pci)
{
    if (!pci_msix_enabled(pci) || !pci->host)
        return;
    for (uint64_t left = pci->msix_pending; left; left &= left - 1) {
        unsigned vector = (unsigned)__builtin_ctzll(left);
        if (may_send(pci, vector))
            send(pci, vector);
    }
}

/* Table entries are four dwords; guests use aligned dword and qword accesses, others are undefined (§6.8.2). */
static uint32_t *table_dword(struct pci_device *pci, uint64_t offset, unsigned *field)
{
    if (offset / ENTRY_SIZE >= pci->msix_vectors)
        return NULL;
    struct msix_entry *e = &pci->msix[offset / ENTRY_SIZE];
    *field = (unsigned)(offset % ENTRY_SIZE / 4);
    switch (*field) {
    case 0:
    case 1:
        return (uint32_t *)&e->address + *field; /* little-endian hosts */
    case 2:
        return &e->data;
    default:
        return &e->control;
    }
}

uint64_t pci_msix_table_read(struct pci_device *pci, uint64_t offset, unsigned size)
{
    uint64_t value = 0;
    for (unsigned done = 0; done < size;) {
        unsigned field, part = (unsigned)((offset + done) & 3), n = MIN(4 - part, size - done);
        uint32_t *dword = table_dword(pci, offset + done, &field);
        uint64_t v = dword ? (uint64_t)(*dword >> (8 * part)) : 0;
        if (n < 4)
            v &= (UINT64_C(1) << (8 * n)) - 1;
        value |= v << (8 * done);
        done += n;
    }
    return value;
}

void pci_msix_table_write(struct pci_device *pci, uint64_t offset, uint64_t value, unsigned size)
{
    if (size < 4 || (offset & 3))
        return;
    for (unsigned done = 0; done < size; done += 4) {
        unsigned field;
        uint32_t *dword = table_dword(pci, offset + done, &field);
        uint32_t v = (uint32_t)(value >> (8 * done));
        if (!dword)
            return;
        if (field == 0)
            v &= ~3u;
        else if (field == 3)
            v &= ENTRY_MASKED;
        *dword = v;
    }
    pci_msix_update(pci);
}

uint64_t pci_msix_pba_read(struct pci_device *pci, uint64_t offset, unsigned size)
{
    if (offset >= 8)
        return 0;
    return pci->msix_pending >> (8 * offset);
}

void pci_msix_save(struct pci_device *pci, struct state_writer *w)
{
    state_put_bytes(w, "pci_msix", pci->msix, pci->msix_vectors * sizeof(pci->msix[0]));
    state_put_u64(w, "pci_msix_pending", pci->msix_pending);
}

int pci_msix_load(struct pci_device *pci, const struct state_reader *r)
{
    struct msix_entry table[PCI_MAX_MSIX];
    uint64_t pending;
    if (state_get_bytes(r, "pci_msix", table, pci->msix_vectors * sizeof(table[0])) ||
        state_get_u64(r, "pci_msix_pending", &pending)) {
        log_error("saved %s: its MSI-X table is missing or has another number of vectors", pci->name);
        return -EINVAL;
    }
    for (unsigned i = 0; i < pci->msix_vectors; i++) {
        pci->msix[i] = table[i];
        pci->msix[i].address &= ~UINT64_C(3);
        pci->msix[i].control &= ENTRY_MASKED;
    }
    if (pci->msix_vectors < 64)
        pending &= (UINT64_C(1) << pci->msix_vectors) - 1;
    pci->msix_pending = pending;
    return 0;
}

_Static_assert(sizeof(struct msix_entry) == ENTRY_SIZE, "saved as bytes, and addressed by dwords");
