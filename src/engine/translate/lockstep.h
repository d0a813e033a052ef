/*
 * Lock-step mode: translations are compared with the interpreter while the guest runs (--translate lockstep=on).
 *
 * Before a translation is entered, the interpreter executes from the same state what the translation may, up to the first
 * branch that is taken: a trial whose stores are noted and taken back, with the state in front of each instruction kept. Then
 * the translation runs for real, without links to others, and where it comes out the registers, flags, vector state,
 * exceptions and written bytes must be those that the interpreter had there. What reaches devices or depends on time is executed
 * once, by the translation.
 *
 * Comparing costs a hundred times what the translation does, so each is compared the first 64 times, then once in 64. The
 * first difference is logged and ends the run. One vCPU only: others would change memory in between. A device may do that
 * too, so what differs is tried again first.
 */
#ifndef RINGFORT_ENGINE_TRANSLATE_LOCKSTEP_H
#define RINGFORT_ENGINE_TRANSLATE_LOCKSTEP_H

#include "engine/translate/translate.h"

/* For a vCPU whose options say so; changes those that lock-step excludes. 0 or a negative errno (logged). */
int lockstep_create(struct translator *t, unsigned vcpus);
void lockstep_destroy(struct translator *t);
/* t->enter(t, b->code) with all that is said above; the same result, or NULL after a difference (t->diverged is set). */
const struct op *lockstep_enter(struct translator *t, struct block *b);

#endif
