/* Assembling the PC. See pc.h. */
#include "board/pc/pc.h"

#include <errno.h>
#include <stdlib.h>

#include "backend/block/block.h"
#include "backend/net/net.h"
#include "base/log.h"
#include "base/util.h"
#include "board/pc/acpi.h"
#include "board/pc/boot.h"
#include "board/pc/layout.h"
#include "device/irqchip/irqchip.h"
#include "device/machine.h"
#include "device/pci.h"
#include "device/power.h"
#include "device/rtc.h"
#include "device/serial.h"
#include "device/testdev.h"
#include "device/virtio/virtio.h"

#define MEM64_SIZE GIB(32)

static int check_config(const struct pc_config *cfg)
{
    if (cfg->memory_bytes < PC_MIN_MEMORY || cfg->memory_bytes > PC_MAX_MEMORY ||
        cfg->memory_bytes % GUEST_PAGE_SIZE) {
        log_error("guest memory of %llu bytes: this machine takes %llu MiB to %llu GiB, in pages "
                  "of 4 KiB",
                  (unsigned long long)cfg->memory_bytes, (unsigned long long)(PC_MIN_MEMORY >> 20),
                  (unsigned long long)(PC_MAX_MEMORY >> 30));
        return -EINVAL;
    }
    if (cfg->cpus < 1 || cfg->cpus > PC_MAX_CPUS) {
        log_error("%u processors: this machine takes 1 to %u", cfg->cpus, PC_MAX_CPUS);
        return -EINVAL;
    }
    return 0;
}

static int create_memory(struct pc *pc, const struct pc_config *cfg)
{
    struct memory *mem = &pc->machine->memory;
    pc->low_ram_end = MIN(cfg->memory_bytes, (uint64_t)PC_LOW_RAM_MAX);
    int err = memory_add_ram(mem, 0, pc->low_ram_end);
    uint64_t high = cfg->memory_bytes - pc->low_ram_end;
    if (!err && high) {
        pc->high_ram_end = GIB(4) + high;
        err = memory_add_ram(mem, GIB(4), high);
    }
    pc->mem64_base = align_up(MAX(pc->high_ram_end, GIB(4)), GIB(1));
    pc->mem64_size = MEM64_SIZE;
    return err;
}

static int create_chips(struct pc *pc, const struct pc_config *cfg)
{
    struct machine *m = pc->machine;
    if (!(pc->irqchip = irqchip_create(m, cfg->cpus, cfg->tsc_hz)))
        return -ENOMEM;
    const struct pci_host_config pci = {
        .ecam_base = PC_ECAM_BASE,
        .ecam_size = PC_ECAM_SIZE,
        .mem32_base = PC_MEM32_BASE,
        .mem32_size = PC_MEM32_SIZE,
        .mem64_base = pc->mem64_base,
        .mem64_size = pc->mem64_size,
        .io_base = PC_PCI_IO_BASE,
        .io_size = PC_PCI_IO_SIZE,
        .intx_gsi = {PC_INTX_GSI, PC_INTX_GSI + 1, PC_INTX_GSI + 2, PC_INTX_GSI + 3},
    };
    if (!(pc->pci = pci_host_create(m, &pci)))
        return -ENOMEM;
    if (!(pc->power = power_create(m, pc->pci)))
        return -ENOMEM;
    if (!(pc->rtc = rtc_create(m)))
        return -ENOMEM;
    if (!(pc->serial = serial_create(m, SERIAL_COM1_PORT, SERIAL_COM1_GSI, cfg->serial)))
        return -ENOMEM;
    return 0;
}

/* Ports that two devices claim are the configuration's fault; the bus said which. */
static int create_test_devices(struct pc *pc, const struct pc_config *cfg)
{
    int err = 0;
    if (cfg->debug_exit) {
        bool given = cfg->debug_exit_size != 0;
        err = testdev_add_debug_exit(pc->machine, given ? cfg->debug_exit_base : TESTDEV_EXIT_PORT,
                                     given ? cfg->debug_exit_size : TESTDEV_EXIT_PORTS);
    }
    if (!err && cfg->testdev)
        err = testdev_add_pc_testdev(pc->machine);
    return err;
}

/* Slots are given in this order, so that a guest finds its disks where it found them the last time.
 */
static int create_virtio(struct pc *pc, const struct pc_config *cfg, unsigned *disks,
                         unsigned *nets)
{
    struct machine *m = pc->machine;
    for (; *disks < cfg->disk_count; ++*disks) {
        const struct pc_disk *d = &cfg->disks[*disks];
        struct virtio_blk_options opt = {.serial = d->serial};
        if (!virtio_blk_create(m, pc->pci, d->backend, &opt)) {
            ++*disks; /* the backend went with the call */
            return -ENOMEM;
        }
    }
    for (; *nets < cfg->net_count; ++*nets) {
        const struct pc_net *n = &cfg->nets[*nets];
        if (!virtio_net_create(m, pc->pci, n->backend, n->mac)) {
            ++*nets;
            return -ENOMEM;
        }
    }
    for (unsigned i = 0; i < cfg->console_count; i++)
        if (!virtio_console_create(m, pc->pci, cfg->consoles[i]))
            return -ENOMEM;
    for (unsigned i = 0; i < cfg->rng_count; i++)
        if (!virtio_rng_create(m, pc->pci))
            return -ENOMEM;
    return 0;
}

int pc_create(struct pc *pc, struct machine *m, const struct pc_config *cfg)
{
    unsigned disks = 0, nets = 0;
    *pc = (struct pc){.machine = m};
    int err = check_config(cfg);
    if (!err)
        err = create_memory(pc, cfg);
    if (!err)
        err = create_chips(pc, cfg);
    if (!err)
        err = create_virtio(pc, cfg, &disks, &nets);
    if (!err)
        err = create_test_devices(pc, cfg);
    if (err) {
        for (; disks < cfg->disk_count; disks++)
            block_close(cfg->disks[disks].backend);
        for (; nets < cfg->net_count; nets++)
            net_close(cfg->nets[nets].backend);
        return err;
    }
    machine_reset_devices(m);
    pci_assign_bars(pc->pci);
    return 0;
}

static int write_acpi(struct pc *pc, const struct pc_config *cfg)
{
    struct acpi_config acpi = {
        .cpus = cfg->cpus, .mem64_base = pc->mem64_base, .mem64_size = pc->mem64_size};
    struct memory *mem = &pc->machine->memory;
    uint8_t *buf = memory_map(mem, PC_ACPI_BASE, PC_ACPI_SIZE);
    size_t len;
    int err = buf ? acpi_build(&acpi, PC_ACPI_BASE, buf, PC_ACPI_SIZE, &len) : -EFAULT;
    if (err) {
        log_error("the ACPI tables of %u processors do not fit", cfg->cpus);
        return -EINVAL;
    }
    memory_mark_written(mem, PC_ACPI_BASE, PC_ACPI_SIZE);
    return 0;
}

/*
 * Code at F000:FFF0, where a guest jumps in real mode that wants the firmware to restart the machine. Linux does
 * so on a hardware-reduced machine without EFI, and tries the ACPI reset register not even once.
 */
static int write_reset_vector(struct pc *pc)
{
    static const uint8_t code[] = {
        0xba, POWER_RESET & 0xff, POWER_RESET >> 8, /* mov dx, POWER_RESET */
        0xb0, POWER_RESET_VALUE,                    /* mov al, POWER_RESET_VALUE */
        0xee,                                       /* out dx, al */
        0xfa,                                       /* cli */
        0xf4,                                       /* hlt */
        0xeb, 0xfc,                                 /* jmp to the cli */
    };
    _Static_assert(PC_RESET_VECTOR + sizeof(code) <= PC_EXTENDED_MEMORY, "below 1 MiB");
    _Static_assert(PC_ACPI_BASE + PC_ACPI_SIZE <= PC_RESET_VECTOR, "no table lies there");
    return memory_write(&pc->machine->memory, PC_RESET_VECTOR, code, sizeof(code));
}

int pc_load_kernel(struct pc *pc, const struct pc_config *cfg, struct x86_entry *entry)
{
    struct memory *mem = &pc->machine->memory;
    bool again = pc->loaded;
    if (again)
        for (unsigned i = 0; i < mem->regions; i++)
            guest_memory_clear(mem, mem->region[i].base, mem->region[i].size);
    pc->loaded = true;
    pci_assign_bars(pc->pci);

    struct kernel kernel;
    int err = kernel_load_file(cfg->kernel, mem, pc->low_ram_end, cfg->boot, &kernel);
    if (!err)
        err = pc_boot_setup(pc, cfg, &kernel, !again, entry);
    if (!err)
        err = write_acpi(pc, cfg);
    if (!err)
        err = write_reset_vector(pc);
    return err;
}
