/*
 * Direct execution: user code of the guest runs natively in a sandboxed process of the host (sandbox.h), as long as
 * that pays; the kernel and everything that is not plain user code stay with the translator. docs/direct.md says what, when and why.
 *
 * What the sandbox sees is a shadow of the guest's page tables: pages are mapped when they are first touched, with the rights that the
 * guest's entries give at that moment, and looked at again when the guest invalidates its TLB. Each address space of the soft TLB has
 * a sandbox of its own.
 *
 * In the vCPU's thread, except where another is named.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_DIRECT_H
#define RINGFORT_ENGINE_TRANSLATE_DIRECT_H

#include "engine/engine.h"
#include "engine/interp/interp.h"

struct direct;
struct translator;

/* Before the vCPU runs. 0 (also where there is no direct execution: t->direct stays NULL) or a negative errno (logged). */
int direct_create(struct translator *t);
void direct_destroy(struct translator *t);
/* Around the vCPU's running, in that thread. */
void direct_attach(struct translator *t);
void direct_detach(struct translator *t);

/* The translator came to code of the other privilege: to the user's, or to the supervisor's. t->direct is there. */
void direct_entered(struct translator *t, bool user);
/* The interpreter has run very many blocks of the page of a detour. */
void direct_lingers(struct translator *t);
/* interp.run_user. */
enum interp_user direct_run(struct interp *it);

/* Hook of the vCPU, see cpu.h: makes user code that runs natively come out. Any thread, signal handlers too. */
void direct_requested(struct translator *t);
/* Hooks of the soft TLB: see cpu.h. The second one: any thread that has the right to change the vCPU's TLB. */
void direct_flushed(struct translator *t, const struct x86_tlb_space *space, gva_t va, bool all);
void direct_writes_dropped(struct translator *t, const void *host_page);

void direct_counters(const struct translator *t, struct engine_counters *c);

#endif
