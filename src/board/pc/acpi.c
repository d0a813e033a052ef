/*
 * Writing the ACPI tables. See acpi.h.
 *
 * Tables are appended one after the other; a builder remembers that space ran out, so that nothing
 * needs to look after each field.
 */
#include "board/pc/acpi.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "base/util.h"
#include "board/pc/layout.h"
#include "device/irqchip/irqchip.h"
#include "device/power.h"
#include "device/rtc.h"
#include "device/serial.h"

#include "dsdt.hex" /* dsdt_aml_code[], from dsdt.asl */

_Static_assert(PC_COM1_PORT == SERIAL_COM1_PORT && PC_COM1_PORTS == SERIAL_PORTS &&
                   PC_COM1_GSI == SERIAL_COM1_GSI,
               "the DSDT describes the serial port");
_Static_assert(PC_RTC_PORT == RTC_PORT && PC_RTC_PORTS == RTC_PORTS && PC_RTC_GSI == RTC_GSI,
               "the DSDT describes the clock");
_Static_assert(PC_POWER_PORT == POWER_PORT && PC_POWER_PORTS == POWER_PORTS &&
                   PC_GED_EVENTS == POWER_GED_EVENTS && PC_GED_GSI == POWER_GED_GSI &&
                   PC_GED_BUTTON == POWER_EVENT_BUTTON && PC_S5_TYPE == POWER_S5_TYPE,
               "the DSDT describes the power block");
_Static_assert(PC_IOAPIC_BASE == IOAPIC_BASE && PC_LAPIC_BASE == LAPIC_DEFAULT_BASE &&
                   PC_INTX_GSI + 4 <= IOAPIC_INPUTS,
               "the MADT describes the interrupt controllers");

#define TABLE_HEADER 36u
#define LENGTH_AT    4
#define CHECKSUM_AT  9
#define MAX_TABLES   8

struct builder {
    uint8_t *buf;
    size_t cap, len;
    bool full;
    uint64_t base;
};

static void put(struct builder *b, const void *data, size_t len)
{
    if (b->full || len > b->cap - b->len) {
        b->full = true;
        return;
    }
    memcpy(b->buf + b->len, data, len);
    b->len += len;
}

static void put8(struct builder *b, uint8_t v)
{
    put(b, &v, 1);
}

static void put16(struct builder *b, uint16_t v)
{
    uint8_t le[2];
    store_le16(le, v);
    put(b, le, sizeof(le));
}

static void put32(struct builder *b, uint32_t v)
{
    uint8_t le[4];
    store_le32(le, v);
    put(b, le, sizeof(le));
}

static void put64(struct builder *b, uint64_t v)
{
    uint8_t le[8];
    store_le64(le, v);
    put(b, le, sizeof(le));
}

static void pad_to(struct builder *b, size_t len)
{
    while (!b->full && b->len < len)
        put8(b, 0);
}

static uint8_t checksum(const uint8_t *p, size_t len)
{
    uint8_t sum = 0;
    while (len--)
        sum += *p++;
    return (uint8_t)-sum;
}

/* Begins a table at the next multiple of 16 and returns its offset. §5.2.6. */
static size_t begin_table(struct builder *b, const char *signature, uint8_t revision)
{
    pad_to(b, align_up(b->len, 16));
    size_t start = b->len;
    put(b, signature, 4);
    put32(b, 0); /* length */
    put8(b, revision);
    put8(b, 0); /* checksum */
    put(b, "RNGFRT", 6);
    put(b, "RINGFORT", 8);
    put32(b, 1);
    put(b, "RNGF", 4);
    put32(b, 1);
    return start;
}

static void end_table(struct builder *b, size_t start)
{
    if (b->full)
        return;
    store_le32(b->buf + start + LENGTH_AT, (uint32_t)(b->len - start));
    b->buf[start + CHECKSUM_AT] = checksum(b->buf + start, b->len - start);
}

/* Generic address structure of a register in I/O space, §5.2.3.2; access: 1 byte, 3 dword. */
static void put_io_register(struct builder *b, uint16_t port, uint8_t bits, uint8_t access)
{
    put8(b, 1); /* system I/O */
    put8(b, bits);
    put8(b, 0);
    put8(b, access);
    put64(b, port);
}

#define FADT_WBINVD        (1u << 0)
#define FADT_PROC_C1       (1u << 2)
#define FADT_PWR_BUTTON    (1u << 4) /* a control method device, not a fixed one */
#define FADT_SLP_BUTTON    (1u << 5)
#define FADT_FIX_RTC       (1u << 6) /* no fixed-feature RTC wake */
#define FADT_TMR_VAL_EXT   (1u << 8)
#define FADT_RESET_REG_SUP (1u << 10)
#define FADT_HEADLESS      (1u << 12)
#define FADT_HW_REDUCED    (1u << 20)
#define IAPC_VGA_NOT_PRESENT \
    (1u << 2) /* no 8042 (bit 1 clear), MSI works (bit 3 clear), CMOS clock (bit 5 clear) */

/* §5.2.9. */
static size_t put_fadt(struct builder *b, size_t dsdt)
{
    size_t at = begin_table(b, "FACP", 6);
    uint64_t dsdt_gpa = b->base + dsdt;
    pad_to(b, at + 40);
    put32(b, (uint32_t)dsdt_gpa);
    put8(b, 0);
    put8(b, 4); /* preferred profile: enterprise server */
    pad_to(b, at + 76);
    put32(b, POWER_PM_TIMER);
    pad_to(b, at + 91);
    put8(b, 4); /* length of the PM timer */
    pad_to(b, at + 96);
    put16(b, 0xffff); /* no C2 */
    put16(b, 0xffff); /* no C3 */
    pad_to(b, at + 108);
    put8(b, RTC_CENTURY);
    put16(b, IAPC_VGA_NOT_PRESENT);
    put8(b, 0);
    put32(b, FADT_WBINVD | FADT_PROC_C1 | FADT_PWR_BUTTON | FADT_SLP_BUTTON | FADT_FIX_RTC |
                 FADT_TMR_VAL_EXT | FADT_RESET_REG_SUP | FADT_HEADLESS | FADT_HW_REDUCED);
    put_io_register(b, POWER_RESET, 8, 1);
    put8(b, POWER_RESET_VALUE);
    put16(b, 0); /* ARM boot flags */
    put8(b, 5);  /* minor version: 6.5 */
    pad_to(b, at + 140);
    put64(b, dsdt_gpa);
    pad_to(b, at + 208);
    put_io_register(b, POWER_PM_TIMER, 32, 3);
    pad_to(b, at + 244);
    put_io_register(b, POWER_SLEEP_CONTROL, 8, 1);
    put_io_register(b, POWER_SLEEP_STATUS, 8, 1);
    put(b, "RINGFORT", 8); /* hypervisor vendor identity */
    end_table(b, at);
    return at;
}

/* A legacy interrupt that goes to the GSI of the same number, level-triggered, active high.
 * §5.2.12.5. */
static void put_override(struct builder *b, uint8_t gsi)
{
    put8(b, 2);
    put8(b, 10);
    put8(b, 0); /* ISA */
    put8(b, gsi);
    put32(b, gsi);
    put16(b, 0x000d);
}

/* §5.2.12. */
static size_t put_madt(struct builder *b, const struct acpi_config *cfg)
{
    size_t at = begin_table(b, "APIC", 6);
    put32(b, PC_LAPIC_BASE);
    put32(b, 0); /* no 8259 */
    for (unsigned i = 0; i < cfg->cpus; i++) {
        if (i < 255) { /* local APIC; a processor UID has one byte there */
            put8(b, 0);
            put8(b, 8);
            put8(b, (uint8_t)i);
            put8(b, (uint8_t)i);
            put32(b, 1); /* enabled */
        } else {         /* local x2APIC */
            put8(b, 9);
            put8(b, 16);
            put16(b, 0);
            put32(b, i);
            put32(b, 1);
            put32(b, i);
        }
    }
    put8(b, 1); /* IOAPIC */
    put8(b, 12);
    put8(b, IOAPIC_ID);
    put8(b, 0);
    put32(b, PC_IOAPIC_BASE);
    put32(b, 0);
    /*
     * Hardware-reduced Linux has no legacy interrupts of its own: what keeps its ISA number there
     * must be an override, although it changes nothing.
     */
    put_override(b, PC_COM1_GSI);
    put_override(b, PC_RTC_GSI);
    put_override(b, PC_GED_GSI);
    put8(b, 4); /* NMI on LINT1 of all local APICs */
    put8(b, 6);
    put8(b, 0xff);
    put16(b, 0);
    put8(b, 1);
    if (cfg->cpus > 255) { /* and of all x2APICs */
        put8(b, 10);
        put8(b, 12);
        put16(b, 0);
        put32(b, UINT32_MAX);
        put8(b, 1);
        put8(b, 0);
        put16(b, 0);
    }
    end_table(b, at);
    return at;
}

static size_t put_mcfg(struct builder *b)
{
    size_t at = begin_table(b, "MCFG", 1);
    put64(b, 0);
    put64(b, PC_ECAM_BASE);
    put16(b, 0); /* segment */
    put8(b, 0);  /* first bus */
    put8(b, PC_ECAM_SIZE / (1 << 20) - 1);
    put32(b, 0);
    end_table(b, at);
    return at;
}

/* AML, §20.2. Packages are closed with a length of three bytes, which is enough for 1 MiB. */
static size_t begin_package(struct builder *b)
{
    size_t at = b->len;
    put(b, (const uint8_t[3]){0}, 3);
    return at;
}

static void end_package(struct builder *b, size_t at)
{
    if (b->full)
        return;
    size_t len = b->len - at;
    b->buf[at] = (uint8_t)(0x80 | (len & 0xf));
    b->buf[at + 1] = (uint8_t)(len >> 4);
    b->buf[at + 2] = (uint8_t)(len >> 12);
}

static void put_name(struct builder *b, const char *name)
{
    put8(b, 0x08);
    put(b, name, 4);
}

static void put_integer(struct builder *b, uint32_t v)
{
    put8(b, 0x0c);
    put32(b, v);
}

/* W64R: a resource template of one QWord address space descriptor (§6.4.3.5.1) and the end tag. */
static void put_mem64_window(struct builder *b, const struct acpi_config *cfg)
{
    put_name(b, "W64R");
    put8(b, 0x11); /* buffer */
    size_t package = begin_package(b);
    put_integer(b, 46 + 2);
    put8(b, 0x8a);
    put16(b, 43);
    put8(b, 0);    /* memory range */
    put8(b, 0x0c); /* producer, positive decode, fixed minimum and maximum */
    put8(b, 0x07); /* read-write, prefetchable */
    put64(b, 0);   /* granularity */
    put64(b, cfg->mem64_base);
    put64(b, cfg->mem64_base + cfg->mem64_size - 1);
    put64(b, 0); /* translation */
    put64(b, cfg->mem64_size);
    put8(b, 0x79);
    put8(b, 0); /* checksum 0: taken as right, §6.4.2.9 */
    end_package(b, package);
}

static size_t put_ssdt(struct builder *b, const struct acpi_config *cfg)
{
    size_t at = begin_table(b, "SSDT", 2);
    put8(b, 0x10); /* Scope (\_SB) */
    size_t scope = begin_package(b);
    put(b, "\\_SB_", 5);
    put_mem64_window(b, cfg);
    for (unsigned i = 0; i < cfg->cpus; i++) {
        char name[16];
        snprintf(name, sizeof(name), "C%03X", i & 0xfffu);
        put8(b, 0x5b); /* Device (Cnnn) */
        put8(b, 0x82);
        size_t device = begin_package(b);
        put(b, name, 4);
        put_name(b, "_HID");
        put8(b, 0x0d);
        put(b, "ACPI0007", 9);
        put_name(b, "_UID");
        put_integer(b, i);
        end_package(b, device);
    }
    end_package(b, scope);
    end_table(b, at);
    return at;
}

static size_t put_dsdt(struct builder *b)
{
    pad_to(b, align_up(b->len, 16));
    size_t at = b->len;
    put(b, dsdt_aml_code, sizeof(dsdt_aml_code)); /* iasl made its checksum */
    return at;
}

#define RSDP_LENGTH 36u

int acpi_build(const struct acpi_config *cfg, uint64_t base, uint8_t *buf, size_t cap, size_t *len)
{
    struct builder b = {.buf = buf, .cap = cap, .base = base};
    size_t table[MAX_TABLES];
    unsigned tables = 0;

    pad_to(&b, RSDP_LENGTH);
    size_t dsdt = put_dsdt(&b);
    table[tables++] = put_fadt(&b, dsdt);
    table[tables++] = put_madt(&b, cfg);
    table[tables++] = put_mcfg(&b);
    table[tables++] = put_ssdt(&b, cfg);
    size_t xsdt = begin_table(&b, "XSDT", 1);
    for (unsigned i = 0; i < tables; i++)
        put64(&b, base + table[i]);
    end_table(&b, xsdt);
    /* The older form of the list, for programs that know nothing else. */
    size_t rsdt = begin_table(&b, "RSDT", 1);
    for (unsigned i = 0; i < tables; i++)
        put32(&b, (uint32_t)(base + table[i]));
    end_table(&b, rsdt);
    if (b.full)
        return -ENOSPC;

    /* §5.2.5.3. The first checksum is over the 20 bytes of ACPI 1.0. */
    uint8_t *rsdp = buf;
    memcpy(rsdp, "RSD PTR ", 8);
    memcpy(rsdp + 9, "RNGFRT", 6);
    rsdp[15] = 2;
    store_le32(rsdp + 16, (uint32_t)(base + rsdt));
    store_le32(rsdp + 20, RSDP_LENGTH);
    store_le64(rsdp + 24, base + xsdt);
    rsdp[8] = checksum(rsdp, 20);
    rsdp[32] = checksum(rsdp, RSDP_LENGTH);
    *len = b.len;
    return 0;
}
