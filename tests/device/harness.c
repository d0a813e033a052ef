/*
 * A machine of parts for the device tests, without vCPUs and without a board: 64 MiB of RAM, interrupt
 * controllers, PCI, serial port, CMOS clock, power controls, test devices, and what options add.
 * It speaks the device test protocol on standard input and output, or on a socket.
 */
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/block/block.h"
#include "backend/console/console.h"
#include "backend/net/net.h"
#include "base/log.h"
#include "base/util.h"
#include "device/irqchip/irqchip.h"
#include "device/machine.h"
#include "device/pci.h"
#include "device/power.h"
#include "device/rtc.h"
#include "device/serial.h"
#include "device/testdev.h"
#include "device/virtio/virtio.h"
#include "vm/devtest.h"

#define TSC_HZ 1000000000u  /* the manual clock's nanoseconds are the guest's TSC */
#define ECHO_FRAMES 64

/* A network that sends every frame back. */
struct echo_net {
    struct net net;
    struct loop *loop;
    struct loop_call call;
    bool ready;
    unsigned first, count;
    struct {
        size_t len;
        uint8_t *data;
    } frame[ECHO_FRAMES];
};

static int echo_send(struct net *n, const struct iovec *iov, unsigned iovcnt)
{
    struct echo_net *e = container_of(n, struct echo_net, net);
    if (e->count == ECHO_FRAMES)
        return 0; /* lost, as networks do */
    size_t len = 0;
    for (unsigned i = 0; i < iovcnt; i++)
        len += iov[i].iov_len;
    uint8_t *data = malloc(len + 1);
    if (!data)
        return 0;
    unsigned slot = (e->first + e->count++) % ECHO_FRAMES;
    e->frame[slot].data = data;
    e->frame[slot].len = len;
    for (unsigned i = 0; i < iovcnt; i++) {
        memcpy(data, iov[i].iov_base, iov[i].iov_len);
        data += iov[i].iov_len;
    }
    loop_schedule(e->loop, &e->call);
    return 0;
}

static void echo_deliver(void *opaque)
{
    struct echo_net *e = opaque;
    while (e->ready && e->count && e->net.receive) {
        unsigned slot = e->first;
        struct iovec iov = {e->frame[slot].data, e->frame[slot].len};
        if (!e->net.receive(e->net.opaque, &iov, 1))
            return;
        free(e->frame[slot].data);
        e->first = (slot + 1) % ECHO_FRAMES;
        e->count--;
    }
}

static uint64_t echo_features(struct net *n) { return 0; }
static void echo_set_features(struct net *n, uint64_t features) {}

static void echo_set_receive(struct net *n, bool ready)
{
    struct echo_net *e = container_of(n, struct echo_net, net);
    e->ready = ready;
    if (ready)
        loop_schedule(e->loop, &e->call);
}

static void echo_close(struct net *n)
{
    struct echo_net *e = container_of(n, struct echo_net, net);
    loop_cancel(e->loop, &e->call);
    for (; e->count; e->count--, e->first = (e->first + 1) % ECHO_FRAMES)
        free(e->frame[e->first].data);
    free(e);
}

static const struct net_ops echo_ops = {
    .name = "echo", .send = echo_send, .features = echo_features, .set_features = echo_set_features,
    .set_receive = echo_set_receive, .close = echo_close,
};

static struct net *echo_create(struct loop *loop)
{
    struct echo_net *e = calloc(1, sizeof(*e));
    if (!e)
        abort();
    e->net.ops = &echo_ops;
    e->loop = loop;
    e->call = (struct loop_call){.fn = echo_deliver, .opaque = e};
    return &e->net;
}

static const struct pci_host_config pci_config = {
    .ecam_base = 0xe0000000, .ecam_size = 0x10000000,
    .mem32_base = 0xc0000000, .mem32_size = 0x20000000,
    .mem64_base = UINT64_C(0x4000000000), .mem64_size = UINT64_C(0x1000000000),
    .io_base = 0xc000, .io_size = 0x4000,
    .intx_gsi = {16, 17, 18, 19},
};

static void die(const char *what)
{
    fprintf(stderr, "harness: %s\n", what);
    exit(2);
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"socket", required_argument, NULL, 's'}, {"cpus", required_argument, NULL, 'c'},
        {"console", required_argument, NULL, 'C'}, {"disk", required_argument, NULL, 'd'},
        {"readonly-disk", required_argument, NULL, 'r'}, {"net", no_argument, NULL, 'n'},
        {"virtio-console", required_argument, NULL, 'v'}, {"rng", no_argument, NULL, 'g'},
        {0},
    };
    static struct machine m;
    const char *socket = NULL, *serial_spec = "none";
    struct console *consoles[8] = {0};
    unsigned cpus = 2, console_count = 0, nets = 0;
    struct { int kind; const char *value; } device[16];
    unsigned devices = 0;

    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (o) {
        case 's':
            socket = optarg;
            break;
        case 'c':
            cpus = (unsigned)atoi(optarg);
            break;
        case 'C':
            serial_spec = optarg;
            break;
        case '?':
            return 2;
        default:
            if (devices == ARRAY_SIZE(device))
                die("too many devices");
            device[devices].kind = o;
            device[devices++].value = optarg;
        }
    }
    if (!getenv("HARNESS_VERBOSE"))
        log_set_level(LOG_ERROR);
    if (machine_init(&m, true) || memory_add_ram(&m.memory, 0, MIB(64)))
        die("no machine");
    /* Made before the loop runs, in its thread; the lock as devices expect it. */
    pthread_mutex_lock(&m.lock);
    if (!irqchip_create(&m, cpus, TSC_HZ))
        die("no irqchip");
    struct pci_host *pci = pci_host_create(&m, &pci_config);
    if (!pci || console_open(m.loop, serial_spec, &consoles[console_count++]) ||
        !serial_create(&m, SERIAL_COM1_PORT, SERIAL_COM1_GSI, consoles[0]) || !rtc_create(&m) ||
        !power_create(&m, pci) || testdev_add_pc_testdev(&m) ||
        testdev_add_debug_exit(&m, TESTDEV_EXIT_PORT, TESTDEV_EXIT_PORTS))
        die("no devices");
    for (unsigned i = 0; i < devices; i++) {
        bool ok = false;
        switch (device[i].kind) {
        case 'd':
        case 'r': {
            struct block *b;
            struct block_options opt = {.path = device[i].value, .readonly = device[i].kind == 'r'};
            ok = block_open(m.loop, &opt, &b) == 0 &&
                 virtio_blk_create(&m, pci, b, &(struct virtio_blk_options){.serial = "harness"});
            break;
        }
        case 'n': {
            const uint8_t mac[6] = {0x52, 0x54, 0, 0, 0, (uint8_t)++nets};
            ok = virtio_net_create(&m, pci, echo_create(m.loop), mac);
            break;
        }
        case 'v':
            if (console_count == ARRAY_SIZE(consoles))
                die("too many consoles");
            ok = console_open(m.loop, device[i].value, &consoles[console_count]) == 0 &&
                 virtio_console_create(&m, pci, consoles[console_count]);
            console_count++;
            break;
        case 'g':
            ok = virtio_rng_create(&m, pci);
            break;
        }
        if (!ok)
            die("a device could not be made");
    }
    machine_reset_devices(&m);
    pci_assign_bars(pci);
    pthread_mutex_unlock(&m.lock);

    int ret = socket ? devtest_serve(&m, socket) : devtest_run_fds(&m, STDIN_FILENO, STDOUT_FILENO);

    /* Devices hang on consoles, and consoles on the loop. */
    machine_destroy_devices(&m);
    for (unsigned i = 0; i < console_count; i++)
        console_close(consoles[i]);
    machine_destroy(&m);
    return ret ? 1 : 0;
}
