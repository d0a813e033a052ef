/*
 * The local APIC of one vCPU: registers, priorities, acceptance and inter-processor interrupts
 * (SDM vol. 3A ch. 11).
 *
 * Its own vCPU's thread works the registers; any thread delivers. Each change of IRR, ISR or TPR ends in
 * update(), which keeps l->deliverable right, so that the question before each entry into the
 * guest is one load. Nothing that is told to others (signals, IPIs, ends of interrupt) happens under the
 * lock.
 */
#include <errno.h>

#include "base/log.h"
#include "device/irqchip/internal.h"
#include "device/machine.h"

#define BASE_BSP (UINT64_C(1) << 8)
#define BASE_X2APIC (UINT64_C(1) << 10)
#define BASE_ENABLED (UINT64_C(1) << 11)
#define BASE_MODE (BASE_X2APIC | BASE_ENABLED)
#define BASE_ADDRESS UINT64_C(0x000ffffffffff000)

/* Integrated APIC, six LVT entries, can leave the EOI broadcast out. */
#define VERSION (0x14u | 5u << 16 | 1u << 24)

#define ICR_DELIVERY_STATUS (1u << 12)
#define ICR_BITS 0x000ccfffu    /* but for delivery status, which is never seen set */

#define ESR_SEND_ILLEGAL_VECTOR (1u << 5)
#define ESR_RECEIVE_ILLEGAL_VECTOR (1u << 6)
#define ESR_ILLEGAL_REGISTER (1u << 7)

/* Bits that exist in the registers that a guest writes. */
#define SVR_BITS (0xffu | LAPIC_SVR_ENABLED | LAPIC_SVR_NO_EOI_BROADCAST)
#define LVT_ERROR_BITS 0x000100ffu
#define LVT_TIMER_BITS 0x000700ffu
#define LVT_MODE_BITS 0x000107ffu
#define LVT_LINT_BITS 0x0001a7ffu

static bool x2apic(uint64_t base) { return (base & BASE_MODE) == BASE_MODE; }
static bool xapic(uint64_t base) { return (base & BASE_MODE) == BASE_ENABLED; }

static uint64_t base_of(const struct lapic *l)
{
    return atomic_load_explicit(&l->base, memory_order_relaxed);
}

/* A register of this or another LAPIC, without its lock: old or new, but not torn. */
static uint32_t peek(const struct lapic *l, unsigned index)
{
    return __atomic_load_n(&l->reg[index], __ATOMIC_RELAXED);
}

static bool bit_test(const uint32_t *map, uint8_t v) { return map[v / 32] >> (v % 32) & 1; }
static void bit_set(uint32_t *map, uint8_t v) { map[v / 32] |= 1u << (v % 32); }
static void bit_clear(uint32_t *map, uint8_t v) { map[v / 32] &= ~(1u << (v % 32)); }

static int highest(const uint32_t *map)
{
    for (int i = 7; i >= 0; i--)
        if (map[i])
            return 32 * i + 31 - __builtin_clz(map[i]);
    return -1;
}

/* After a change of IRR, ISR or TPR. True: there is something new for the vCPU to take. */
static bool update(struct lapic *l)
{
    int irr = highest(&l->reg[LAPIC_IRR]), isr = highest(&l->reg[LAPIC_ISR]);
    uint32_t tpr = l->reg[LAPIC_TPR];
    uint32_t serving = isr < 0 ? 0 : (uint32_t)isr & 0xf0;
    uint32_t ppr = (tpr & 0xf0) >= serving ? tpr : serving;
    __atomic_store_n(&l->reg[LAPIC_PPR], ppr, __ATOMIC_RELAXED);

    int now = irr >= 0 && ((uint32_t)irr & 0xf0) > (ppr & 0xf0) ? irr : -1;
    int before = atomic_load_explicit(&l->deliverable, memory_order_relaxed);
    if (now != before)
        atomic_store_explicit(&l->deliverable, now, memory_order_release);
    return now >= 0 && now != before;
}

void lapic_tell(struct lapic *l, bool changed)
{
    if (changed && l->signal)
        l->signal(l->signal_opaque, LAPIC_INTR, 0);
}

static void request(struct lapic *l, uint8_t vector, bool level)
{
    bit_set(&l->reg[LAPIC_IRR], vector);
    if (level)
        bit_set(&l->reg[LAPIC_TMR], vector);
    else
        bit_clear(&l->reg[LAPIC_TMR], vector);
}

/* Notes an error and interrupts if LVT ERROR says so. Lock held; true as from update(). */
static bool error(struct lapic *l, uint32_t bit)
{
    l->errors |= bit;
    uint32_t lvt = l->reg[LAPIC_LVT_ERROR];
    if ((lvt & LAPIC_LVT_MASKED) || (uint8_t)lvt < 16)
        return false;
    request(l, (uint8_t)lvt, false);
    return update(l);
}

bool lapic_local(struct lapic *l, unsigned lvt)
{
    uint32_t v = l->reg[lvt];
    if (v & LAPIC_LVT_MASKED)
        return false;
    if ((uint8_t)v < 16)
        return error(l, ESR_RECEIVE_ILLEGAL_VECTOR);
    request(l, (uint8_t)v, false);
    return update(l);
}

/* Life. */

static void set_identity(struct lapic *l)
{
    if (x2apic(base_of(l))) {
        l->reg[LAPIC_ID] = l->id;
        l->reg[LAPIC_LDR] = (l->id & ~0xfu) << 12 | 1u << (l->id & 0xf);
    } else {
        l->reg[LAPIC_ID] = l->id << 24;
        l->reg[LAPIC_LDR] = 0;
    }
}

/* The registers as after INIT (11.4.7.3). Lock held. */
static void reset_registers(struct lapic *l)
{
    lapic_timer_stop(l);
    memset(l->reg, 0, sizeof(l->reg));
    set_identity(l);
    l->reg[LAPIC_VERSION] = VERSION;
    l->reg[LAPIC_DFR] = UINT32_MAX;
    l->reg[LAPIC_SVR] = 0xff;
    for (unsigned i = LAPIC_LVT_TIMER; i <= LAPIC_LVT_ERROR; i++)
        l->reg[i] = LAPIC_LVT_MASKED;
    l->errors = 0;
    update(l);
}

void lapic_reset(struct lapic *l, bool init)
{
    pthread_mutex_lock(&l->lock);
    if (!init)
        l->base = LAPIC_DEFAULT_BASE | BASE_ENABLED | (l->id == 0 ? BASE_BSP : 0);
    reset_registers(l);
    pthread_mutex_unlock(&l->lock);
}

void lapic_init(struct lapic *l, struct irqchip *chip, unsigned id)
{
    l->chip = chip;
    l->id = id;
    l->deliverable = -1;
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&l->lock, &attr);
    pthread_mutexattr_destroy(&attr);
    lapic_timer_init(l);
    lapic_reset(l, false);
}

void lapic_destroy(struct lapic *l)
{
    timer_disarm(l->chip->machine->clock, &l->timer);
    pthread_mutex_destroy(&l->lock);
}

void lapic_connect(struct lapic *l, lapic_signal_fn *signal, void *opaque)
{
    pthread_mutex_lock(&l->lock);
    l->signal = signal;
    l->signal_opaque = opaque;
    pthread_mutex_unlock(&l->lock);
}

uint64_t lapic_base(const struct lapic *l)
{
    return base_of(l);
}

int lapic_set_base(struct lapic *l, uint64_t value)
{
    if (value & ~(BASE_ADDRESS | BASE_MODE | BASE_BSP))
        return -EINVAL;
    uint64_t before = base_of(l) & BASE_MODE, after = value & BASE_MODE;
    /* SDM vol. 3A figure 11-27: x2APIC needs the enable bit, is entered from xAPIC and left for disabled. */
    if (after == BASE_X2APIC || (before == BASE_MODE && after == BASE_ENABLED) ||
        (before == 0 && after == BASE_MODE))
        return -EINVAL;
    pthread_mutex_lock(&l->lock);
    atomic_store_explicit(&l->base, value, memory_order_relaxed);
    if (before != after) {
        if (after == 0) {
            reset_registers(l);
        } else if (after == BASE_MODE) {
            set_identity(l);
            l->reg[LAPIC_ICR2] = 0;
            l->reg[LAPIC_DFR] = UINT32_MAX; /* not there in this mode, and gone when it is left */
        }
    }
    pthread_mutex_unlock(&l->lock);
    return 0;
}

/* Interrupts to the vCPU. */

int lapic_pending(struct lapic *l)
{
    return atomic_load_explicit(&l->deliverable, memory_order_relaxed);
}

int lapic_ack(struct lapic *l)
{
    pthread_mutex_lock(&l->lock);
    int vector = atomic_load_explicit(&l->deliverable, memory_order_relaxed);
    if (vector >= 0) {
        bit_clear(&l->reg[LAPIC_IRR], (uint8_t)vector);
        bit_set(&l->reg[LAPIC_ISR], (uint8_t)vector);
        update(l);
    }
    pthread_mutex_unlock(&l->lock);
    return vector;
}

static void end_of_interrupt(struct lapic *l)
{
    bool changed = false, broadcast = false;
    pthread_mutex_lock(&l->lock);
    int vector = highest(&l->reg[LAPIC_ISR]);
    if (vector >= 0) {
        bit_clear(&l->reg[LAPIC_ISR], (uint8_t)vector);
        broadcast = bit_test(&l->reg[LAPIC_TMR], (uint8_t)vector) &&
                    !(l->reg[LAPIC_SVR] & LAPIC_SVR_NO_EOI_BROADCAST);
        changed = update(l);
    }
    pthread_mutex_unlock(&l->lock);
    lapic_tell(l, changed);
    if (broadcast)
        ioapic_eoi(&l->chip->ioapic, (uint8_t)vector);
}

/* Messages from others. */

bool lapic_matches(struct lapic *l, const struct apic_message *m)
{
    uint64_t base = base_of(l);
    if (!(base & BASE_ENABLED))
        return false;
    if (m->broadcast)
        return true;
    if (!m->logical)
        return m->dest == l->id;
    uint32_t ldr = peek(l, LAPIC_LDR);
    if (x2apic(base))
        return ldr >> 16 == m->dest >> 16 && (ldr & m->dest & 0xffff);
    if (m->dest > 0xff)
        return false;
    ldr >>= 24;
    if (peek(l, LAPIC_DFR) >> 28 == 0xf)
        return ldr & m->dest;
    return ldr >> 4 == m->dest >> 4 && (ldr & m->dest & 0xf);
}

int lapic_priority(struct lapic *l)
{
    if (!(base_of(l) & BASE_ENABLED) || !(peek(l, LAPIC_SVR) & LAPIC_SVR_ENABLED))
        return -1;
    return (int)peek(l, LAPIC_PPR);
}

bool lapic_deliver(struct lapic *l, const struct apic_message *m)
{
    bool accepted = false, changed = false;
    switch (m->mode) {
    case APIC_FIXED:
    case APIC_LOWEST:
        pthread_mutex_lock(&l->lock);
        if (l->reg[LAPIC_SVR] & LAPIC_SVR_ENABLED) {
            if (m->vector < 16) {
                changed = error(l, ESR_RECEIVE_ILLEGAL_VECTOR);
            } else {
                request(l, m->vector, m->level);
                changed = update(l);
                accepted = true;
            }
        }
        pthread_mutex_unlock(&l->lock);
        lapic_tell(l, changed);
        return accepted;
    case APIC_SMI:
    case APIC_NMI:
    case APIC_INIT:
    case APIC_SIPI: {
        static const enum lapic_signal signal[] = {
            [APIC_SMI] = LAPIC_SMI, [APIC_NMI] = LAPIC_NMI, [APIC_INIT] = LAPIC_INIT,
            [APIC_SIPI] = LAPIC_SIPI,
        };
        if (l->signal)
            l->signal(l->signal_opaque, signal[m->mode], m->mode == APIC_SIPI ? m->vector : 0);
        return true;
    }
    default: /* ExtINT asks an 8259, which this machine has not; 3 is reserved */
        return false;
    }
}

void lapic_pulse_lint(struct lapic *l, unsigned pin)
{
    if (!(base_of(l) & BASE_ENABLED))
        return;
    uint32_t lvt = peek(l, LAPIC_LVT_LINT0 + pin);
    if (lvt & LAPIC_LVT_MASKED)
        return;
    struct apic_message m = {.mode = lvt >> 8 & 7, .vector = (uint8_t)lvt};
    if (m.mode != APIC_LOWEST && m.mode != APIC_SIPI) /* not modes of an LVT */
        lapic_deliver(l, &m);
}

/* Registers, from the own vCPU's thread. */

static void send_ipi(struct lapic *l, uint32_t icr, uint32_t dest, bool broadcast)
{
    struct apic_message m = {
        .dest = dest,
        .broadcast = broadcast,
        .logical = icr >> 11 & 1,
        .mode = icr >> 8 & 7,
        .vector = (uint8_t)icr,
    };
    if (m.mode == APIC_EXTINT || m.mode == 3)
        return;
    /* INIT level de-assert: modern processors do nothing on it (10.6.1 of older, 11.6.1 of newer editions). */
    if (m.mode == APIC_INIT && (icr >> 14 & 3) == 2)
        return;
    if (m.mode <= APIC_LOWEST && m.vector < 16) {
        pthread_mutex_lock(&l->lock);
        bool changed = error(l, ESR_SEND_ILLEGAL_VECTOR);
        pthread_mutex_unlock(&l->lock);
        lapic_tell(l, changed);
        return;
    }
    switch (icr >> 18 & 3) {
    case 0:
        irqchip_deliver(l->chip, &m, NULL);
        break;
    case 1:
        if (base_of(l) & BASE_ENABLED)
            lapic_deliver(l, &m);
        break;
    case 2:
        m.broadcast = true;
        irqchip_deliver(l->chip, &m, NULL);
        break;
    case 3:
        m.broadcast = true;
        irqchip_deliver(l->chip, &m, l);
        break;
    }
}

static uint32_t lvt_bits(unsigned index)
{
    switch (index) {
    case LAPIC_LVT_TIMER:
        return LVT_TIMER_BITS;
    case LAPIC_LVT_LINT0:
    case LAPIC_LVT_LINT1:
        return LVT_LINT_BITS;
    case LAPIC_LVT_ERROR:
        return LVT_ERROR_BITS;
    default:
        return LVT_MODE_BITS;
    }
}

/* The bits of a register that a guest may write in x2APIC mode; others raise #GP. 0: not writable at all. */
static uint32_t writable_bits(unsigned index)
{
    switch (index) {
    case LAPIC_TPR:
        return 0xff;
    case LAPIC_SVR:
        return SVR_BITS;
    case LAPIC_TIMER_INIT:
        return UINT32_MAX;
    case LAPIC_TIMER_DIV:
        return 0xb;
    case LAPIC_LVT_TIMER ... LAPIC_LVT_ERROR:
        return lvt_bits(index);
    default:
        return 0;
    }
}

/* What both modes write alike. value has no reserved bits left. Lock held; true as from update(). */
static bool write_common(struct lapic *l, unsigned index, uint32_t value)
{
    switch (index) {
    case LAPIC_TPR:
        l->reg[index] = value;
        return update(l);
    case LAPIC_SVR:
        __atomic_store_n(&l->reg[index], value, __ATOMIC_RELAXED);
        if (!(value & LAPIC_SVR_ENABLED))
            for (unsigned i = LAPIC_LVT_TIMER; i <= LAPIC_LVT_ERROR; i++)
                l->reg[i] |= LAPIC_LVT_MASKED;
        return false;
    case LAPIC_ESR:
        l->reg[index] = l->errors;
        l->errors = 0;
        return false;
    case LAPIC_TIMER_INIT:
        lapic_timer_set_count(l, value);
        return false;
    case LAPIC_TIMER_DIV:
        lapic_timer_set_divider(l, value);
        return false;
    case LAPIC_LVT_TIMER ... LAPIC_LVT_ERROR:
        if (!(l->reg[LAPIC_SVR] & LAPIC_SVR_ENABLED))
            value |= LAPIC_LVT_MASKED;
        if (index == LAPIC_LVT_TIMER)
            lapic_timer_set_lvt(l, value);
        else
            l->reg[index] = value;
        return false;
    default:
        return false;
    }
}

/* Registers that read alike in both modes. False: no such register. Lock held. */
static bool read_common(struct lapic *l, unsigned index, uint32_t *value)
{
    switch (index) {
    case LAPIC_TIMER_COUNT:
        *value = lapic_timer_count(l);
        return true;
    case LAPIC_ID:
    case LAPIC_VERSION:
    case LAPIC_TPR:
    case LAPIC_PPR:
    case LAPIC_LDR:
    case LAPIC_SVR ... LAPIC_ESR:
    case LAPIC_ICR:
    case LAPIC_LVT_TIMER ... LAPIC_TIMER_INIT:
    case LAPIC_TIMER_DIV:
        *value = l->reg[index];
        return true;
    default:
        return false;
    }
}

uint64_t lapic_mmio_read(struct lapic *l, unsigned offset, unsigned size)
{
    if (!xapic(base_of(l)))
        return UINT64_MAX;
    unsigned index = offset >> 4, byte = offset & 0xf;
    if (byte >= 4)
        return 0; /* registers are the first four bytes of each sixteen */
    bool changed = false;
    uint32_t value = 0;
    pthread_mutex_lock(&l->lock);
    switch (index) {
    case LAPIC_APR:
    case LAPIC_EOI:
    case LAPIC_RRD:
        break;
    case LAPIC_DFR:
    case LAPIC_ICR2:
        value = l->reg[index];
        break;
    default:
        if (!read_common(l, index, &value))
            changed = error(l, ESR_ILLEGAL_REGISTER);
    }
    pthread_mutex_unlock(&l->lock);
    lapic_tell(l, changed);
    return value >> (8 * byte);
}

void lapic_mmio_write(struct lapic *l, unsigned offset, uint64_t wide, unsigned size)
{
    /* Only whole registers can be written (11.4.1). */
    if (!xapic(base_of(l)) || (offset & 0xf) || size < 4)
        return;
    unsigned index = offset >> 4;
    uint32_t value = (uint32_t)wide;
    if (index == LAPIC_EOI) {
        end_of_interrupt(l);
        return;
    }
    bool changed = false;
    uint32_t dest;
    pthread_mutex_lock(&l->lock);
    switch (index) {
    case LAPIC_ICR:
        l->reg[index] = value & ICR_BITS;
        dest = l->reg[LAPIC_ICR2] >> 24;
        pthread_mutex_unlock(&l->lock);
        send_ipi(l, value, dest, dest == 0xff);
        return;
    case LAPIC_ICR2:
        l->reg[index] = value & 0xff000000;
        break;
    case LAPIC_LDR:
        __atomic_store_n(&l->reg[index], value & 0xff000000, __ATOMIC_RELAXED);
        break;
    case LAPIC_DFR:
        __atomic_store_n(&l->reg[index], value | 0x0fffffff, __ATOMIC_RELAXED);
        break;
    case LAPIC_ESR:
        write_common(l, index, 0);
        break;
    case LAPIC_ID:      /* fixed, as on current processors */
    case LAPIC_VERSION:
    case LAPIC_APR:
    case LAPIC_PPR:
    case LAPIC_RRD:
    case LAPIC_ISR ... LAPIC_ESR - 1:
    case LAPIC_TIMER_COUNT:
        break;
    default: {
        uint32_t bits = writable_bits(index);
        if (bits)
            changed = write_common(l, index, value & bits);
        else
            changed = error(l, ESR_ILLEGAL_REGISTER);
    }
    }
    pthread_mutex_unlock(&l->lock);
    lapic_tell(l, changed);
}

int lapic_msr_read(struct lapic *l, uint32_t msr, uint64_t *value)
{
    unsigned index = msr - 0x800;
    if (!x2apic(base_of(l)) || index >= LAPIC_REGS)
        return -EINVAL;
    pthread_mutex_lock(&l->lock);
    uint32_t low = 0;
    bool ok = read_common(l, index, &low);
    *value = low | (index == LAPIC_ICR ? (uint64_t)l->reg[LAPIC_ICR2] << 32 : 0);
    pthread_mutex_unlock(&l->lock);
    return ok ? 0 : -EINVAL;
}

int lapic_msr_write(struct lapic *l, uint32_t msr, uint64_t value)
{
    unsigned index = msr - 0x800;
    if (!x2apic(base_of(l)) || index >= LAPIC_REGS)
        return -EINVAL;
    uint32_t low = (uint32_t)value, dest = (uint32_t)(value >> 32);
    if (index == LAPIC_ICR) {
        low &= ~ICR_DELIVERY_STATUS;
        if (low & ~ICR_BITS)
            return -EINVAL;
        pthread_mutex_lock(&l->lock);
        l->reg[LAPIC_ICR] = low;
        l->reg[LAPIC_ICR2] = dest;
        pthread_mutex_unlock(&l->lock);
        send_ipi(l, low, dest, dest == UINT32_MAX);
        return 0;
    }
    if (dest)
        return -EINVAL;
    if (index == LAPIC_EOI) {
        if (low)
            return -EINVAL;
        end_of_interrupt(l);
        return 0;
    }
    if (index == LAPIC_SELF_IPI) {
        if (low > 0xff)
            return -EINVAL;
        send_ipi(l, low | 1u << 18, 0, false);
        return 0;
    }
    bool writable = index == LAPIC_ESR ? !low : writable_bits(index) && !(low & ~writable_bits(index));
    if (!writable)
        return -EINVAL;
    pthread_mutex_lock(&l->lock);
    bool changed = write_common(l, index, low);
    pthread_mutex_unlock(&l->lock);
    lapic_tell(l, changed);
    return 0;
}

uint8_t lapic_cr8(struct lapic *l)
{
    return (uint8_t)(peek(l, LAPIC_TPR) >> 4);
}

void lapic_set_cr8(struct lapic *l, uint8_t cr8)
{
    pthread_mutex_lock(&l->lock);
    bool changed = write_common(l, LAPIC_TPR, (uint32_t)(cr8 & 0xf) << 4);
    pthread_mutex_unlock(&l->lock);
    lapic_tell(l, changed);
}

/* State. */

void lapic_save(struct lapic *l, struct state_writer *w)
{
    uint32_t page[LAPIC_REGS * 4] = {0};
    pthread_mutex_lock(&l->lock);
    for (unsigned i = 0; i < LAPIC_REGS; i++)
        page[4 * i] = l->reg[i];
    page[4 * LAPIC_TIMER_COUNT] = lapic_timer_count(l);
    state_put_u64(w, "base", l->base);
    state_put_bytes(w, "registers", page, sizeof(page));
    state_put_u64(w, "errors", l->errors);
    lapic_timer_save(l, w);
    pthread_mutex_unlock(&l->lock);
}

/* The registers of a page, as far as a LAPIC can have them. The timer is stopped. Lock held. */
static void set_registers(struct lapic *l, uint64_t base, const uint32_t page[LAPIC_REGS * 4])
{
    l->base = base;
    reset_registers(l);
    for (unsigned i = 0; i < LAPIC_REGS; i++)
        if (writable_bits(i))
            l->reg[i] = page[4 * i] & writable_bits(i);
    for (unsigned i = LAPIC_ISR; i < LAPIC_ESR; i++)
        l->reg[i] = page[4 * i];
    for (unsigned i = 0; i < 3; i++) /* vectors 0…15 do not exist */
        l->reg[LAPIC_ISR + 8 * i] &= 0xffff0000;
    l->reg[LAPIC_ESR] = page[4 * LAPIC_ESR] & 0xff;
    l->reg[LAPIC_ICR] = page[4 * LAPIC_ICR] & ICR_BITS;
    l->reg[LAPIC_ICR2] = page[4 * LAPIC_ICR2];
    if (!x2apic(base)) {
        l->reg[LAPIC_ICR2] &= 0xff000000;
        l->reg[LAPIC_LDR] = page[4 * LAPIC_LDR] & 0xff000000;
        l->reg[LAPIC_DFR] = page[4 * LAPIC_DFR] | 0x0fffffff;
    }
}

int lapic_load(struct lapic *l, const struct state_reader *r)
{
    uint32_t page[LAPIC_REGS * 4];
    uint64_t base, errors;
    if (state_get_u64(r, "base", &base) || state_get_u64(r, "errors", &errors) ||
        state_get_bytes(r, "registers", page, sizeof(page))) {
        log_error("saved LAPIC %u: fields are missing", l->id);
        return -EINVAL;
    }
    if ((base & ~(BASE_ADDRESS | BASE_MODE | BASE_BSP)) || (base & BASE_MODE) == BASE_X2APIC) {
        log_error("saved LAPIC %u: its base register cannot be %#llx", l->id, (unsigned long long)base);
        return -EINVAL;
    }
    pthread_mutex_lock(&l->lock);
    set_registers(l, base, page);
    l->errors = (uint32_t)errors & 0xff;
    int ret = lapic_timer_load(l, r);
    update(l);
    pthread_mutex_unlock(&l->lock);
    return ret;
}

void lapic_take(struct lapic *l, struct lapic_image *image)
{
    *image = (struct lapic_image){0};
    pthread_mutex_lock(&l->lock);
    for (unsigned i = 0; i < LAPIC_REGS; i++)
        image->page[4 * i] = l->reg[i];
    image->page[4 * LAPIC_TIMER_COUNT] = lapic_timer_count(l);
    if (l->timer_deadline == UINT64_MAX)
        image->page[4 * LAPIC_TIMER_INIT] = 0;
    image->base = base_of(l);
    image->tsc_deadline = l->tsc_deadline;
    lapic_timer_stop(l);
    pthread_mutex_unlock(&l->lock);
}

void lapic_put(struct lapic *l, const struct lapic_image *image, uint64_t guest_tsc_now)
{
    uint64_t base = image->base & (BASE_ADDRESS | BASE_MODE | BASE_BSP);
    if ((base & BASE_MODE) == BASE_X2APIC)
        base &= ~BASE_MODE;
    pthread_mutex_lock(&l->lock);
    set_registers(l, base, image->page);
    lapic_timer_continue(l, image->page[4 * LAPIC_TIMER_COUNT], image->tsc_deadline, guest_tsc_now);
    bool changed = update(l);
    pthread_mutex_unlock(&l->lock);
    lapic_tell(l, changed);
}
