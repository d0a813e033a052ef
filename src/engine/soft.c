/*
 * Coordination of the software engines' vCPUs; see soft.h for the rules.
 *
 * The group's lock is a leaf: nothing else is locked under it.
 */
#include "engine/soft.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "device/machine.h"

/* Which vCPUs hold decoded code of a page: an open-addressing table from page number to a mask. */
struct code_users {
    uint64_t page;  /* page number + 1; 0: empty */
    uint64_t users; /* bit per vCPU; 0: deleted */
};

struct soft_group {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct machine *machine;
    struct soft_vcpu *vcpu[SOFT_MAX_VCPUS];
    unsigned count;
    struct code_users *table;
    size_t table_size, table_used; /* used counts deleted entries too */
};

static void soft_rearm(void *opaque);

static const struct memory_dirty_hooks dirty_hooks = { .rearm = soft_rearm };

struct soft_group *soft_group_create(struct machine *m)
{
    struct soft_group *g = calloc(1, sizeof(*g));

    if (!g)
        return NULL;
    g->table_size = 1024;
    g->table = calloc(g->table_size, sizeof(*g->table));
    if (!g->table) {
        free(g);
        return NULL;
    }
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->changed, NULL);
    g->machine = m;
    memory_dirty_attach(&m->memory, &dirty_hooks, g);
    return g;
}

void soft_group_destroy(struct soft_group *g)
{
    if (!g)
        return;
    memory_dirty_detach(&g->machine->memory, g);
    pthread_mutex_destroy(&g->lock);
    pthread_cond_destroy(&g->changed);
    free(g->table);
    free(g);
}

int soft_join(struct soft_group *g, struct soft_vcpu *v, struct x86_cpu *cpu)
{
    if (cpu->index >= SOFT_MAX_VCPUS)
        return -EINVAL;
    v->group = g;
    v->cpu = cpu;
    v->outside = true;
    pthread_mutex_lock(&g->lock);
    g->vcpu[cpu->index] = v;
    g->count = MAX(g->count, cpu->index + 1);
    pthread_mutex_unlock(&g->lock);
    return 0;
}

/* ---- the table of code users; lock held ---- */

static struct code_users *users_slot(struct soft_group *g, uint64_t page)
{
    size_t i = (page * 0x9e3779b97f4a7c15ull) >> 20;

    for (;; i++) {
        struct code_users *u = &g->table[i & (g->table_size - 1)];

        if (u->page == page + 1 || u->page == 0)
            return u;
    }
}

static void users_grow(struct soft_group *g)
{
    struct code_users *old = g->table;
    size_t old_size = g->table_size, live = 0;

    for (size_t i = 0; i < old_size; i++)
        live += old[i].users != 0;
    g->table_size = 1024;
    while (g->table_size < live * 4)
        g->table_size *= 2;
    g->table = calloc(g->table_size, sizeof(*g->table));
    if (!g->table)
        abort(); /* 16 bytes for each page of code: the host has no memory left at all */
    g->table_used = 0;
    for (size_t i = 0; i < old_size; i++)
        if (old[i].users) {
            *users_slot(g, old[i].page - 1) = old[i];
            g->table_used++;
        }
    free(old);
}

static void users_add(struct soft_group *g, uint64_t page, unsigned cpu)
{
    struct code_users *u;

    if (g->table_used * 2 >= g->table_size)
        users_grow(g);
    u = users_slot(g, page);
    if (!u->page) {
        u->page = page + 1;
        g->table_used++;
    }
    u->users |= 1ull << cpu;
}

static void clear_code_flag(struct soft_group *g, gpa_t gpa)
{
    _Atomic uint8_t *flags;

    if (memory_page(&g->machine->memory, gpa, &flags))
        atomic_fetch_and(flags, (uint8_t)~PAGE_CODE);
}

static void users_remove(struct soft_group *g, uint64_t page, unsigned cpu)
{
    struct code_users *u = users_slot(g, page);

    if (!u->page)
        return;
    u->users &= ~(1ull << cpu);
    if (!u->users)
        clear_code_flag(g, page << GUEST_PAGE_SHIFT);
}

/* ---- waiting and requests ---- */

static long futex(_Atomic uint32_t *word, int op, uint32_t value)
{
    return syscall(SYS_futex, word, op | FUTEX_PRIVATE_FLAG, value, NULL, NULL, 0);
}

void soft_request(struct x86_cpu *cpu, uint32_t bits)
{
    /* A vCPU that waits, or is where its engine's hook knows, has seen request 0 and does not look: only the change from 0 can have to wake. */
    if (atomic_fetch_or(&cpu->request, bits) == 0) {
        futex(&cpu->request, FUTEX_WAKE, 1);
        if (cpu->hooks->requested)
            cpu->hooks->requested(cpu);
    }
}

static void do_sync(struct soft_vcpu *v)
{
    if (!v->sync_page && !v->sync_writes)
        return;
    if (v->sync_writes)
        x86_tlb_drop_writes(v->cpu);
    else
        x86_tlb_drop_writes_to(v->cpu, v->sync_page);
    v->sync_page = NULL;
    v->sync_writes = false;
    pthread_cond_broadcast(&v->group->changed);
}

void soft_enter(struct soft_vcpu *v)
{
    pthread_mutex_lock(&v->group->lock);
    do_sync(v);
    v->outside = false;
    pthread_mutex_unlock(&v->group->lock);
}

void soft_exit(struct soft_vcpu *v)
{
    pthread_mutex_lock(&v->group->lock);
    do_sync(v);
    v->outside = true;
    pthread_mutex_unlock(&v->group->lock);
}

void soft_wait(struct soft_vcpu *v)
{
    soft_exit(v);
    while (atomic_load(&v->cpu->request) == 0)
        futex(&v->cpu->request, FUTEX_WAIT, 0);
    soft_enter(v);
}

void soft_leave(struct soft_vcpu *v)
{
    struct soft_group *g = v->group;

    if (!g)
        return;
    pthread_mutex_lock(&g->lock);
    do_sync(v);
    g->vcpu[v->cpu->index] = NULL;
    for (size_t i = 0; i < g->table_size; i++)
        if (g->table[i].users & (1ull << v->cpu->index)) {
            g->table[i].users &= ~(1ull << v->cpu->index);
            if (!g->table[i].users)
                clear_code_flag(g, (g->table[i].page - 1) << GUEST_PAGE_SHIFT);
        }
    pthread_mutex_unlock(&g->lock);
    v->group = NULL;
}

void soft_handle(struct soft_vcpu *v)
{
    struct soft_group *g = v->group;
    gpa_t post[SOFT_POSTS];
    unsigned posts;

    pthread_mutex_lock(&g->lock);
    atomic_fetch_and(&v->cpu->request, ~(REQUEST_SYNC | REQUEST_CODE));
    do_sync(v);
    posts = v->posts;
    memcpy(post, v->post, MIN(posts, SOFT_POSTS) * sizeof(post[0]));
    v->posts = 0;
    pthread_mutex_unlock(&g->lock);

    if (posts > SOFT_POSTS)
        v->drop_all(v->cpu);
    else
        for (unsigned i = 0; i < posts; i++)
            v->drop_code(v->cpu, post[i], GUEST_PAGE_SIZE);
}

/* ---- dirty logging ---- */

static void soft_rearm(void *opaque)
{
    struct soft_group *g = opaque;

    pthread_mutex_lock(&g->lock);
    for (unsigned i = 0; i < g->count; i++) {
        struct soft_vcpu *v = g->vcpu[i];

        if (!v)
            continue;
        v->sync_writes = true;
        if (v->outside)
            do_sync(v);
        else
            soft_request(v->cpu, REQUEST_SYNC);
    }
    for (unsigned i = 0; i < g->count; i++) {
        /* A vCPU that leaves or waits meanwhile does it on its way out. */
        while (g->vcpu[i] && !g->vcpu[i]->outside && g->vcpu[i]->sync_writes)
            pthread_cond_wait(&g->changed, &g->lock);
        if (g->vcpu[i])
            do_sync(g->vcpu[i]);
    }
    pthread_mutex_unlock(&g->lock);
}

/* ---- code pages ---- */

void soft_page_becomes_code(struct soft_vcpu *v, gpa_t gpa, const void *host_page,
                            _Atomic uint8_t *flags)
{
    struct soft_group *g = v->group;
    uint8_t old;

    pthread_mutex_lock(&g->lock);
    users_add(g, gpa >> GUEST_PAGE_SHIFT, v->cpu->index);
    old = atomic_fetch_or(flags, PAGE_CODE);
    if (old & PAGE_WRITABLE) {
        x86_tlb_drop_writes_to(v->cpu, host_page);
        if (g->count > 1) {
            /* While this vCPU waits it runs no guest code, so others need not wait for it. */
            do_sync(v);
            v->outside = true;
            pthread_cond_broadcast(&g->changed);
            for (unsigned i = 0; i < g->count; i++) {
                struct soft_vcpu *o = g->vcpu[i];

                if (!o || o == v)
                    continue;
                while (!o->outside && o->sync_page) /* somebody else's request */
                    pthread_cond_wait(&g->changed, &g->lock);
                o->sync_page = host_page;
                if (!o->outside)
                    soft_request(o->cpu, REQUEST_SYNC);
                while (!o->outside && o->sync_page == host_page)
                    pthread_cond_wait(&g->changed, &g->lock);
                if (o->outside)
                    do_sync(o);
            }
            v->outside = false;
        }
        /* Entries for writing that are filled from now on see PAGE_CODE. */
        atomic_fetch_and(flags, (uint8_t)~PAGE_WRITABLE);
    }
    pthread_mutex_unlock(&g->lock);
}

void soft_page_code_dropped(struct soft_vcpu *v, gpa_t gpa)
{
    pthread_mutex_lock(&v->group->lock);
    users_remove(v->group, gpa >> GUEST_PAGE_SHIFT, v->cpu->index);
    pthread_mutex_unlock(&v->group->lock);
}

/* Lock held. */
static void post(struct soft_vcpu *v, gpa_t page)
{
    if (v->posts < SOFT_POSTS) {
        for (unsigned i = 0; i < v->posts; i++)
            if (v->post[i] == page)
                goto request;
        v->post[v->posts] = page;
    }
    if (v->posts <= SOFT_POSTS)
        v->posts++;
request:
    soft_request(v->cpu, REQUEST_CODE);
}

void soft_code_written(struct soft_vcpu *v, gpa_t gpa, unsigned len)
{
    struct soft_group *g = v->group;

    v->drop_code(v->cpu, gpa, len);
    if (g->count < 2)
        return;
    pthread_mutex_lock(&g->lock);
    for (gpa_t page = gpa & GUEST_PAGE_MASK; page < gpa + len; page += GUEST_PAGE_SIZE) {
        struct code_users *u = users_slot(g, page >> GUEST_PAGE_SHIFT);

        if (!u->page)
            continue;
        for (uint64_t users = u->users & ~(1ull << v->cpu->index); users; users &= users - 1) {
            struct soft_vcpu *o = g->vcpu[__builtin_ctzll(users)];

            if (o)
                post(o, page);
        }
    }
    pthread_mutex_unlock(&g->lock);
}

void soft_post_code(struct soft_vcpu *v, gpa_t page)
{
    pthread_mutex_lock(&v->group->lock);
    post(v, page & GUEST_PAGE_MASK);
    pthread_mutex_unlock(&v->group->lock);
}
