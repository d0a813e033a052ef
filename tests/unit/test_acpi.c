/*
 * ACPI tables: sums, lengths and what a guest's ACPI code makes of them. Where the ACPICA tools are
 * installed (the build needs one of them), iasl takes the tables apart and acpiexec evaluates their
 * methods.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/util.h"
#include "board/pc/acpi.h"
#include "board/pc/layout.h"
#include "device/power.h"

static uint8_t tables[PC_ACPI_SIZE];
static size_t tables_len;

static uint8_t sum(const uint8_t *p, size_t len)
{
    uint8_t s = 0;
    while (len--)
        s += *p++;
    return s;
}

static void build(unsigned cpus)
{
    struct acpi_config cfg = {.cpus = cpus, .mem64_base = 0x140000000, .mem64_size = 0x800000000};
    memset(tables, 0xa5, sizeof(tables));
    assert_int_equal(acpi_build(&cfg, PC_ACPI_BASE, tables, sizeof(tables), &tables_len), 0);
    assert_in_range(tables_len, 1000, sizeof(tables));
}

/* The table at a guest address, with length and sum checked. */
static const uint8_t *at(uint64_t gpa)
{
    assert_in_range(gpa, PC_ACPI_BASE, PC_ACPI_BASE + tables_len - 36);
    const uint8_t *t = tables + (gpa - PC_ACPI_BASE);
    uint32_t len = load_le32(t + 4);
    assert_in_range(len, 36, tables_len - (gpa - PC_ACPI_BASE));
    assert_int_equal(sum(t, len), 0);
    return t;
}

static const uint8_t *find(const char *signature)
{
    const uint8_t *xsdt = at(load_le64(tables + 24));
    assert_memory_equal(xsdt, "XSDT", 4);
    const uint8_t *found = NULL;
    for (uint32_t i = 36; i < load_le32(xsdt + 4); i += 8) {
        const uint8_t *t = at(load_le64(xsdt + i));
        if (!memcmp(t, signature, 4)) {
            assert_null(found);
            found = t;
        }
    }
    assert_non_null(found);
    return found;
}

static void test_root(void **state)
{
    build(2);
    assert_memory_equal(tables, "RSD PTR ", 8);
    assert_int_equal(tables[15], 2);
    assert_int_equal(load_le32(tables + 20), 36);
    assert_int_equal(sum(tables, 20), 0);
    assert_int_equal(sum(tables, 36), 0);
    const uint8_t *xsdt = at(load_le64(tables + 24)), *rsdt = at(load_le32(tables + 16));
    unsigned count = (load_le32(xsdt + 4) - 36) / 8;
    assert_int_equal(count, 4);
    assert_int_equal((load_le32(rsdt + 4) - 36) / 4, count);
    for (unsigned i = 0; i < count; i++)
        assert_int_equal(load_le64(xsdt + 36 + 8 * i), load_le32(rsdt + 36 + 4 * i));
}

static void test_fadt(void **state)
{
    build(1);
    const uint8_t *f = find("FACP");
    assert_int_equal(load_le32(f + 4), 276);
    assert_int_equal(f[8], 6);
    assert_memory_equal(at(load_le64(f + 140)), "DSDT", 4);
    assert_int_equal(load_le32(f + 40), load_le64(f + 140));
    uint32_t flags = load_le32(f + 112);
    assert_true(flags & 1u << 20);
    assert_true(flags & 1u << 10);
    uint16_t boot = load_le16(f + 109);
    assert_int_equal(boot & 0x2e, 4); /* no 8042, no VGA, MSI works, CMOS clock */
    assert_int_equal(f[116], 1);
    assert_int_equal(load_le64(f + 120), POWER_RESET);
    assert_int_equal(f[128], POWER_RESET_VALUE);
    assert_int_equal(f[208], 1);
    assert_int_equal(load_le64(f + 212), POWER_PM_TIMER);
    assert_int_equal(f[244], 1);
    assert_int_equal(load_le64(f + 248), POWER_SLEEP_CONTROL);
    assert_int_equal(load_le64(f + 260), POWER_SLEEP_STATUS);
}

static void check_madt(unsigned cpus)
{
    build(cpus);
    const uint8_t *m = find("APIC");
    uint32_t len = load_le32(m + 4);
    unsigned next_cpu = 0, ioapics = 0, overrides = 0;
    assert_int_equal(load_le32(m + 36), PC_LAPIC_BASE);
    for (uint32_t i = 44; i < len; i += m[i + 1]) {
        const uint8_t *e = m + i;
        assert_in_range(e[1], 2, len - i);
        switch (e[0]) {
        case 0:
            assert_int_equal(e[1], 8);
            assert_int_equal(e[2], next_cpu);
            assert_int_equal(e[3], next_cpu++);
            assert_int_equal(load_le32(e + 4), 1);
            assert_in_range(e[3], 0, 254); /* 255 is everybody */
            break;
        case 9:
            assert_int_equal(e[1], 16);
            assert_int_equal(load_le32(e + 4), next_cpu);
            assert_int_equal(load_le32(e + 8), 1);
            assert_int_equal(load_le32(e + 12), next_cpu++);
            break;
        case 1:
            assert_int_equal(load_le32(e + 4), PC_IOAPIC_BASE);
            assert_int_equal(load_le32(e + 8), 0);
            ioapics++;
            break;
        case 2:
            assert_int_equal(e[2], 0);
            assert_int_equal(e[3], load_le32(e + 4));
            assert_int_equal(load_le16(e + 8), 0xd);
            overrides |= 1u << e[3];
            break;
        case 4:
        case 10:
            break;
        default:
            fail_msg("unknown entry %u", e[0]);
        }
    }
    assert_int_equal(next_cpu, cpus);
    assert_int_equal(ioapics, 1);
    assert_int_equal(overrides, 1u << 4 | 1u << 8 | 1u << 9);
}

static void test_madt(void **state)
{
    check_madt(1);
    check_madt(2);
    check_madt(255);
    check_madt(256);
    check_madt(1024);
}

static void test_mcfg(void **state)
{
    build(1);
    const uint8_t *m = find("MCFG");
    assert_int_equal(load_le32(m + 4), 60);
    assert_int_equal(load_le64(m + 44), PC_ECAM_BASE);
    assert_int_equal(m[54], 0);
    assert_int_equal(m[55], 255);
}

static void test_no_room(void **state)
{
    struct acpi_config cfg = {.cpus = 8, .mem64_base = 0x100000000, .mem64_size = 0x800000000};
    size_t len;
    build(8);
    for (size_t cap = 0; cap < tables_len; cap += 7)
        assert_int_equal(acpi_build(&cfg, PC_ACPI_BASE, tables, cap, &len), -ENOSPC);
    assert_int_equal(acpi_build(&cfg, PC_ACPI_BASE, tables, tables_len, &len), 0);
}

/* ---- With ACPICA's tools ---- */

static char folder[] = "/tmp/ringfort-acpi-XXXXXX";

static void write_table(const char *signature, const uint8_t *t)
{
    char path[128];
    snprintf(path, sizeof(path), "%s/%s.dat", folder, signature);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(t, 1, load_le32(t + 4), f), load_le32(t + 4));
    assert_int_equal(fclose(f), 0);
}

/* Runs a command in the folder; its output, and its status in *status. */
static char *run(const char *command, int *status)
{
    static char out[1 << 20];
    char line[512];
    snprintf(line, sizeof(line), "cd %s && { %s; } 2>&1", folder, command);
    FILE *p = popen(line, "r");
    assert_non_null(p);
    size_t n = fread(out, 1, sizeof(out) - 1, p);
    out[n] = 0;
    *status = pclose(p);
    return out;
}

static int write_tables(void **state)
{
    build(3);
    if (!mkdtemp(folder))
        return -1;
    static const char *const names[] = {"FACP", "APIC", "MCFG", "SSDT"};
    for (size_t i = 0; i < ARRAY_SIZE(names); i++)
        write_table(names[i], find(names[i]));
    write_table("DSDT", at(load_le64(find("FACP") + 140)));
    return 0;
}

static int remove_tables(void **state)
{
    char line[256];
    snprintf(line, sizeof(line), "rm -r %s", folder);
    return system(line);
}

static void contains(const char *text, const char *part)
{
    if (!strstr(text, part))
        fail_msg("no \"%s\" in: %.2000s", part, text);
}

static void test_disassemble(void **state)
{
    int status;
    run("iasl -h", &status);
    if (status)
        skip();
    static const char *const names[] = {"FACP", "APIC", "MCFG"};
    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        char line[64];
        snprintf(line, sizeof(line), "iasl -d %s.dat && cat %s.dsl", names[i], names[i]);
        char *out = run(line, &status);
        assert_int_equal(status, 0);
        assert_null(strstr(out, "rror"));
        assert_null(strstr(out, "nvalid"));
        assert_null(strstr(out, "Unknown"));
    }
    char *out = run("iasl -e SSDT.dat -d DSDT.dat && cat DSDT.dsl", &status);
    assert_int_equal(status, 0);
    assert_null(strstr(out, "rror"));
    contains(out, "Device (GED0)");
    /* What comes out of the disassembler compiles again: names and packages are sound. */
    out = run("iasl -d SSDT.dat && iasl SSDT.dsl", &status);
    assert_int_equal(status, 0);
    contains(out, "0 Errors");
}

static void test_evaluate(void **state)
{
    int status;
    run("which acpiexec", &status);
    if (status)
        skip();
    static const struct {
        const char *command, *expect;
    } cases[] = {
        {"evaluate \\_S5", "[Integer] = 0000000000000005"},
        {"evaluate \\_SB.PCI0._CBA", "AE_NOT_FOUND"},
        {"evaluate \\_SB.C000._UID", "[Integer] = 0000000000000000"},
        {"evaluate \\_SB.C002._UID", "[Integer] = 0000000000000002"},
        {"evaluate \\_SB.C003._UID", "AE_NOT_FOUND"},
        {"resources \\_SB.PCI0", "Address Minimum : 0000000140000000"},
        {"resources \\_SB.PCI0", "Address Maximum : 000000093FFFFFFF"},
        {"resources \\_SB.PCI0", "Address Length : 0000000800000000"},
        {"resources \\_SB.PCI0", "Address Minimum : C0000000"},
        {"resources \\_SB.MBRD", "E0000000"},
        {"resources \\_SB.COM1", "03F8"},
        {"evaluate \\_SB.PCI0._PRT", "Package"},
    };
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        char line[256];
        snprintf(line, sizeof(line), "acpiexec -b '%s' DSDT.dat SSDT.dat", cases[i].command);
        contains(run(line, &status), cases[i].expect);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_root),     cmocka_unit_test(test_fadt),
        cmocka_unit_test(test_madt),     cmocka_unit_test(test_mcfg),
        cmocka_unit_test(test_no_room),  cmocka_unit_test(test_disassemble),
        cmocka_unit_test(test_evaluate),
    };
    return cmocka_run_group_tests(tests, write_tables, remove_tables);
}
