/*
 * A 16550A UART behind a host console (NS PC16550D data sheet).
 *
 * A byte goes from THR to the console in the same moment, so the transmit queue here is only what the
 * console has refused so far. Input below the FIFO's trigger level is reported at once as a character
 * timeout: the line is idle when the console has no more. Interrupt identification is worked out from
 * the registers whenever it is asked for; only "THR became empty" is a fact of its own.
 * Machine lock held; console callbacks come from the event loop.
 */
#include "device/serial.h"

#include <errno.h>
#include <stdlib.h>

#include "backend/console/console.h"
#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"

enum { REG_DATA, REG_IER, REG_IIR_FCR, REG_LCR, REG_MCR, REG_LSR, REG_MSR, REG_SCRATCH };

enum {
    IER_RECEIVED = 1 << 0, IER_THR_EMPTY = 1 << 1, IER_LINE = 1 << 2, IER_MODEM = 1 << 3,
    IIR_NONE = 1, IIR_MODEM = 0, IIR_THR_EMPTY = 2, IIR_RECEIVED = 4, IIR_LINE = 6, IIR_TIMEOUT = 12,
    IIR_FIFOS = 0xc0,
    FCR_ENABLE = 1 << 0, FCR_CLEAR_RX = 1 << 1, FCR_CLEAR_TX = 1 << 2,
    LCR_DLAB = 1 << 7,
    MCR_DTR = 1 << 0, MCR_RTS = 1 << 1, MCR_OUT1 = 1 << 2, MCR_OUT2 = 1 << 3, MCR_LOOP = 1 << 4,
    LSR_READY = 1 << 0, LSR_OVERRUN = 1 << 1, LSR_THR_EMPTY = 1 << 5, LSR_IDLE = 1 << 6,
    MSR_CTS = 1 << 4, MSR_DSR = 1 << 5, MSR_RI = 1 << 6, MSR_DCD = 1 << 7,
    MSR_RI_FELL = 1 << 2,
};

#define FIFO_SIZE 16u
#define DEFAULT_DIVISOR 12u     /* 9600 baud */

struct serial {
    struct device dev;
    struct machine *machine;
    struct console *console;
    uint64_t base;
    struct irq_line irq;
    bool paused;

    uint8_t ier, fcr, lcr, mcr, scratch;
    uint8_t overrun;            /* LSR_OVERRUN or 0 */
    uint8_t msr;                /* lines in the high half, what changed in the low half */
    uint8_t thr_empty_event;    /* the THR-empty interrupt is due */
    uint16_t divisor;
    uint8_t rx[FIFO_SIZE], tx[FIFO_SIZE];
    uint8_t rx_count, tx_count; /* oldest first, at index 0 */
};

static unsigned capacity(const struct serial *s) { return s->fcr & FCR_ENABLE ? FIFO_SIZE : 1; }

static unsigned trigger(const struct serial *s)
{
    static const uint8_t level[] = {1, 4, 8, 14};
    return s->fcr & FCR_ENABLE ? level[s->fcr >> 6] : 1;
}

static uint8_t line_status(const struct serial *s)
{
    return (uint8_t)((s->rx_count ? LSR_READY : 0) | s->overrun |
                     (s->tx_count ? 0 : LSR_THR_EMPTY | LSR_IDLE));
}

/* The most urgent interrupt that is enabled and due. */
static uint8_t identify(const struct serial *s)
{
    if ((s->ier & IER_LINE) && s->overrun)
        return IIR_LINE;
    if ((s->ier & IER_RECEIVED) && s->rx_count)
        return s->rx_count >= trigger(s) ? IIR_RECEIVED : IIR_TIMEOUT;
    if ((s->ier & IER_THR_EMPTY) && s->thr_empty_event)
        return IIR_THR_EMPTY;
    if ((s->ier & IER_MODEM) && (s->msr & 0x0f))
        return IIR_MODEM;
    return IIR_NONE;
}

static void update_irq(struct serial *s)
{
    irq_set(&s->irq, identify(s) != IIR_NONE);
}

/* Receiving. */

static void rx_push(struct serial *s, uint8_t byte)
{
    if (s->rx_count < capacity(s)) {
        s->rx[s->rx_count++] = byte;
    } else {
        s->overrun = LSR_OVERRUN;
        if (!(s->fcr & FCR_ENABLE))
            s->rx[0] = byte; /* without FIFO the new byte destroys the old one */
    }
}

static uint8_t rx_pop(struct serial *s)
{
    if (!s->rx_count)
        return 0;
    uint8_t byte = s->rx[0];
    memmove(s->rx, s->rx + 1, --s->rx_count);
    return byte;
}

static size_t receive(void *opaque, const uint8_t *data, size_t len)
{
    struct serial *s = opaque;
    if (s->paused || (s->mcr & MCR_LOOP))
        return 0;
    size_t n = MIN(len, (size_t)(capacity(s) - MIN(capacity(s), s->rx_count)));
    for (size_t i = 0; i < n; i++)
        rx_push(s, data[i]);
    update_irq(s);
    return n;
}

unsigned serial_receive(struct serial *s, const uint8_t *data, unsigned len)
{
    return (unsigned)receive(s, data, len);
}

static void want_input(struct serial *s)
{
    if (s->console && !s->paused && s->rx_count < capacity(s))
        console_kick(s->console);
}

/* Sending. */

static void tx_flush(struct serial *s)
{
    if (!s->tx_count || s->paused || !console_can_write(s->console))
        return;
    console_write(s->console, s->tx, s->tx_count);
    s->tx_count = 0;
    s->thr_empty_event = 1;
}

static void writable(void *opaque)
{
    struct serial *s = opaque;
    tx_flush(s);
    update_irq(s);
}

static void send(struct serial *s, uint8_t byte)
{
    /* The line goes low in between, so that an edge-triggered input sees each "empty again". */
    s->thr_empty_event = 0;
    update_irq(s);
    if (s->mcr & MCR_LOOP) {
        rx_push(s, byte);
        s->thr_empty_event = 1;
    } else if (s->console && (s->tx_count || s->paused || !console_can_write(s->console))) {
        /* Written to a full FIFO, the newest byte is lost; a driver that looks at THRE never does. */
        if (s->tx_count < capacity(s))
            s->tx[s->tx_count++] = byte;
        tx_flush(s);
    } else {
        if (s->console)
            console_write(s->console, &byte, 1);
        s->thr_empty_event = 1;
    }
    update_irq(s);
}

/* Modem lines: the far end is there and ready, or, in loopback, our own outputs. */
static void update_modem(struct serial *s)
{
    uint8_t lines = MSR_CTS | MSR_DSR | MSR_DCD;
    if (s->mcr & MCR_LOOP)
        lines = (uint8_t)((s->mcr & MCR_RTS ? MSR_CTS : 0) | (s->mcr & MCR_DTR ? MSR_DSR : 0) |
                          (s->mcr & MCR_OUT1 ? MSR_RI : 0) | (s->mcr & MCR_OUT2 ? MSR_DCD : 0));
    uint8_t changed = (lines ^ s->msr) & (MSR_CTS | MSR_DSR | MSR_DCD);
    uint8_t fell = s->msr & ~lines & MSR_RI;
    s->msr = (uint8_t)(lines | (s->msr & 0x0f) | changed >> 4 | (fell ? MSR_RI_FELL : 0));
}

static void write_fcr(struct serial *s, uint8_t value)
{
    bool switched = (value ^ s->fcr) & FCR_ENABLE;
    if (switched || ((value & FCR_ENABLE) && (value & FCR_CLEAR_RX)))
        s->rx_count = 0;
    if (switched || ((value & FCR_ENABLE) && (value & FCR_CLEAR_TX))) {
        if (s->tx_count)
            s->thr_empty_event = 1;
        s->tx_count = 0;
    }
    /* Without bit 0 the others are not programmed. */
    s->fcr = value & FCR_ENABLE ? value & (FCR_ENABLE | 0xc0) : 0;
}

static uint8_t read_register(struct serial *s, unsigned reg)
{
    uint8_t value;
    switch (reg) {
    case REG_DATA:
        if (s->lcr & LCR_DLAB)
            return (uint8_t)s->divisor;
        value = rx_pop(s);
        want_input(s);
        return value;
    case REG_IER:
        return s->lcr & LCR_DLAB ? (uint8_t)(s->divisor >> 8) : s->ier;
    case REG_IIR_FCR:
        value = identify(s);
        if (value == IIR_THR_EMPTY)
            s->thr_empty_event = 0;
        return (uint8_t)(value | (s->fcr & FCR_ENABLE ? IIR_FIFOS : 0));
    case REG_LCR:
        return s->lcr;
    case REG_MCR:
        return s->mcr;
    case REG_LSR:
        value = line_status(s);
        s->overrun = 0;
        return value;
    case REG_MSR:
        value = s->msr;
        s->msr &= 0xf0;
        return value;
    default:
        return s->scratch;
    }
}

static void write_register(struct serial *s, unsigned reg, uint8_t value)
{
    switch (reg) {
    case REG_DATA:
        if (s->lcr & LCR_DLAB)
            s->divisor = (s->divisor & 0xff00) | value;
        else
            send(s, value);
        break;
    case REG_IER:
        if (s->lcr & LCR_DLAB) {
            s->divisor = (uint16_t)((s->divisor & 0xff) | value << 8);
            break;
        }
        /* Enabling the THR-empty interrupt while THR is empty raises it. */
        if ((value & ~s->ier & IER_THR_EMPTY) && !s->tx_count)
            s->thr_empty_event = 1;
        s->ier = value & 0x0f;
        break;
    case REG_IIR_FCR:
        write_fcr(s, value);
        want_input(s);
        break;
    case REG_LCR:
        s->lcr = value;
        break;
    case REG_MCR:
        s->mcr = value & 0x1f;
        update_modem(s);
        want_input(s);
        break;
    case REG_SCRATCH:
        s->scratch = value;
        break;
    default: /* LSR and MSR are read-only */
        break;
    }
}

/* Eight-bit registers: a wider access goes to as many of them. */
static uint64_t serial_read(void *opaque, uint64_t offset, unsigned size)
{
    struct serial *s = opaque;
    uint64_t value = 0;
    for (unsigned i = 0; i < size; i++)
        value |= (uint64_t)read_register(s, (unsigned)offset + i) << (8 * i);
    update_irq(s);
    return value;
}

static void serial_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct serial *s = opaque;
    for (unsigned i = 0; i < size; i++)
        write_register(s, (unsigned)offset + i, (uint8_t)(value >> (8 * i)));
    update_irq(s);
}

static const struct bus_ops serial_bus_ops = {.read = serial_read, .write = serial_write};

/* The device. */

static void serial_reset(struct device *dev)
{
    struct serial *s = container_of(dev, struct serial, dev);
    s->ier = s->fcr = s->lcr = s->scratch = s->overrun = s->thr_empty_event = 0;
    s->mcr = 0;
    s->msr = MSR_CTS | MSR_DSR | MSR_DCD;
    s->divisor = DEFAULT_DIVISOR;
    s->rx_count = s->tx_count = 0;
    update_irq(s);
}

static int serial_pause(struct device *dev)
{
    container_of(dev, struct serial, dev)->paused = true;
    return 0;
}

static int serial_resume(struct device *dev)
{
    struct serial *s = container_of(dev, struct serial, dev);
    s->paused = false;
    tx_flush(s);
    want_input(s);
    update_irq(s);
    return 0;
}

/* Both ways of naming a field once: the registers as saved. */
#define FOR_EACH_FIELD(op) \
    op(ier, 0x0f) op(fcr, 0xc1) op(lcr, 0xff) op(mcr, 0x1f) op(scratch, 0xff) op(overrun, LSR_OVERRUN) \
    op(msr, 0xff) op(thr_empty_event, 1) op(divisor, 0xffff) op(rx_count, 0x1f) op(tx_count, 0x1f)

static void serial_save(struct device *dev, struct state_writer *w)
{
    struct serial *s = container_of(dev, struct serial, dev);
#define SAVE(field, bits) state_put_u64(w, #field, s->field);
    FOR_EACH_FIELD(SAVE)
#undef SAVE
    state_put_bytes(w, "rx", s->rx, s->rx_count);
    state_put_bytes(w, "tx", s->tx, s->tx_count);
    state_put_u64(w, "irq_level", s->irq.level);
}

static int serial_load(struct device *dev, const struct state_reader *r)
{
    struct serial *s = container_of(dev, struct serial, dev);
    struct serial n = {0};
    uint64_t v;
#define LOAD(field, bits) \
    if (state_get_u64(r, #field, &v) || (v & ~(uint64_t)(bits))) \
        goto bad; \
    n.field = (__typeof__(n.field))v;
    FOR_EACH_FIELD(LOAD)
#undef LOAD
    if (n.rx_count > capacity(&n) || n.tx_count > capacity(&n) ||
        state_get_bytes(r, "rx", n.rx, n.rx_count) || state_get_bytes(r, "tx", n.tx, n.tx_count) ||
        state_get_u64(r, "irq_level", &v))
        goto bad;
#define TAKE(field, bits) s->field = n.field;
    FOR_EACH_FIELD(TAKE)
#undef TAKE
    memcpy(s->rx, n.rx, sizeof(s->rx));
    memcpy(s->tx, n.tx, sizeof(s->tx));
    s->irq.level = v & 1;
    return 0;

bad:
    log_error("saved %s: a field is missing or has a value that it cannot have", dev->id);
    return -EINVAL;
}

static void serial_destroy(struct device *dev)
{
    struct serial *s = container_of(dev, struct serial, dev);
    bus_remove(&s->machine->ports, s->base, s);
    if (s->console)
        console_connect(s->console, NULL, NULL);
    free(s);
}

static const struct device_ops serial_ops = {
    .name = "serial",
    .version = 1,
    .reset = serial_reset,
    .pause = serial_pause,
    .resume = serial_resume,
    .save = serial_save,
    .load = serial_load,
    .destroy = serial_destroy,
};

static const struct console_ops console_ops = {.receive = receive, .writable = writable};

struct serial *serial_create(struct machine *m, uint64_t base, unsigned gsi, struct console *console)
{
    struct serial *s = calloc(1, sizeof(*s));
    if (!s) {
        log_error("out of memory for a serial port");
        return NULL;
    }
    s->machine = m;
    s->base = base;
    s->irq = (struct irq_line){.router = &m->irq, .gsi = gsi};
    serial_reset(&s->dev);
    if (bus_add(&m->ports, base, SERIAL_PORTS, &serial_bus_ops, s, "serial")) {
        free(s);
        return NULL;
    }
    machine_add_device(m, &s->dev, &serial_ops);
    s->console = console;
    if (console)
        console_connect(console, &console_ops, s);
    return s;
}
