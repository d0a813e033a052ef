/*
 * What the software engines' vCPUs of one machine have to settle among each other.
 *
 * Each vCPU decodes for itself and has its own TLB. Three things concern them all:
 *
 *   - A page becomes code: before its bytes are decoded, no vCPU may keep a TLB entry that lets
 *     writes to it pass unseen. soft_page_becomes_code() sets PAGE_CODE and, if PAGE_WRITABLE says
 *     that somebody may hold such an entry, waits until every vCPU has dropped it (its own at
 *     once; a halted or stopped vCPU's on its behalf).
 *   - A page of code was written: whoever wrote drops its own decoded code and posts the page to
 *     the others, which drop theirs at the next block boundary. The writer's later stores that
 *     make the new code known are ordered after the post, so nobody who sees them runs stale code.
 *   - Dirty logging (memory.h) wants to hear of writes again: every vCPU drops all its write tags, at the next
 *     block boundary, and whoever asked waits for all of them. The group attaches itself to the machine's memory.
 */
#ifndef RINGFORT_ENGINE_SOFT_H
#define RINGFORT_ENGINE_SOFT_H

#include "engine/engine.h"
#include "isa/x86/cpu.h"

#define SOFT_MAX_VCPUS 64
#define SOFT_POSTS     16

struct soft_vcpu {
    struct soft_group *group;
    struct x86_cpu *cpu;
    /* Drops decoded code of [gpa, gpa+len) in this vCPU; its own thread. */
    void (*drop_code)(struct x86_cpu *cpu, gpa_t gpa, unsigned len);
    void (*drop_all)(struct x86_cpu *cpu);
    /* Guarded by the group's lock: */
    bool outside;          /* not executing guest code: others may change its TLB */
    const void *sync_page; /* host page whose write entries it has to drop */
    bool sync_writes;      /* it has to drop all write entries */
    gpa_t post[SOFT_POSTS];
    unsigned posts; /* > SOFT_POSTS: too many, drop everything */
};

struct soft_group *soft_group_create(struct machine *m);
void soft_group_destroy(struct soft_group *g);
int soft_join(struct soft_group *g, struct soft_vcpu *v, struct x86_cpu *cpu);
void soft_leave(struct soft_vcpu *v);

/* Around the execution of guest code, in the vCPU's thread. */
void soft_enter(struct soft_vcpu *v);
void soft_exit(struct soft_vcpu *v);
/* Waits (outside) until cpu->request is not 0. */
void soft_wait(struct soft_vcpu *v);
/* Any thread: sets request bits and ends soft_wait(). */
void soft_request(struct x86_cpu *cpu, uint32_t bits);
/* At a block boundary with REQUEST_SYNC or REQUEST_CODE set: does what they ask and clears them. */
void soft_handle(struct soft_vcpu *v);

/* See above. gpa: page address; flags: its page flags. */
void soft_page_becomes_code(struct soft_vcpu *v, gpa_t gpa, const void *host_page,
                            _Atomic uint8_t *flags);
/* The last decoded code of the page is gone from this vCPU; clears PAGE_CODE if it was the last. */
void soft_page_code_dropped(struct soft_vcpu *v, gpa_t gpa);
/* hooks.code_written of software engines: own code, then the others'. */
void soft_code_written(struct soft_vcpu *v, gpa_t gpa, unsigned len);
/* Any thread: a device wrote the page. */
void soft_post_code(struct soft_vcpu *v, gpa_t page);

#endif
