/*
 * Return stacks: memory, guard pages, and what happens when one of them is hit.
 *
 * Guests recurse as deep as they like, so a return stack overflows. The push that hits the guard page is repeated at the
 * bottom: what was on the stack is forgotten, and the guest's later returns find their way through the jump table.
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "base/log.h"
#include "engine/translate/translate.h"

#define STACK_SIZE KIB(64)
/* Where a guest's return address got lost: no guest returns there. */
#define NO_RETURN 0x8000000000000000ull
/* Room for the largest frame that a kernel makes for a signal, and the handler's own. */
#define SIGNAL_STACK KIB(64)

static __thread struct translator *attached;
static struct sigaction previous;

static bool in_guard(const struct translator *t, uint64_t address)
{
    for (unsigned i = 0; i < ARRAY_SIZE(t->returns); i++)
        if (address - (uint64_t)t->returns[i].memory < GUEST_PAGE_SIZE)
            return true;
    return false;
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    ucontext_t *c = context;
    struct translator *t = attached;

    if (t && in_guard(t, (uint64_t)info->si_addr)) {
        t->stack_overflows++;
        /* Which half of a pair it was stays the same: one half is compared with what the guest has, the other is jumped to. */
        c->uc_mcontext.gregs[REG_RSP] =
            (greg_t)((uint64_t)t->it.returns.bottom - (((uint64_t)t->it.returns.bottom - (uint64_t)c->uc_mcontext.gregs[REG_RSP]) & 8));
        return;
    }
    /* Not ours: it happens again, with whoever was here before. */
    sigaction(number, &previous, NULL);
}

static void catch_faults(void)
{
    struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART };

    sigaction(SIGSEGV, &action, &previous);
}

void translate_forget_returns(struct translator *t, unsigned mode)
{
    t->returns[mode].saved = t->returns[mode].bottom;
    if (t->return_mode == mode)
        t->it.returns.top = t->returns[mode].bottom;
}

int translate_returns_create(struct translator *t)
{
    for (unsigned i = 0; i < ARRAY_SIZE(t->returns); i++) {
        struct return_stack *r = &t->returns[i];
        uint8_t *memory = mmap(NULL, STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

        if (memory == MAP_FAILED || mprotect(memory, GUEST_PAGE_SIZE, PROT_NONE)) {
            log_error("cannot make a return stack: %s", strerror(errno));
            if (memory != MAP_FAILED)
                munmap(memory, STACK_SIZE);
            return -ENOMEM;
        }
        r->memory = memory;
        r->bottom = (uint64_t *)(memory + STACK_SIZE - 64);
        r->bottom[0] = (uint64_t)t->return_stub;
        r->bottom[-1] = NO_RETURN;
        r->saved = r->bottom;
    }
    t->return_mode = 0;
    t->it.returns = (struct interp_returns){ .top = t->returns[0].bottom, .bottom = t->returns[0].bottom,
                                             .limit = (uint64_t *)(t->returns[0].memory + GUEST_PAGE_SIZE),
                                             .stub = (uint64_t)t->return_interpreted };
    t->signal_stack = malloc(SIGNAL_STACK);
    return t->signal_stack ? 0 : -ENOMEM;
}

void translate_returns_destroy(struct translator *t)
{
    for (unsigned i = 0; i < ARRAY_SIZE(t->returns); i++)
        if (t->returns[i].memory)
            munmap(t->returns[i].memory, STACK_SIZE);
    free(t->signal_stack);
}

int translate_returns_attach(struct translator *t)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    stack_t stack = { .ss_sp = t->signal_stack, .ss_size = SIGNAL_STACK };

    pthread_once(&once, catch_faults);
    if (sigaltstack(&stack, &t->former_signal_stack)) {
        log_error("cannot set a signal stack: %s", strerror(errno));
        return -errno;
    }
    attached = t;
    return 0;
}

void translate_returns_detach(struct translator *t)
{
    attached = NULL;
    sigaltstack(&t->former_signal_stack, NULL);
}
