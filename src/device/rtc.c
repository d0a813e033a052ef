/*
 * The CMOS real-time clock (Motorola MC146818A data sheet).
 *
 * Time is host time plus an offset; nothing ticks. Flags (update ended, alarm, periodic) are worked
 * out from what has passed since they were last looked at, and a timer is armed only for the next event
 * whose interrupt is enabled. While the guest holds the clock (register B, SET) the date stands
 * in "held" as the guest writes it, sensible or not. Machine lock held.
 */
#include "device/rtc.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"

enum {
    REG_SECONDS = 0, REG_SECONDS_ALARM, REG_MINUTES, REG_MINUTES_ALARM, REG_HOURS, REG_HOURS_ALARM,
    REG_WEEKDAY, REG_DAY, REG_MONTH, REG_YEAR, REG_A, REG_B, REG_C, REG_D,
    FIRST_MEMORY = REG_D + 1,
};
enum {
    A_UPDATING = 1 << 7, A_DIVIDER = 7 << 4, A_DIVIDER_RUNS = 2 << 4, A_RATE = 0xf,
    B_SET = 1 << 7, B_PERIODIC = 1 << 6, B_ALARM = 1 << 5, B_UPDATE = 1 << 4, B_SQUARE = 1 << 3,
    B_BINARY = 1 << 2, B_24H = 1 << 1,
    C_IRQ = 1 << 7, C_PERIODIC = 1 << 6, C_ALARM = 1 << 5, C_UPDATE = 1 << 4,
    D_VALID = 1 << 7,
    HOUR_PM = 1 << 7,
};

#define SECOND_NS INT64_C(1000000000)
#define UPDATE_WARNING_NS 244141    /* UIP is up for eight periods of 32768 Hz before each update */
#define NEVER UINT64_MAX
#define NO_ALARM INT64_MAX

struct date {
    int32_t second, minute, hour, day, month, year;     /* month 1…12, year with century */
};

struct rtc {
    struct device dev;
    struct machine *machine;
    struct irq_line irq;
    struct timer timer;
    uint8_t index, a, b, c;
    uint8_t alarm[3];           /* seconds, minutes, hours as written */
    uint8_t memory[128];        /* from FIRST_MEMORY on, but for the century */
    int64_t offset_s;           /* guest's date - host's wall clock, in seconds … */
    int64_t offset_ns;          /* … and 0…999999999 ns: apart, as a guest can set any century */
    struct date held;           /* the date while B_SET is up or the divider stands */
    int64_t seen_second;        /* up to here updates and alarms are accounted for */
    uint64_t seen_tick;         /* the same for the periodic interrupt, in its periods of guest time */
};

static bool runs(const struct rtc *r)
{
    return !(r->b & B_SET) && (r->a & A_DIVIDER) == A_DIVIDER_RUNS;
}

static int64_t shifted_wall(const struct rtc *r)
{
    return (int64_t)clock_wall_ns(r->machine->clock) + r->offset_ns;
}

/* The guest's time: whole seconds since 1970, and how far into the second it is. */
static int64_t now_second(const struct rtc *r) { return shifted_wall(r) / SECOND_NS + r->offset_s; }
static int64_t into_second(const struct rtc *r) { return shifted_wall(r) % SECOND_NS; }

static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

/* Dates and the formats of the registers. */

static struct date date_of(int64_t second)
{
    time_t t = (time_t)second;
    struct tm tm = {0};
    gmtime_r(&t, &tm);
    return (struct date){tm.tm_sec, tm.tm_min, tm.tm_hour, tm.tm_mday, tm.tm_mon + 1,
                         MAX(tm.tm_year + 1900, 0)};
}

/* Also for dates that do not exist: February 30th is March 1st or 2nd. */
static int64_t second_of(const struct date *d)
{
    struct tm tm = {.tm_sec = d->second, .tm_min = d->minute, .tm_hour = d->hour, .tm_mday = d->day,
                    .tm_mon = d->month - 1, .tm_year = d->year - 1900};
    return (int64_t)timegm(&tm);
}

static uint8_t encode(const struct rtc *r, int value)
{
    value %= 100; /* the guest may have set a hundred minutes */
    return (uint8_t)(r->b & B_BINARY ? value : (value / 10) << 4 | value % 10);
}

static int decode(const struct rtc *r, uint8_t value)
{
    return r->b & B_BINARY ? value : (value >> 4) * 10 + (value & 0xf);
}

static uint8_t encode_hour(const struct rtc *r, int hour)
{
    if (r->b & B_24H)
        return encode(r, hour);
    return (uint8_t)(encode(r, hour % 12 ? hour % 12 : 12) | (hour % 24 >= 12 ? HOUR_PM : 0));
}

static int decode_hour(const struct rtc *r, uint8_t value)
{
    if (r->b & B_24H)
        return decode(r, value);
    return decode(r, value & ~HOUR_PM) % 12 + (value & HOUR_PM ? 12 : 0);
}

static struct date current_date(const struct rtc *r)
{
    return runs(r) ? date_of(now_second(r)) : r->held;
}

/* From now on the clock shows d, at the beginning of its second. */
static void set_date(struct rtc *r, const struct date *d)
{
    int64_t second = second_of(d);
    int64_t wall = (int64_t)clock_wall_ns(r->machine->clock);
    r->offset_ns = (SECOND_NS - wall % SECOND_NS) % SECOND_NS;
    r->offset_s = second - (wall + r->offset_ns) / SECOND_NS;
    r->seen_second = second;
}

/* Flags, interrupt and timer. */

/* Period of the periodic interrupt in units of 1/32768 s; 0: off. */
static unsigned periodic_ticks(const struct rtc *r)
{
    unsigned rate = r->a & A_RATE;
    if (!rate || (r->a & A_DIVIDER) != A_DIVIDER_RUNS)
        return 0;
    return 1u << (rate <= 2 ? rate + 6 : rate - 1);
}

static uint64_t ticks_since_start(const struct rtc *r)
{
    return (uint64_t)((unsigned __int128)clock_now(r->machine->clock) * 32768 / SECOND_NS);
}

/* The first second after `after` at which the alarm registers match, or NO_ALARM. */
static int64_t next_alarm(const struct rtc *r, int64_t after)
{
    /* The two top bits set: "don't care". */
    int second = r->alarm[0] >= 0xc0 ? -1 : decode(r, r->alarm[0]);
    int minute = r->alarm[1] >= 0xc0 ? -1 : decode(r, r->alarm[1]);
    int hour = r->alarm[2] >= 0xc0 ? -1 : decode_hour(r, r->alarm[2]);
    if (second > 59 || minute > 59 || hour > 23)
        return NO_ALARM;
    int64_t t = after + 1;
    /* Each step leaves a whole hour, minute or second behind that does not match: at most 24 + 60 + 60. */
    for (unsigned steps = 0; steps < 200; steps++) {
        struct date d = date_of(t);
        if (hour >= 0 && d.hour != hour)
            t += 3600 - d.minute * 60 - d.second;
        else if (minute >= 0 && d.minute != minute)
            t += 60 - d.second;
        else if (second >= 0 && d.second != second)
            t++;
        else
            return t;
    }
    return NO_ALARM;
}

static void set_timer(struct rtc *r)
{
    uint64_t now = clock_now(r->machine->clock), deadline = NEVER;
    uint8_t due = r->b & ~r->c;
    if (runs(r) && (due & (B_UPDATE | B_ALARM))) {
        int64_t second = r->seen_second + 1;
        if (!(due & B_UPDATE))
            second = next_alarm(r, r->seen_second);
        if (second != NO_ALARM) {
            int64_t wait = (second - now_second(r)) * SECOND_NS - into_second(r);
            deadline = now + (uint64_t)MAX(wait, 0);
        }
    }
    unsigned period = periodic_ticks(r);
    if (period && (due & B_PERIODIC)) {
        unsigned __int128 tick = (unsigned __int128)(r->seen_tick + 1) * period;
        uint64_t at = (uint64_t)((tick * SECOND_NS + 32767) / 32768);
        deadline = MIN(deadline, at);
    }
    if (deadline == NEVER)
        timer_disarm(r->machine->clock, &r->timer);
    else
        timer_arm(r->machine->clock, &r->timer, deadline);
}

/* Begins anew to account, after the rate or the date changed. */
static void restart(struct rtc *r)
{
    r->seen_second = now_second(r);
    unsigned period = periodic_ticks(r);
    r->seen_tick = period ? ticks_since_start(r) / period : 0;
}

/* Sets the flags for what has passed, and with them interrupt line and timer. */
static void update(struct rtc *r)
{
    if (runs(r)) {
        int64_t second = now_second(r);
        if (second > r->seen_second) {
            if (!(r->c & C_ALARM) && next_alarm(r, r->seen_second) <= second)
                r->c |= C_ALARM;
            r->c |= C_UPDATE;
        }
        r->seen_second = second;
    }
    unsigned period = periodic_ticks(r);
    if (period) {
        uint64_t tick = ticks_since_start(r) / period;
        if (tick != r->seen_tick)
            r->c |= C_PERIODIC;
        r->seen_tick = tick;
    }
    bool irq = r->b & r->c & (B_PERIODIC | B_ALARM | B_UPDATE);
    r->c = (uint8_t)((r->c & ~C_IRQ) | (irq ? C_IRQ : 0));
    irq_set(&r->irq, irq);
    set_timer(r);
}

static void timer_fired(void *opaque)
{
    update(opaque);
}

/* Registers. */

static uint8_t read_register(struct rtc *r, uint8_t index)
{
    struct date d = current_date(r);
    switch (index) {
    case REG_SECONDS:
        return encode(r, d.second);
    case REG_MINUTES:
        return encode(r, d.minute);
    case REG_HOURS:
        return encode_hour(r, d.hour);
    case REG_WEEKDAY: {
        int64_t days = floor_div(second_of(&d), 86400);     /* 1970-01-01 was a Thursday */
        return encode(r, (int)((days % 7 + 7 + 4) % 7) + 1);
    }
    case REG_DAY:
        return encode(r, d.day);
    case REG_MONTH:
        return encode(r, d.month);
    case REG_YEAR:
        return encode(r, d.year);
    case RTC_CENTURY:
        return encode(r, d.year / 100);
    case REG_SECONDS_ALARM:
    case REG_MINUTES_ALARM:
    case REG_HOURS_ALARM:
        return r->alarm[index / 2];
    case REG_A: {
        bool updating = runs(r) && into_second(r) >= SECOND_NS - UPDATE_WARNING_NS;
        return (uint8_t)(r->a | (updating ? A_UPDATING : 0));
    }
    case REG_B:
        return r->b;
    case REG_C: {
        update(r);
        uint8_t c = r->c;
        r->c = 0;
        update(r);
        return c;
    }
    case REG_D:
        return D_VALID;
    default:
        return r->memory[index];
    }
}

static void write_date(struct rtc *r, uint8_t index, uint8_t value)
{
    struct date d = current_date(r);
    switch (index) {
    case REG_SECONDS:
        d.second = decode(r, value);
        break;
    case REG_MINUTES:
        d.minute = decode(r, value);
        break;
    case REG_HOURS:
        d.hour = decode_hour(r, value);
        break;
    case REG_DAY:
        d.day = decode(r, value);
        break;
    case REG_MONTH:
        d.month = decode(r, value);
        break;
    case REG_YEAR:
        d.year = d.year / 100 * 100 + decode(r, value) % 100;
        break;
    case RTC_CENTURY:
        d.year = decode(r, value) * 100 + d.year % 100;
        break;
    default: /* the day of the week follows from the date */
        return;
    }
    if (runs(r))
        set_date(r, &d);
    else
        r->held = d;
}

/* Registers A and B decide whether the clock runs; the date is carried over from one way to the other. */
static void write_control(struct rtc *r, uint8_t a, uint8_t b)
{
    bool ran = runs(r);
    struct date d = current_date(r);
    /* Only changes of these restart the accounting: a flag that is due stays due. */
    bool rate_changed = (r->a ^ a) & (A_DIVIDER | A_RATE);
    r->a = a;
    r->b = b;
    if (ran && !runs(r)) {
        r->held = d;
    } else if (!ran && runs(r)) {
        set_date(r, &d);
    }
    if (rate_changed) {
        unsigned period = periodic_ticks(r);
        r->seen_tick = period ? ticks_since_start(r) / period : 0;
    }
}

static void write_register(struct rtc *r, uint8_t index, uint8_t value)
{
    update(r);
    switch (index) {
    case REG_A:
        write_control(r, value & ~A_UPDATING, r->b);
        break;
    case REG_B:
        /* SET takes the update-ended interrupt away. */
        write_control(r, r->a, value & B_SET ? value & ~B_UPDATE : value);
        break;
    case REG_C:
    case REG_D:
        break;
    case REG_SECONDS_ALARM:
    case REG_MINUTES_ALARM:
    case REG_HOURS_ALARM:
        r->alarm[index / 2] = value;
        break;
    case REG_SECONDS:
    case REG_MINUTES:
    case REG_HOURS:
    case REG_WEEKDAY:
    case REG_DAY:
    case REG_MONTH:
    case REG_YEAR:
    case RTC_CENTURY:
        write_date(r, index, value);
        break;
    default:
        r->memory[index] = value;
    }
    update(r);
}

static uint64_t rtc_read(void *opaque, uint64_t offset, unsigned size)
{
    struct rtc *r = opaque;
    uint64_t value = 0;
    /* The index cannot be read back; wider accesses are taken bytewise. */
    for (unsigned i = 0; i < size; i++)
        value |= (uint64_t)(offset + i == 1 ? read_register(r, r->index) : 0xff) << (8 * i);
    return value;
}

static void rtc_write(void *opaque, uint64_t offset, uint64_t value, unsigned size)
{
    struct rtc *r = opaque;
    for (unsigned i = 0; i < size; i++) {
        uint8_t byte = (uint8_t)(value >> (8 * i));
        if (offset + i == 0)
            r->index = byte & 0x7f; /* bit 7 masks NMI, of which the machine has none to mask */
        else
            write_register(r, r->index, byte);
    }
}

static const struct bus_ops rtc_bus_ops = {.read = rtc_read, .write = rtc_write};

void rtc_set_cmos(struct rtc *r, uint8_t index, uint8_t value)
{
    if (index >= FIRST_MEMORY && index < sizeof(r->memory) && index != RTC_CENTURY)
        r->memory[index] = value;
}

/* The device. A reset does not stop the clock, nor touch its memory: there is a battery. */

static void rtc_reset(struct device *dev)
{
    struct rtc *r = container_of(dev, struct rtc, dev);
    r->b &= (uint8_t)~(B_PERIODIC | B_ALARM | B_UPDATE | B_SQUARE);
    r->c = 0;
    r->index = 0;
    update(r);
}

#define FOR_EACH_FIELD(op) \
    op(index, 0x7f) op(a, 0x7f) op(b, 0xff) op(c, 0xf0) op(offset_s, UINT64_MAX) op(offset_ns, UINT64_MAX) \
    op(seen_second, UINT64_MAX) op(seen_tick, UINT64_MAX)

static void rtc_save(struct device *dev, struct state_writer *w)
{
    struct rtc *r = container_of(dev, struct rtc, dev);
#define SAVE(field, bits) state_put_u64(w, #field, (uint64_t)r->field);
    FOR_EACH_FIELD(SAVE)
#undef SAVE
    state_put_bytes(w, "alarm", r->alarm, sizeof(r->alarm));
    state_put_bytes(w, "memory", r->memory, sizeof(r->memory));
    state_put_bytes(w, "held", &r->held, sizeof(r->held));
    state_put_u64(w, "irq_level", r->irq.level);
}

static bool sane(const struct date *d)
{
    const int32_t *v = &d->second;
    for (unsigned i = 0; i < sizeof(*d) / sizeof(*v); i++)
        if (v[i] < 0 || v[i] > 99999)
            return false;
    return true;
}

static int rtc_load(struct device *dev, const struct state_reader *r_)
{
    struct rtc *r = container_of(dev, struct rtc, dev);
    struct rtc n = *r;
    uint64_t v;
#define LOAD(field, bits) \
    if (state_get_u64(r_, #field, &v) || (v & ~(uint64_t)(bits))) \
        goto bad; \
    n.field = (__typeof__(n.field))v;
    FOR_EACH_FIELD(LOAD)
#undef LOAD
    const int64_t limit = INT64_C(1) << 40; /* seconds: beyond any year that four digits can say */
    if (state_get_bytes(r_, "alarm", n.alarm, sizeof(n.alarm)) ||
        state_get_bytes(r_, "memory", n.memory, sizeof(n.memory)) ||
        state_get_bytes(r_, "held", &n.held, sizeof(n.held)) ||
        state_get_u64(r_, "irq_level", &v) || !sane(&n.held) || n.offset_ns < 0 ||
        n.offset_ns >= SECOND_NS || n.offset_s > limit || n.offset_s < -limit ||
        n.seen_second > 2 * limit || n.seen_second < -2 * limit)
        goto bad;
    timer_disarm(r->machine->clock, &r->timer);
    n.timer = r->timer;
    n.irq.level = v & 1;
    *r = n;
    set_timer(r);
    return 0;

bad:
    log_error("saved %s: a field is missing or has a value that it cannot have", dev->id);
    return -EINVAL;
}

static void rtc_destroy(struct device *dev)
{
    struct rtc *r = container_of(dev, struct rtc, dev);
    timer_disarm(r->machine->clock, &r->timer);
    bus_remove(&r->machine->ports, RTC_PORT, r);
    free(r);
}

static const struct device_ops rtc_ops = {
    .name = "rtc",
    .version = 1,
    .reset = rtc_reset,
    .save = rtc_save,
    .load = rtc_load,
    .destroy = rtc_destroy,
};

struct rtc *rtc_create(struct machine *m)
{
    struct rtc *r = calloc(1, sizeof(*r));
    if (!r) {
        log_error("out of memory for the CMOS clock");
        return NULL;
    }
    r->machine = m;
    r->irq = (struct irq_line){.router = &m->irq, .gsi = RTC_GSI};
    r->a = A_DIVIDER_RUNS | 6;
    r->b = B_24H;
    timer_init(&r->timer, timer_fired, r);
    restart(r);
    if (bus_add(&m->ports, RTC_PORT, RTC_PORTS, &rtc_bus_ops, r, "rtc")) {
        free(r);
        return NULL;
    }
    machine_add_device(m, &r->dev, &rtc_ops);
    return r;
}
