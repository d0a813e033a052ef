/*
 * Fuzz target: the state of a whole machine. A good one is made once; the input is a list of edits, four bytes each (a u16 that
 * says where, what to do, a value), that are made to it before it is loaded into a machine with all kinds of devices.
 * Loading refuses it or gives a machine that can run: for a moment it does, and it can be saved again.
 *
 * What it does: 0 fill a field with the value; 1 a field's first byte; 2 a bit of a field; 3 any byte; 4 cut the end off;
 * 5 a field becomes -1; others nothing.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/state.h"
#include "base/util.h"
#include "vm/config.h"
#include "vm/vm_internal.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MAX_FIELDS 4096

static struct vm *vm;
static struct vm_config config;
static uint8_t *good;
static size_t good_len;
static struct { size_t at, len; } field[MAX_FIELDS];
static unsigned fields;

/* Where the fields are whose bytes may be changed without breaking the tree. */
static void find_fields(size_t at, size_t end)
{
    while (at < end) {
        bool section = good[at] == 'S';
        size_t body = at + 2 + good[at + 1] + (section ? 8 : 4), len = load_le32(good + body - 4);

        if (section)
            find_fields(body, body + len);
        else if (len && fields < MAX_FIELDS) {
            field[fields].at = body;
            field[fields++].len = len;
        }
        at = body + len;
    }
}

static void set(const char *flag, const char *value)
{
    if (vm_config_set_flag(&config, flag, value))
        abort();
}

static void make_machine(void)
{
    char disk[] = "/tmp/ringfort-fuzz-XXXXXX", option[64];
    struct state_writer *w = state_writer_create();
    const void *stream;
    int fd = mkstemp(disk), status;

    if (fd < 0 || ftruncate(fd, MIB(1)) || vm_config_init(&config))
        abort();
    close(fd);
    snprintf(option, sizeof(option), "path=%s", disk);
    set("memory", "16M");
    set("cpus", "2");
    set("console", "none");
    set("engine", "translate");
    set("disk", option);
    set("net", "user");
    set("device", "virtio-rng");
    set("device", "virtio-console");
    set("device", "pc-testdev");
    set("device", "isa-debug-exit");
    if (vm_config_finish(&config) || !(vm = vm_create_empty(&config, 0, VM_HOLD_SAVE, &status)))
        abort();
    unlink(disk);
    /* Code that goes somewhere: 32-bit push, call, stores, ports, halts by turns. */
    for (unsigned i = 0; i < MIB(1); i++)
        memory_fill(&vm->machine.memory, i, (uint8_t)("\x50\xe8\x10\x00\x00\x00\x89\x03\xee\x40\xf4\x74\x02\x0f\x31\xeb"[i % 16]), 1);
    if (vm_save(vm, w) || state_writer_finish(w, &stream, &good_len))
        abort();
    good = malloc(good_len);
    memcpy(good, stream, good_len);
    state_writer_free(w);
    find_fields(0, good_len);
    if (vm_start(vm))
        abort();
}

static size_t edit(uint8_t *state, const uint8_t *data, size_t size)
{
    size_t len = good_len;

    for (; size >= 4; data += 4, size -= 4) {
        unsigned where = load_le16(data), value = data[3], f = where % fields;

        switch (data[2] % 8) {
        case 0: memset(state + field[f].at, (int)value, field[f].len); break;
        case 1: state[field[f].at] = (uint8_t)value; break;
        case 2: state[field[f].at + value / 8 % field[f].len] ^= (uint8_t)(1u << value % 8); break;
        case 3: state[(uint64_t)where * good_len >> 16] = (uint8_t)value; break;
        case 4: len = MIN(len, ((uint64_t)where * good_len >> 16) + value); break;
        case 5: memset(state + field[f].at, 0xff, field[f].len); break;
        }
    }
    return len;
}

/* Lets the vCPUs run for a moment; nothing ends or resets this machine. */
static void run_a_little(void)
{
    struct timespec t = {.tv_nsec = 50000};
    struct state_writer *w = state_writer_create();

#ifdef __SANITIZE_ADDRESS__
    /* Such a build also reports what the interpreter does on purpose: stores to guest addresses that are not aligned. */
    if (vm_save(vm, w))
        abort();
    state_writer_free(w);
    return;
#endif
    if (vm_resume(vm, VM_HOLD_SAVE))
        abort();
    nanosleep(&t, NULL);
    pthread_mutex_lock(&vm->gate);
    vm->ended = vm->reset_wanted = false;
    pthread_mutex_unlock(&vm->gate);
    if (vm_pause(vm, VM_HOLD_SAVE) || vm_save(vm, w))
        abort();
    state_writer_free(w);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct state_reader r;
    uint8_t *state;
    size_t len;

    log_set_level(-1);
    if (!vm)
        make_machine();
    state = malloc(good_len);
    memcpy(state, good, good_len);
    len = edit(state, data, size);
    uint8_t *exact = malloc(MAX(len, 1u));
    memcpy(exact, state, len);
    free(state);
    state_reader_init(&r, exact, len);
    if (vm_load(vm, &r) == 0)
        run_a_little();
    free(exact);
    return 0;
}
