/*
 * The configuration object: everything that says what a machine is, and nothing about how it runs.
 *
 * It is filled from defaults, then from a JSON file, then from command-line flags, which have the
 * same names as the JSON keys (config_options.c has the one table of both); vm_config_finish() then
 * checks what no single key can show. JSON that vm_config_to_json() writes reads back as the same
 * object.
 *
 * Ownership: every string and array here belongs to the object and is freed by vm_config_destroy(),
 * also those inside the backends' option structs. Pointers stay valid until then; vm_create()
 * borrows the object for the life of the machine. One thread at a time.
 */
#ifndef RINGFORT_VM_CONFIG_H
#define RINGFORT_VM_CONFIG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "backend/block/block.h"
#include "backend/net/net.h"
#include "base/log.h"
#include "engine/translate/options.h"
#include "isa/x86/cpuid.h"

#define VM_CONFIG_MAX_CPUS    64
#define VM_CONFIG_MAX_CPUID   256
#define VM_CONFIG_MIN_MEMORY  ((uint64_t)16 << 20)
#define VM_CONFIG_MAX_MEMORY  ((uint64_t)1 << 40)
#define VM_CONFIG_MAX_INITRDS 64
/* PCI slots of bus 0 that are left for disks, nets and virtio devices together. */
#define VM_CONFIG_MAX_PCI_DEVICES 30
/* virtio 1.2 §5.2.6: the serial number is a field of 20 bytes. */
#define VM_CONFIG_MAX_SERIAL 20

struct vm_disk_config {
    struct block_options block; /* path is never NULL */
    char *serial;               /* NULL: none; else 1…20 printable characters */
};

enum vm_net_type { VM_NET_USER, VM_NET_TAP };

struct vm_net_config {
    enum vm_net_type type;
    /* Filled by vm_config_finish() when not given: stable for a given name and index. */
    uint8_t mac[6];
    bool mac_given;
    /*
     * The options of the type. Forwards: host_addr and guest_addr are IPv4 addresses in dotted
     * form; guest_addr is "" for the address that the backend's DHCP gives out. Ports 1…65535.
     */
    struct net_user_options user;
    struct net_tap_options tap; /* ifname is never NULL for VM_NET_TAP */
};

enum vm_device_type {
    VM_DEVICE_DEBUG_EXIT,     /* isa-debug-exit */
    VM_DEVICE_PC_TESTDEV,     /* pc-testdev */
    VM_DEVICE_VIRTIO_RNG,     /* virtio-rng */
    VM_DEVICE_VIRTIO_CONSOLE, /* virtio-console */
};

struct vm_device_config {
    enum vm_device_type type;
    uint16_t iobase, iosize; /* isa-debug-exit: the port range; size 1, 2 or 4 */
    char *console;           /* virtio-console: a spec for console_open(); never NULL there */
};

enum vm_on_crash {
    VM_ON_CRASH_RESET, /* as hardware does after a triple fault */
    VM_ON_CRASH_EXIT,  /* leave with VM_STATUS_CRASH */
};

struct vm_config {
    char *file; /* where it was read from, which nothing of the machine may write to; NULL: no file */
    char *name; /* never NULL after vm_config_finish(); "vm-<pid>" when not given */
    bool name_given;
    char *kernel;   /* never NULL for vm_create() */
    char **initrds; /* in the order given; the first is Linux's initrd */
    unsigned initrd_count;
    char *cmdline;   /* never NULL; "" when not given */
    unsigned cpus;   /* 1…VM_CONFIG_MAX_CPUS */
    uint64_t memory; /* bytes, a multiple of 4 KiB */
    char *cpu_model; /* a name that x86_cpu_model_find() knows */
    char *engine;    /* "auto" or the name of an engine */
    struct translate_options translate; /* of the engine "translate" */
    struct vm_disk_config *disks;
    unsigned disk_count;
    struct vm_net_config *nets;
    unsigned net_count;
    struct vm_device_config *devices;
    unsigned device_count;
    char *console; /* the serial port's; a spec for console_open(); never NULL */
    enum vm_on_crash on_crash;
    char *trace_exec;       /* for trace_open(), with what follows; NULL: none */
    bool trace_registers;
    uint64_t trace_size;
    unsigned trace_files;
    char *stats; /* file for vm_stats_write(), NULL: none */
    enum log_level log_level;
    uint64_t flags_given; /* config.c's own: bit i: option i came from a flag */
    /* CPUID of a guest that was started elsewhere (saved, migrated), which this machine then has to show; NULL: a new guest. Owned. */
    struct x86_cpuid_leaf *cpuid;
    unsigned cpuid_count;
    bool net_none;        /* config.c's own: "none" was asked for, so no other net may be */
};

/* The defaults. 0 or -ENOMEM; after an error vm_config_destroy() is allowed and does nothing. */
int vm_config_init(struct vm_config *c);
/* Takes a copy of the leaves' bytes, as saved. 0, -EINVAL (logged) when they are not leaves, -ENOMEM. */
int vm_config_set_cpuid(struct vm_config *c, const void *bytes, size_t len);
/* Idempotent. */
void vm_config_destroy(struct vm_config *c);

/*
 * Fill from JSON text (one object). file is named in messages. 0, -EINVAL (one line logged: what is
 * wrong, where, and the nearest valid form), -ENOMEM. vm_config_load_file() also returns the errno
 * of reading. After an error the object holds some of the values and may only be destroyed.
 */
int vm_config_load_json(struct vm_config *c, const char *text, size_t len, const char *file);
int vm_config_load_file(struct vm_config *c, const char *file);

/*
 * Sets the option of a flag: name without its dashes. A list's first flag replaces what the file
 * said, further ones append; a single value given by two flags is an error. Call after
 * vm_config_load_file(). Errors as above; -ENOENT (silent) when there is no such option.
 */
int vm_config_set_flag(struct vm_config *c, const char *name, const char *value);

/*
 * Checks what spans several keys (two users of one resource, too many devices) and fills in what
 * derives from other values. 0, -EINVAL (logged). vm_config_check_host() then says whether this
 * host is big enough: 0, -ENOMEM (logged).
 */
int vm_config_finish(struct vm_config *c);
int vm_config_check_host(const struct vm_config *c);

/*
 * The effective configuration as JSON text with a final newline; the caller frees it. A name that
 * was not given is left out. NULL (logged): out of memory, or a file name that is not UTF-8, which
 * JSON cannot hold.
 */
char *vm_config_to_json(const struct vm_config *c);

/* The table of flags = keys, for --help and for suggestions. i counts from 0; false past the end.
 */
struct vm_config_option_info {
    const char *name;     /* "memory": the flag --memory and the key "memory" */
    const char *argument; /* "SIZE" */
    const char *help;     /* may have several lines; valid until the next call in this thread */
    bool list;            /* may be given several times; an array in JSON */
};
bool vm_config_option(unsigned i, struct vm_config_option_info *out);
/* Names of one kind, NULL-terminated, for messages and help: "engine", "cpu-model", "device". NULL:
 * no such kind. */
const char *const *vm_config_names(const char *kind);

#endif
