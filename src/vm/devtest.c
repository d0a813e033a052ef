/*
 * The device test protocol's server: lines in, operations on the machine, lines out.
 *
 * Runs as a callback of the machine's event loop, with the machine lock held, so that a request sees
 * devices between two of their own callbacks and never in the midst of one. Interrupts are
 * recorded on their way by standing between devices and irqchip (struct irq_router).
 * The grammar is in docs/device-tests.md; a request that is wrong gets "ERR" and changes nothing.
 */
#include "vm/devtest.h"

#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "device/irqchip/irqchip.h"
#include "device/machine.h"
#include "device/pci.h"
#include "device/power.h"

#define MAX_LINE (32u << 20)
#define MAX_ARGS 4
#define MAX_RECORDS 4096    /* interrupts and signals kept; later ones are counted as lost */
#define MAX_CPUS 64
#define MAX_TRANSFER (8u << 20)

struct record {
    enum { RECORD_GSI, RECORD_MSI } kind;
    uint64_t address;       /* MSI; GSI: the number */
    uint32_t data;          /* MSI; GSI: the level */
};

struct cpu {
    struct devtest *t;
    unsigned id;
    unsigned nmi, smi, init, sipi, sipi_vector, intr;   /* signals since they were last asked for */
};

struct devtest {
    struct machine *m;
    struct irqchip *chip;
    int in, out;
    struct loop_fd *watch;
    char *line;                 /* what has come so far; the first `have` bytes */
    size_t have, size;
    char *answer;               /* being put together */
    size_t answer_len, answer_size;
    bool failed, quit, paused;

    struct irq_router router;   /* the machine's own */
    struct record record[MAX_RECORDS];
    unsigned records, lost;
    struct cpu cpu[MAX_CPUS];

    enum machine_event event;
    int event_status;
    unsigned events;

    /* wait_irq: the answer is given by an interrupt or by the timer. */
    bool waiting;
    int timer_fd;
    struct loop_fd *timer_watch;
    struct loop_call wake;
};

/* Answers. */

static void put(struct devtest *t, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

static bool reserve(struct devtest *t, size_t more)
{
    if (t->answer_size - t->answer_len > more)
        return true;
    size_t size = 2 * (t->answer_len + more + 64);
    char *p = realloc(t->answer, size);
    if (!p) {
        log_error("out of memory for an answer");
        t->failed = true;
        return false;
    }
    t->answer = p;
    t->answer_size = size;
    return true;
}

static void put(struct devtest *t, const char *fmt, ...)
{
    char text[256];
    va_list ap;
    va_start(ap, fmt);
    int n = vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    size_t len = MIN((size_t)MAX(n, 0), sizeof(text) - 1);
    if (reserve(t, len + 1)) {
        memcpy(t->answer + t->answer_len, text, len + 1);
        t->answer_len += len;
    }
}

static void put_hex(struct devtest *t, const uint8_t *data, size_t len)
{
    static const char digit[] = "0123456789abcdef";
    if (!reserve(t, 2 * len + 1))
        return;
    char *p = t->answer + t->answer_len;
    for (size_t i = 0; i < len; i++) {
        *p++ = digit[data[i] >> 4];
        *p++ = digit[data[i] & 15];
    }
    *p = '\0';
    t->answer_len += 2 * len;
}

static void send_answer(struct devtest *t)
{
    put(t, "\n");
    for (size_t done = 0; done < t->answer_len && !t->failed;) {
        ssize_t n = send(t->out, t->answer + done, t->answer_len - done, MSG_NOSIGNAL);
        if (n < 0 && errno == ENOTSOCK)
            n = write(t->out, t->answer + done, t->answer_len - done);
        if (n > 0)
            done += (size_t)n;
        else if (n == 0 || errno != EINTR)
            t->failed = true;
    }
    t->answer_len = 0;
}

/* Recording. */

static void record(struct devtest *t, struct record r)
{
    if (t->records < MAX_RECORDS)
        t->record[t->records++] = r;
    else
        t->lost++;
    if (t->waiting)
        loop_schedule(t->m->loop, &t->wake);
}

static void record_gsi(void *opaque, unsigned gsi, bool level)
{
    struct devtest *t = opaque;
    record(t, (struct record){.kind = RECORD_GSI, .address = gsi, .data = level});
    t->router.set_gsi(t->router.opaque, gsi, level);
}

static void record_msi(void *opaque, uint64_t address, uint32_t data)
{
    struct devtest *t = opaque;
    record(t, (struct record){.kind = RECORD_MSI, .address = address, .data = data});
    t->router.send_msi(t->router.opaque, address, data);
}

/* The irqchip calls this from under our own requests and from callbacks of the loop: one thread. */
static void record_signal(void *opaque, enum lapic_signal signal, unsigned value)
{
    struct cpu *c = opaque;
    switch (signal) {
    case LAPIC_INTR:
        c->intr++;
        break;
    case LAPIC_NMI:
        c->nmi++;
        break;
    case LAPIC_SMI:
        c->smi++;
        break;
    case LAPIC_INIT:
        c->init++;
        break;
    case LAPIC_SIPI:
        c->sipi++;
        c->sipi_vector = value;
        break;
    }
}

static void record_event(void *opaque, enum machine_event event, int status)
{
    struct devtest *t = opaque;
    t->event = event;
    t->event_status = status;
    t->events++;
}

/* Arguments. */

struct request {
    unsigned args;
    char *text[MAX_ARGS];
    uint64_t arg[MAX_ARGS];     /* the number; 0 for what is none */
    bool number[MAX_ARGS];
};

static int hex_digit(char c)
{
    if (c >= '0' && c <= '9')
        return c - '0';
    if (c >= 'a' && c <= 'f')
        return c - 'a' + 10;
    return -1;
}

/* "0x0102…" into bytes. The caller frees. NULL: answered. */
static uint8_t *hex_bytes(struct devtest *t, const char *text, size_t *len)
{
    size_t digits = strlen(text);
    if (digits < 2 || strncmp(text, "0x", 2) || digits % 2) {
        put(t, "ERR bytes are 0x and an even number of lower-case hexadecimal digits");
        return NULL;
    }
    *len = digits / 2 - 1;
    uint8_t *bytes = malloc(*len + 1);
    if (!bytes) {
        put(t, "ERR out of memory");
        return NULL;
    }
    for (size_t i = 0; i < *len; i++) {
        int high = hex_digit(text[2 + 2 * i]), low = hex_digit(text[3 + 2 * i]);
        if (high < 0 || low < 0) {
            put(t, "ERR not a hexadecimal digit");
            free(bytes);
            return NULL;
        }
        bytes[i] = (uint8_t)(high << 4 | low);
    }
    return bytes;
}

static struct lapic *lapic_arg(struct devtest *t, const struct request *q)
{
    struct lapic *l = t->chip ? irqchip_lapic(t->chip, (unsigned)MIN(q->arg[0], UINT32_MAX)) : NULL;
    if (!l || q->arg[0] >= MAX_CPUS) {
        put(t, "ERR no such CPU");
        return NULL;
    }
    return l;
}

/* Commands. Each puts its answer together; the caller ends the line. */

static void cmd_in(struct devtest *t, struct request *q, unsigned size)
{
    if (q->arg[0] > 0xffff)
        put(t, "ERR ports end at 0xffff");
    else
        put(t, "OK 0x%" PRIx64, bus_read_locked(&t->m->ports, q->arg[0], size));
}

static void cmd_out(struct devtest *t, struct request *q, unsigned size)
{
    if (q->arg[0] > 0xffff) {
        put(t, "ERR ports end at 0xffff");
        return;
    }
    bus_write_locked(&t->m->ports, q->arg[0], q->arg[1], size);
    put(t, "OK");
}

/* As a vCPU does it: RAM if the bytes are RAM, else the MMIO bus. */
static void cmd_read_value(struct devtest *t, struct request *q, unsigned size)
{
    uint64_t value = 0;
    if (memory_read(&t->m->memory, q->arg[0], &value, size))
        value = bus_read_locked(&t->m->mmio, q->arg[0], size);
    put(t, "OK 0x%" PRIx64, value);
}

static void cmd_write_value(struct devtest *t, struct request *q, unsigned size)
{
    if (memory_write(&t->m->memory, q->arg[0], &q->arg[1], size))
        bus_write_locked(&t->m->mmio, q->arg[0], q->arg[1], size);
    put(t, "OK");
}

static void cmd_read(struct devtest *t, struct request *q, unsigned size)
{
    uint8_t *bytes = q->arg[1] <= MAX_TRANSFER ? malloc(q->arg[1] + 1) : NULL;
    if (!bytes)
        put(t, "ERR at most %u bytes", MAX_TRANSFER);
    else if (memory_read(&t->m->memory, q->arg[0], bytes, q->arg[1]))
        put(t, "ERR not all of it is RAM");
    else {
        put(t, "OK 0x");
        put_hex(t, bytes, q->arg[1]);
    }
    free(bytes);
}

static void cmd_write(struct devtest *t, struct request *q, unsigned size)
{
    size_t len;
    uint8_t *bytes = hex_bytes(t, q->text[1], &len);
    if (!bytes)
        return;
    if (memory_write(&t->m->memory, q->arg[0], bytes, len))
        put(t, "ERR not all of it is RAM");
    else
        put(t, "OK");
    free(bytes);
}

static void cmd_memset(struct devtest *t, struct request *q, unsigned size)
{
    if (memory_fill(&t->m->memory, q->arg[0], (uint8_t)q->arg[2], q->arg[1]))
        put(t, "ERR not all of it is RAM");
    else
        put(t, "OK");
}

static bool config_address(struct devtest *t, struct request *q, struct pci_host **host, uint64_t *at)
{
    *host = pci_host_find(t->m);
    *at = q->arg[0] << 15 | q->arg[1];
    if (*host && q->arg[0] < PCI_SLOTS && q->arg[1] < PCI_CONFIG_SIZE)
        return true;
    put(t, *host ? "ERR slots are 0 to 31, offsets 0 to 0xfff" : "ERR no PCI host bridge");
    return false;
}

static void cmd_config_read(struct devtest *t, struct request *q, unsigned size)
{
    struct pci_host *host;
    uint64_t at;
    if (config_address(t, q, &host, &at))
        put(t, "OK 0x%" PRIx64, pci_host_config_read(host, at, size));
}

static void cmd_config_write(struct devtest *t, struct request *q, unsigned size)
{
    struct pci_host *host;
    uint64_t at;
    if (config_address(t, q, &host, &at)) {
        pci_host_config_write(host, at, q->arg[2], size);
        put(t, "OK");
    }
}

static void cmd_assign_bars(struct devtest *t, struct request *q, unsigned size)
{
    struct pci_host *host = pci_host_find(t->m);
    if (host) {
        pci_assign_bars(host);
        put(t, "OK");
    } else {
        put(t, "ERR no PCI host bridge");
    }
}

static void cmd_clock(struct devtest *t, struct request *q, unsigned size)
{
    put(t, "OK 0x%" PRIx64, clock_now(t->m->clock));
}

static void cmd_clock_step(struct devtest *t, struct request *q, unsigned size)
{
    /* A year at a time: a periodic timer runs at each of its deadlines in between. */
    if (q->arg[0] > UINT64_C(31536000) * 1000000000) {
        put(t, "ERR at most a year");
        return;
    }
    clock_advance(t->m->clock, q->arg[0]);
    cmd_clock(t, q, size);
}

static void put_records(struct devtest *t)
{
    put(t, "OK");
    for (unsigned i = 0; i < t->records; i++) {
        const struct record *r = &t->record[i];
        if (r->kind == RECORD_MSI)
            put(t, " msi:0x%" PRIx64 ":0x%x", r->address, r->data);
        else
            put(t, " gsi:%" PRIu64 ":%u", r->address, r->data);
    }
    if (t->lost)
        put(t, " lost:%u", t->lost);
    t->records = t->lost = 0;
}

static void cmd_irqs(struct devtest *t, struct request *q, unsigned size)
{
    put_records(t);
}

static void cmd_wait_irq(struct devtest *t, struct request *q, unsigned size)
{
    if (t->records) {
        put_records(t);
        return;
    }
    uint64_t ms = MIN(MAX(q->arg[0], 1), 60000);
    struct itimerspec its = {
        .it_value = {.tv_sec = (time_t)(ms / 1000), .tv_nsec = (long)(ms % 1000) * 1000000}};
    if (timerfd_settime(t->timer_fd, 0, &its, NULL)) {
        put(t, "ERR cannot set a timer");
        return;
    }
    t->waiting = true;
}

static void cmd_gsi(struct devtest *t, struct request *q, unsigned size)
{
    if (!t->chip || q->arg[0] >= IOAPIC_INPUTS)
        put(t, "ERR no such input");
    else
        put(t, "OK 0x%x", irqchip_gsi_level(t->chip, (unsigned)q->arg[0]));
}

static void cmd_msi(struct devtest *t, struct request *q, unsigned size)
{
    t->router.send_msi(t->router.opaque, q->arg[0], (uint32_t)q->arg[1]);
    put(t, "OK");
}

static void cmd_nmi(struct devtest *t, struct request *q, unsigned size)
{
    if (t->chip)
        irqchip_pulse_lint1(t->chip);
    put(t, "OK");
}

static void cmd_lapic_read(struct devtest *t, struct request *q, unsigned size)
{
    struct lapic *l = lapic_arg(t, q);
    if (!l)
        return;
    uint64_t value = lapic_mmio_read(l, q->arg[1] & 0xfff, 4);
    put(t, "OK 0x%x", (uint32_t)value);
}

static void cmd_lapic_write(struct devtest *t, struct request *q, unsigned size)
{
    struct lapic *l = lapic_arg(t, q);
    if (!l)
        return;
    lapic_mmio_write(l, q->arg[1] & 0xfff, q->arg[2], 4);
    put(t, "OK");
}

/* Guest TSC in this machine: the manual clock, one tick a nanosecond. */
static void cmd_rdmsr(struct devtest *t, struct request *q, unsigned size)
{
    struct lapic *l = lapic_arg(t, q);
    uint64_t value = 0;
    if (!l)
        return;
    int ret = 0;
    if (q->arg[1] == 0x1b)
        value = lapic_base(l);
    else if (q->arg[1] == 0x6e0)
        value = lapic_tsc_deadline(l);
    else
        ret = q->arg[1] >> 8 == 8 ? lapic_msr_read(l, (uint32_t)q->arg[1], &value) : -EINVAL;
    if (ret)
        put(t, "ERR #GP");
    else
        put(t, "OK 0x%" PRIx64, value);
}

static void cmd_wrmsr(struct devtest *t, struct request *q, unsigned size)
{
    struct lapic *l = lapic_arg(t, q);
    if (!l)
        return;
    int ret = 0;
    if (q->arg[1] == 0x1b)
        ret = lapic_set_base(l, q->arg[2]);
    else if (q->arg[1] == 0x6e0)
        lapic_set_tsc_deadline(l, q->arg[2], clock_now(t->m->clock));
    else
        ret = q->arg[1] >> 8 == 8 ? lapic_msr_write(l, (uint32_t)q->arg[1], q->arg[2]) : -EINVAL;
    put(t, ret ? "ERR #GP" : "OK");
}

static void cmd_cr8(struct devtest *t, struct request *q, unsigned size)
{
    struct lapic *l = lapic_arg(t, q);
    if (!l)
        return;
    if (q->args > 1)
        lapic_set_cr8(l, q->arg[1] & 0xf);
    put(t, "OK 0x%x", lapic_cr8(l));
}

static void put_vector(struct devtest *t, int vector)
{
    if (vector < 0)
        put(t, "OK none");
    else
        put(t, "OK 0x%x", vector);
}

static void cmd_pending(struct devtest *t, struct request *q, unsigned size)
{
    struct lapic *l = lapic_arg(t, q);
    if (l)
        put_vector(t, lapic_pending(l));
}

static void cmd_ack(struct devtest *t, struct request *q, unsigned size)
{
    struct lapic *l = lapic_arg(t, q);
    if (l)
        put_vector(t, lapic_ack(l));
}

static void cmd_init(struct devtest *t, struct request *q, unsigned size)
{
    struct lapic *l = lapic_arg(t, q);
    if (!l)
        return;
    lapic_reset(l, true);
    put(t, "OK");
}

static void cmd_signals(struct devtest *t, struct request *q, unsigned size)
{
    if (!lapic_arg(t, q))
        return;
    struct cpu *c = &t->cpu[q->arg[0]];
    put(t, "OK intr:%u nmi:%u smi:%u init:%u sipi:%u:0x%x", c->intr, c->nmi, c->smi, c->init, c->sipi,
        c->sipi_vector);
    *c = (struct cpu){.t = t, .id = c->id};
}

static int pause_devices(struct devtest *t)
{
    int ret = machine_pause_devices(t->m);
    if (!ret)
        clock_pause(t->m->clock);
    return ret;
}

static void resume_devices(struct devtest *t)
{
    clock_resume(t->m->clock);
    machine_resume_devices(t->m);
}

static void cmd_pause(struct devtest *t, struct request *q, unsigned size)
{
    int ret = t->paused ? 0 : pause_devices(t);
    t->paused = !ret;
    if (ret)
        put(t, "ERR %s", strerror(-ret));
    else
        put(t, "OK");
}

static void cmd_resume(struct devtest *t, struct request *q, unsigned size)
{
    if (t->paused)
        resume_devices(t);
    t->paused = false;
    put(t, "OK");
}

static void cmd_save(struct devtest *t, struct request *q, unsigned size)
{
    int ret = t->paused ? 0 : pause_devices(t);
    if (ret) {
        put(t, "ERR %s", strerror(-ret));
        return;
    }
    const void *data = NULL;
    size_t len = 0;
    struct state_writer *w = state_writer_create();
    if (w) {
        state_begin(w, "clock", 1);
        state_put_u64(w, "now", clock_now(t->m->clock));
        state_end(w);
        machine_save_devices(t->m, w);
    }
    ret = w ? state_writer_finish(w, &data, &len) : -ENOMEM;
    if (ret) {
        put(t, "ERR %s", strerror(-ret));
    } else {
        put(t, "OK 0x");
        put_hex(t, data, len);
    }
    if (w)
        state_writer_free(w);
    if (!t->paused)
        resume_devices(t);
}

static void cmd_load(struct devtest *t, struct request *q, unsigned size)
{
    size_t len;
    uint8_t *bytes = hex_bytes(t, q->text[0], &len);
    if (!bytes)
        return;
    struct state_reader r, c;
    uint64_t now;
    int ret = t->paused ? 0 : pause_devices(t);
    bool was_paused = ret == 0;
    state_reader_init(&r, bytes, len);
    if (!ret)
        ret = state_open(&r, "clock", &c);
    if (!ret)
        ret = state_get_u64(&c, "now", &now);
    if (!ret && now > INT64_MAX / 4)
        ret = -EINVAL;
    if (!ret) {
        clock_set(t->m->clock, now);
        ret = machine_load_devices(t->m, &r);
    }
    if (was_paused && !t->paused)
        resume_devices(t);
    if (ret)
        put(t, "ERR %s", strerror(-ret));
    else
        put(t, "OK");
    free(bytes);
}

static void cmd_reset(struct devtest *t, struct request *q, unsigned size)
{
    machine_reset_devices(t->m);
    put(t, "OK");
}

static void cmd_power_button(struct devtest *t, struct request *q, unsigned size)
{
    struct power *p = power_find(t->m);
    if (p)
        power_press_button(p);
    put(t, p ? "OK" : "ERR no power device");
}

static void cmd_event(struct devtest *t, struct request *q, unsigned size)
{
    static const char *const name[] = {
        [MACHINE_POWEROFF] = "poweroff", [MACHINE_RESET] = "reset", [MACHINE_EXIT] = "exit",
        [MACHINE_CRASH] = "crash", [MACHINE_BACKEND_FAILED] = "backend-failed",
    };
    if (t->events)
        put(t, "OK %s 0x%x", name[t->event], (unsigned)t->event_status);
    else
        put(t, "OK none");
    t->events = 0;
}

static void cmd_devices(struct devtest *t, struct request *q, unsigned size)
{
    put(t, "OK");
    for (struct device *d = t->m->devices; d; d = d->next)
        put(t, " %s", d->id);
}

static void cmd_ping(struct devtest *t, struct request *q, unsigned size)
{
    put(t, "OK");
}

static void cmd_quit(struct devtest *t, struct request *q, unsigned size)
{
    t->quit = true;
    put(t, "OK");
}

/* args: least number; more: how many may follow. text: bit n: argument n is not a number. */
static const struct command {
    const char *name;
    void (*run)(struct devtest *, struct request *, unsigned size);
    uint8_t size, args, more, text;
} commands[] = {
    {"inb", cmd_in, 1, 1}, {"inw", cmd_in, 2, 1}, {"inl", cmd_in, 4, 1},
    {"outb", cmd_out, 1, 2}, {"outw", cmd_out, 2, 2}, {"outl", cmd_out, 4, 2},
    {"readb", cmd_read_value, 1, 1}, {"readw", cmd_read_value, 2, 1},
    {"readl", cmd_read_value, 4, 1}, {"readq", cmd_read_value, 8, 1},
    {"writeb", cmd_write_value, 1, 2}, {"writew", cmd_write_value, 2, 2},
    {"writel", cmd_write_value, 4, 2}, {"writeq", cmd_write_value, 8, 2},
    {"read", cmd_read, 0, 2}, {"write", cmd_write, 0, 2, 0, 2}, {"memset", cmd_memset, 0, 3},
    {"config_readb", cmd_config_read, 1, 2}, {"config_readw", cmd_config_read, 2, 2},
    {"config_readl", cmd_config_read, 4, 2}, {"config_readq", cmd_config_read, 8, 2},
    {"config_writeb", cmd_config_write, 1, 3}, {"config_writew", cmd_config_write, 2, 3},
    {"config_writel", cmd_config_write, 4, 3}, {"config_writeq", cmd_config_write, 8, 3},
    {"assign_bars", cmd_assign_bars, 0, 0},
    {"clock", cmd_clock, 0, 0}, {"clock_step", cmd_clock_step, 0, 1},
    {"irqs", cmd_irqs, 0, 0}, {"wait_irq", cmd_wait_irq, 0, 1},
    {"gsi", cmd_gsi, 0, 1}, {"msi", cmd_msi, 0, 2}, {"nmi", cmd_nmi, 0, 0},
    {"lapic_read", cmd_lapic_read, 0, 2}, {"lapic_write", cmd_lapic_write, 0, 3},
    {"rdmsr", cmd_rdmsr, 0, 2}, {"wrmsr", cmd_wrmsr, 0, 3}, {"cr8", cmd_cr8, 0, 1, 1},
    {"pending", cmd_pending, 0, 1}, {"ack", cmd_ack, 0, 1}, {"init", cmd_init, 0, 1},
    {"signals", cmd_signals, 0, 1},
    {"pause", cmd_pause, 0, 0}, {"resume", cmd_resume, 0, 0}, {"save", cmd_save, 0, 0},
    {"load", cmd_load, 0, 1, 0, 1}, {"reset", cmd_reset, 0, 0},
    {"power_button", cmd_power_button, 0, 0}, {"event", cmd_event, 0, 0},
    {"devices", cmd_devices, 0, 0}, {"ping", cmd_ping, 0, 0}, {"quit", cmd_quit, 0, 0},
};

static bool parse_number(const char *text, uint64_t *value)
{
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 0);
    return errno == 0 && *end == '\0' && text[0] >= '0' && text[0] <= '9';
}

static void run_line(struct devtest *t, char *line)
{
    struct request q = {0};
    char *save = NULL, *word = strtok_r(line, " \t\r", &save);
    if (!word) {
        put(t, "ERR empty request");
        return;
    }
    const struct command *c = NULL;
    for (unsigned i = 0; i < ARRAY_SIZE(commands) && !c; i++)
        if (strcmp(commands[i].name, word) == 0)
            c = &commands[i];
    if (!c) {
        put(t, "ERR unknown request");
        return;
    }
    for (char *p; (p = strtok_r(NULL, " \t\r", &save));) {
        if (q.args == MAX_ARGS || q.args == (unsigned)c->args + c->more) {
            put(t, "ERR too many arguments");
            return;
        }
        q.text[q.args] = p;
        if (!(c->text >> q.args & 1) && !parse_number(p, &q.arg[q.args])) {
            put(t, "ERR argument %u is not a number", q.args + 1);
            return;
        }
        q.args++;
    }
    if (q.args < c->args) {
        put(t, "ERR %s takes %u arguments", c->name, c->args);
        return;
    }
    c->run(t, &q, c->size);
}

/* Runs the whole lines that are there, until one has to wait. */
static void run_lines(struct devtest *t)
{
    size_t done = 0;
    while (!t->waiting && !t->quit && !t->failed) {
        char *begin = t->line + done, *end = memchr(begin, '\n', t->have - done);
        if (!end)
            break;
        *end = '\0';
        run_line(t, begin);
        done += (size_t)(end - begin) + 1;
        if (!t->waiting)
            send_answer(t);
    }
    t->have -= done;
    memmove(t->line, t->line + done, t->have);
    if (t->quit || t->failed)
        loop_stop(t->m->loop);
}

static void finish_wait(void *opaque)
{
    struct devtest *t = opaque;
    if (!t->waiting)
        return;
    t->waiting = false;
    timerfd_settime(t->timer_fd, 0, &(struct itimerspec){0}, NULL);
    put_records(t);
    send_answer(t);
    run_lines(t);
}

static void timer_expired(void *opaque, int fd, short revents)
{
    uint64_t expirations;
    if (read(fd, &expirations, sizeof(expirations)) == (ssize_t)sizeof(expirations))
        finish_wait(opaque);
}

static void input_ready(void *opaque, int fd, short revents)
{
    struct devtest *t = opaque;
    if (t->size - t->have < 65536) {
        char *p = t->size < MAX_LINE ? realloc(t->line, 2 * t->size + 131072) : NULL;
        if (!p) {
            log_error("a device test request has more than %u bytes", MAX_LINE);
            t->failed = true;
            loop_stop(t->m->loop);
            return;
        }
        t->line = p;
        t->size = 2 * t->size + 131072;
    }
    ssize_t n = read(fd, t->line + t->have, t->size - t->have);
    if (n < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    if (n <= 0) {
        if (n < 0)
            t->failed = true;
        loop_stop(t->m->loop);
        return;
    }
    t->have += (size_t)n;
    run_lines(t);
}

static int serve(struct machine *m, int in, int out, bool *quit)
{
    struct devtest *t = calloc(1, sizeof(*t));
    if (!t) {
        log_error("out of memory for the device test protocol");
        return -ENOMEM;
    }
    *t = (struct devtest){.m = m, .in = in, .out = out};
    t->wake = (struct loop_call){.fn = finish_wait, .opaque = t};
    t->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    int ret = t->timer_fd < 0 ? -errno : 0;

    pthread_mutex_lock(&m->lock);
    t->chip = irqchip_find(m);
    t->router = m->irq;
    void (*event)(void *, enum machine_event, int) = m->event;
    void *event_opaque = m->event_opaque;
    m->irq = (struct irq_router){.set_gsi = record_gsi, .send_msi = record_msi, .opaque = t};
    m->event = record_event;
    m->event_opaque = t;
    for (unsigned i = 0; t->chip && i < irqchip_cpus(t->chip) && i < MAX_CPUS; i++) {
        t->cpu[i] = (struct cpu){.t = t, .id = i};
        lapic_connect(irqchip_lapic(t->chip, i), record_signal, &t->cpu[i]);
    }
    if (!ret) {
        t->watch = loop_fd_add(m->loop, in, POLLIN, input_ready, t);
        t->timer_watch = loop_fd_add(m->loop, t->timer_fd, POLLIN, timer_expired, t);
        ret = t->watch && t->timer_watch ? 0 : -ENOMEM;
    }
    pthread_mutex_unlock(&m->lock);
    if (!ret)
        ret = loop_run(m->loop);

    pthread_mutex_lock(&m->lock);
    for (unsigned i = 0; t->chip && i < irqchip_cpus(t->chip); i++)
        lapic_connect(irqchip_lapic(t->chip, i), NULL, NULL);
    if (t->paused)
        resume_devices(t);
    m->irq = t->router;
    m->event = event;
    m->event_opaque = event_opaque;
    loop_cancel(m->loop, &t->wake);
    loop_fd_remove(t->watch);
    loop_fd_remove(t->timer_watch);
    pthread_mutex_unlock(&m->lock);
    if (t->timer_fd >= 0)
        close(t->timer_fd);
    *quit = t->quit;
    free(t->line);
    free(t->answer);
    free(t);
    return ret;
}

int devtest_run_fds(struct machine *m, int fd, int out_fd)
{
    bool quit;
    return serve(m, fd, out_fd, &quit);
}

int devtest_run(struct machine *m, int fd)
{
    return devtest_run_fds(m, fd, fd);
}

int devtest_serve(struct machine *m, const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(addr.sun_path)) {
        log_error("%s: the path of a socket has at most %zu bytes", path, sizeof(addr.sun_path) - 1);
        return -ENAMETOOLONG;
    }
    strcpy(addr.sun_path, path);
    int ret = 0, listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (listener < 0 || bind(listener, (struct sockaddr *)&addr, sizeof(addr)) || listen(listener, 1)) {
        ret = -errno;
        log_error("cannot listen at %s: %s%s", path, strerror(-ret),
                  ret == -EADDRINUSE ? "; a file of that name is there: remove it, or give another path" : "");
        if (listener >= 0)
            close(listener);
        return ret;
    }
    for (bool quit = false; !quit && !ret;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == EINTR)
                continue;
            ret = -errno;
            log_error("cannot accept at %s: %s", path, strerror(-ret));
            break;
        }
        ret = serve(m, fd, fd, &quit);
        close(fd);
    }
    close(listener);
    unlink(path);
    return ret;
}
