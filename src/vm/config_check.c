/*
 * What no single option shows: two users of one resource, a machine that is too big for its buses
 * or its host, and the values that derive from others. One thread at a time.
 */
#include "vm/config.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "base/util.h"
#include "device/power.h"
#include "device/rtc.h"
#include "device/serial.h"
#include "device/testdev.h"
#include "vm/config_value.h"

/* One use of a file. */
struct file_use {
    const char *flag, *path;
    bool writes;
    bool found;
    struct stat st;
};

static bool same_file(const struct file_use *a, const struct file_use *b)
{
    if (!a->found || !b->found)
        return strcmp(a->path, b->path) == 0;
    if (S_ISBLK(a->st.st_mode) && S_ISBLK(b->st.st_mode))
        return a->st.st_rdev == b->st.st_rdev;
    return a->st.st_dev == b->st.st_dev && a->st.st_ino == b->st.st_ino;
}

/* Terminals, /dev/null and pipes may have several users. */
static bool shareable(const struct file_use *f)
{
    return f->found && (S_ISCHR(f->st.st_mode) || S_ISFIFO(f->st.st_mode));
}

static void use_file(struct file_use *list, unsigned *n, const char *flag, const char *path,
                     bool writes)
{
    struct file_use *f = &list[(*n)++];
    *f = (struct file_use){.flag = flag, .path = path, .writes = writes};
    f->found = stat(path, &f->st) == 0;
}

static void use_console(struct file_use *list, unsigned *n, const char *flag, const char *spec)
{
    if (strncmp(spec, "file:", 5) == 0 || strncmp(spec, "unix:", 5) == 0)
        use_file(list, n, flag, spec + 5, true);
}

static int check_files(const struct vm_config *c)
{
    unsigned n = 0, most = 5 + c->initrd_count + c->disk_count + c->device_count;
    struct file_use *list = calloc(most, sizeof(*list));
    int r = 0;
    if (!list)
        return -ENOMEM;

    if (c->file)
        use_file(list, &n, "config", c->file, false);
    if (c->kernel)
        use_file(list, &n, "kernel", c->kernel, false);
    for (unsigned i = 0; i < c->initrd_count; i++)
        use_file(list, &n, "initrd", c->initrds[i], false);
    for (unsigned i = 0; i < c->disk_count; i++)
        use_file(list, &n, "disk", c->disks[i].block.path, !c->disks[i].block.readonly);
    use_console(list, &n, "console", c->console);
    for (unsigned i = 0; i < c->device_count; i++)
        if (c->devices[i].console)
            use_console(list, &n, "device", c->devices[i].console);
    if (c->stats)
        use_file(list, &n, "stats", c->stats, true);
    if (c->trace_exec)
        use_file(list, &n, "trace-exec", c->trace_exec, true);

    for (unsigned i = 0; r == 0 && i < n; i++) {
        for (unsigned k = 0; r == 0 && k < i; k++) {
            if (!(list[i].writes || list[k].writes) || shareable(&list[i]) ||
                !same_file(&list[i], &list[k]))
                continue;
            struct config_origin o = {.key = list[i].flag};
            bool disks = strcmp(list[i].flag, "disk") == 0 && strcmp(list[k].flag, "disk") == 0;
            r = config_bad(&o, "%s is also used by --%s, and one of them writes; %s%s%s",
                           config_quote(list[i].path), list[k].flag,
                           disks ? "did you mean path=" : "give each a file of its own",
                           disks ? list[i].path : "", disks ? ",readonly=on for both?" : "");
        }
    }
    free(list);
    return r;
}

static int check_terminal(const struct vm_config *c)
{
    const struct config_origin o = {.key = "device"};
    bool used = strcmp(c->console, "stdio") == 0;
    for (unsigned i = 0; i < c->device_count; i++) {
        if (!c->devices[i].console || strcmp(c->devices[i].console, "stdio") != 0)
            continue;
        if (used)
            return config_bad(
                &o, "virtio-console and another console share the one terminal; did you mean "
                    "virtio-console,console=pty (or --console none)?");
        used = true;
    }
    return 0;
}

static bool any_address(const struct net_forward *f)
{
    return strcmp(f->host_addr, "0.0.0.0") == 0;
}

static bool same_port(const struct net_forward *a, const struct net_forward *b)
{
    return a->udp == b->udp && a->host_port == b->host_port &&
           (any_address(a) || any_address(b) || strcmp(a->host_addr, b->host_addr) == 0);
}

/* The forward of any net, by one running number; NULL past the end. */
static const struct net_forward *forward(const struct vm_config *c, unsigned i)
{
    for (unsigned k = 0; k < c->net_count; i -= c->nets[k++].user.forward_count)
        if (i < c->nets[k].user.forward_count)
            return &c->nets[k].user.forwards[i];
    return NULL;
}

static bool port_free(const struct vm_config *c, const struct net_forward *wanted)
{
    for (unsigned i = 0; forward(c, i); i++)
        if (same_port(forward(c, i), wanted))
            return false;
    return true;
}

static int check_nets(const struct vm_config *c)
{
    const struct config_origin o = {.key = "net"};
    for (unsigned i = 0; forward(c, i); i++) {
        for (unsigned k = 0; k < i; k++) {
            if (!same_port(forward(c, i), forward(c, k)))
                continue;
            struct net_forward other = *forward(c, i);
            char form[160];
            while (!port_free(c, &other))
                other.host_port = other.host_port < 65535 ? (uint16_t)(other.host_port + 1) : 1024;
            config_format_forward(&other, form);
            return config_bad(&o,
                              "%s port %u of the host is forwarded twice; did you mean hostfwd=%s?",
                              other.udp ? "UDP" : "TCP", forward(c, i)->host_port, form);
        }
    }
    for (unsigned i = 0; i < c->net_count; i++) {
        const struct vm_net_config *a = &c->nets[i];
        for (unsigned k = 0; k < i; k++) {
            const struct vm_net_config *b = &c->nets[k];
            if (a->type == VM_NET_TAP && b->type == VM_NET_TAP &&
                strcmp(a->tap.ifname, b->tap.ifname) == 0)
                return config_bad(&o, "two nets on the interface %s; give each one of its own",
                                  config_quote(a->tap.ifname));
            if (memcmp(a->mac, b->mac, 6) == 0)
                return config_bad(&o,
                                  "two nets with mac=%02x:%02x:%02x:%02x:%02x:%02x; did you mean "
                                  "mac=%02x:%02x:%02x:%02x:%02x:%02x for the other?",
                                  a->mac[0], a->mac[1], a->mac[2], a->mac[3], a->mac[4], a->mac[5],
                                  a->mac[0], a->mac[1], a->mac[2], a->mac[3], a->mac[4],
                                  a->mac[5] ^ 1);
        }
    }
    return 0;
}

struct port_range {
    unsigned base, size;
    const char *name;
};

/* The PC's own ports, which an isa-debug-exit must not cover. */
static const struct port_range board_ports[] = {
    {RTC_PORT, RTC_PORTS, "the clock"},
    {0x64, 1, "the keyboard controller"},
    {SERIAL_COM1_PORT, SERIAL_PORTS, "the serial port"},
    {POWER_PORT, POWER_PORTS, "power management"},
    {0xcf8, 8, "PCI configuration"},
};
static const struct port_range testdev_ports[] = {{0xe0, 12, "pc-testdev"},
                                                  {0x2000, 24, "pc-testdev"}};

static const struct port_range *covered(const struct vm_device_config *d,
                                        const struct port_range *list, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        if (d->iobase < list[i].base + list[i].size &&
            list[i].base < (unsigned)d->iobase + d->iosize)
            return &list[i];
    return NULL;
}

static int check_ports(const struct vm_config *c)
{
    const struct config_origin o = {.key = "device"};
    const struct vm_device_config *exit_device = NULL, *testdev = NULL;
    for (unsigned i = 0; i < c->device_count; i++) {
        const struct vm_device_config *d = &c->devices[i], **one;
        if (d->type == VM_DEVICE_DEBUG_EXIT)
            one = &exit_device;
        else if (d->type == VM_DEVICE_PC_TESTDEV)
            one = &testdev;
        else
            continue;
        if (*one && one == &exit_device && d->iobase == (*one)->iobase)
            return config_bad(&o,
                              "two devices isa-debug-exit with iobase=0x%x; leave one of them out",
                              d->iobase);
        if (*one)
            return config_bad(&o, "a machine has at most one %s; leave one of them out",
                              vm_config_names("device")[d->type]);
        *one = d;
    }
    if (!exit_device)
        return 0;
    const struct port_range *at = covered(exit_device, board_ports, ARRAY_SIZE(board_ports));
    if (!at && testdev)
        at = covered(exit_device, testdev_ports, ARRAY_SIZE(testdev_ports));
    if (at)
        return config_bad(&o,
                          "isa-debug-exit: iobase=0x%x is taken by %s; did you mean iobase=0x%x?",
                          exit_device->iobase, at->name, TESTDEV_EXIT_PORT);
    return 0;
}

/* FNV-1a: spreads well enough and never changes, so that a machine keeps its addresses. */
static uint32_t hash_name(const char *name, unsigned index)
{
    uint32_t h = 2166136261u;
    for (; *name; name++)
        h = (h ^ (uint8_t)*name) * 16777619u;
    return (h ^ index) * 16777619u;
}

/* Guests remember cards by their address (cloud-init does), so it derives from what stays: the name
 * given and the index. */
static void fill_macs(struct vm_config *c)
{
    for (unsigned i = 0; i < c->net_count; i++) {
        struct vm_net_config *n = &c->nets[i];
        if (n->mac_given)
            continue;
        uint32_t h = hash_name(c->name_given ? c->name : "ringfort", i);
        memcpy(n->mac,
               (uint8_t[6]){0x52, 0x54, 0x00, (uint8_t)(h >> 16), (uint8_t)(h >> 8), (uint8_t)h},
               6);
    }
}

int vm_config_finish(struct vm_config *c)
{
    unsigned pci = c->disk_count + c->net_count;
    for (unsigned i = 0; i < c->device_count; i++)
        pci += c->devices[i].type == VM_DEVICE_VIRTIO_RNG ||
               c->devices[i].type == VM_DEVICE_VIRTIO_CONSOLE;
    if (pci > VM_CONFIG_MAX_PCI_DEVICES) {
        log_error("%u disks, nets and virtio devices are too many for the PCI bus; it takes at "
                  "most %u together",
                  pci, VM_CONFIG_MAX_PCI_DEVICES);
        return -EINVAL;
    }
    if (!c->name && asprintf(&c->name, "vm-%d", (int)getpid()) < 0) {
        c->name = NULL;
        return -ENOMEM;
    }
    fill_macs(c);
    int r = check_files(c);
    if (r == 0)
        r = check_terminal(c);
    if (r == 0)
        r = check_nets(c);
    if (r == 0)
        r = check_ports(c);
    return r;
}

int vm_config_check_host(const struct vm_config *c)
{
    struct sysinfo info;
    if (sysinfo(&info) < 0)
        return 0;
    uint64_t have = ((uint64_t)info.totalram + info.totalswap) * info.mem_unit;
    if (c->memory <= have)
        return 0;
    char wanted[24], most[24];
    config_format_size(c->memory, wanted);
    config_format_size(align_down(have, MIB(1)), most);
    log_error("--memory: this host has less memory than %s; did you mean --memory %s?", wanted,
              most);
    return -ENOMEM;
}
