/*
 * The state of a whole machine but its RAM: one stream that every engine and every host can go on from.
 *
 * Snapshots, migration and engine switches are uses of these functions. docs/state.md has the
 * table of sections. The machine stands still meanwhile: no vCPU is in its engine, devices are paused, and guest time
 * stands. Machine lock held, but for the vm_state_peek functions, which need no machine.
 *
 * Time. The guest has three clocks: the machine's (timers), the TSC, and KVM's clock, which is made from the TSC. The
 * host's counter runs on while the machine stands still, so vm_go_on() moves the TSC by what it ran, and all
 * three go on from where they stood.
 */
#ifndef RINGFORT_VM_STATE_H
#define RINGFORT_VM_STATE_H

#include <stddef.h>
#include <stdint.h>

struct engine;
struct machine;
struct state_reader;
struct state_writer;
struct vcpu;
struct x86_cpu_model;

#define VM_HARDWARE_MAX_CPUS 64

/* What of a virtual machine has state. Borrowed. */
struct vm_hardware {
    struct machine *machine;
    const struct engine *engine;
    struct vcpu *vcpus[VM_HARDWARE_MAX_CPUS];
    unsigned cpus;
    const struct x86_cpu_model *model;
    uint64_t tsc_hz;
    const char *config;         /* JSON that the machine can be made from again; NULL: not saved */
};

/* Where the clocks stood when the machine stopped. */
struct vm_standstill {
    uint64_t base_tsc;          /* the counter that TSC offsets refer to */
    uint64_t kvmclock_ns;
};

/* Stops guest time. vCPUs are out of their engine already. */
void vm_stand_still(const struct vm_hardware *hw, struct vm_standstill *still);
/* Guest time goes on; before the first vCPU runs. */
void vm_go_on(const struct vm_hardware *hw, const struct vm_standstill *still);

/* Errors are the writer's: state_writer_finish() tells. */
void vm_state_save(const struct vm_hardware *hw, const struct vm_standstill *still, struct state_writer *w);
/*
 * Into a machine of the same configuration, whose RAM has its contents already. Sets *still for vm_go_on(). 0, or -EINVAL
 * (logged: what is wrong, or which newer section this ringfort does not know); the machine may then only be destroyed.
 */
int vm_state_load(const struct vm_hardware *hw, struct vm_standstill *still, const struct state_reader *r);

/*
 * Before there is a machine: whether this is the state of one and not too new, and what it is made from. *config is
 * borrowed from the reader's buffer and not terminated; NULL when there is none. 0 or -EINVAL (logged).
 */
int vm_state_peek(const struct state_reader *r, const char **config, size_t *config_len, uint64_t *tsc_hz);
/* The leaves of its CPUID, for vm_config_set_cpuid(); in the reader's memory. 0 or -EINVAL (logged). */
int vm_state_peek_cpuid(const struct state_reader *r, const void **leaves, size_t *len);

#endif
