/*
 * CPUID of KVM's guests: the processor model, without what this KVM or the processor under it lacks.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "base/log.h"
#include "base/util.h"
#include "engine/kvm/kvm.h"
#include "isa/x86/cpu.h"
#include "isa/x86/cpuid.h"

#define MAX_ENTRIES 256
#define KVM_LEAVES 0x40000000u

static struct kvm_cpuid2 *new_cpuid(void)
{
    struct kvm_cpuid2 *c = calloc(1, sizeof(*c) + MAX_ENTRIES * sizeof(c->entries[0]));

    if (c)
        c->nent = MAX_ENTRIES;
    return c;
}

/* What KVM can show, as leaves of a model. count: how many fit, and then how many there are. */
static int supported(struct x86_cpuid_leaf *leaf, unsigned *count)
{
    const struct kvm_host *h = kvm_host(NULL);
    struct kvm_cpuid2 *c = new_cpuid();
    unsigned n = 0;
    int r;

    if (!h || !c) {
        free(c);
        return h ? -ENOMEM : -ENODEV;
    }
    r = kvm_ioctl(h->fd, KVM_GET_SUPPORTED_CPUID, c);
    for (unsigned i = 0; r >= 0 && i < c->nent && n < *count; i++) {
        const struct kvm_cpuid_entry2 *e = &c->entries[i];

        leaf[n++] = (struct x86_cpuid_leaf){ e->function, e->index, e->eax, e->ebx, e->ecx, e->edx };
        if (e->function == 1)
            /* Older kernels tell these by capabilities only. */
            leaf[n - 1].ecx |= (ioctl(h->fd, KVM_CHECK_EXTENSION, KVM_CAP_TSC_DEADLINE_TIMER) > 0 ? 1u << 24 : 0) | 1u << 31;
        if (e->function == 6)
            leaf[n - 1].eax |= 1u << 2; /* ARAT: the LAPIC's timer never stops, as it is an hrtimer */
    }
    free(c);
    *count = n;
    return r < 0 ? r : 0;
}

/* One for each model that was asked for, kept for good: vCPUs hold on to them. */
static struct offered {
    const struct x86_cpu_model *from, *model;
    struct offered *next;
} *offers;
static pthread_mutex_t offers_lock = PTHREAD_MUTEX_INITIALIZER;

/* Lock held. */
static const struct x86_cpu_model *restricted(const struct x86_cpu_model *m, const char **missing)
{
    static struct x86_cpuid_leaf leaf[MAX_ENTRIES];
    unsigned count = ARRAY_SIZE(leaf);
    struct x86_cpu_model *model;
    struct offered *o;

    for (o = offers; o; o = o->next)
        if (o->from == m || o->model == m)
            return o->model;
    *missing = "KVM";
    if (supported(leaf, &count) < 0)
        return NULL;
    model = x86_cpu_model_restrict(m, leaf, count, missing);
    o = model ? malloc(sizeof(*o)) : NULL;
    if (!o) {
        if (!*missing)
            *missing = "memory";
        x86_cpu_model_free(model);
        return NULL;
    }
    *o = (struct offered){ .from = m, .model = model, .next = offers };
    offers = o;
    return model;
}

/* Such a model may be a machine's own, so nothing of it is kept. */
static bool show_all(const struct x86_cpu_model *m, const char **missing)
{
    struct x86_cpuid_leaf leaf[MAX_ENTRIES];
    unsigned count = ARRAY_SIZE(leaf);
    struct x86_cpu_model *model;

    *missing = "KVM";
    if (supported(leaf, &count) < 0)
        return false;
    model = x86_cpu_model_restrict(m, leaf, count, missing);
    if (!model)
        return false;
    *missing = x86_cpu_model_lacks(model, m);
    x86_cpu_model_free(model);
    return *missing == NULL;
}

const struct x86_cpu_model *kvm_offer(const struct x86_cpu_model *m, bool exact, const char **missing)
{
    const struct x86_cpu_model *model;
    const char *lacking;

    if (exact) {
        if (show_all(m, missing))
            return m;
        return NULL;
    }
    pthread_mutex_lock(&offers_lock);
    model = restricted(m, missing);
    pthread_mutex_unlock(&offers_lock);
    if (!model)
        return NULL;
    lacking = x86_cpu_model_lacks(model, m);
    if (!lacking)
        return m;
    log_info("KVM shows the guest CPU model %s without %s and perhaps more", m->name, lacking);
    return model;
}

static void add_leaf(struct kvm_cpuid2 *c, const struct x86_cpu *cpu, uint32_t leaf, uint32_t subleaf, bool indexed)
{
    struct kvm_cpuid_entry2 *e;
    uint32_t r[4];

    if (c->nent == MAX_ENTRIES)
        return;
    x86_cpuid(cpu, leaf, subleaf, r);
    e = &c->entries[c->nent++];
    *e = (struct kvm_cpuid_entry2){ .function = leaf, .index = subleaf, .flags = indexed ? KVM_CPUID_FLAG_SIGNIFCANT_INDEX : 0,
                                    .eax = r[0], .ebx = r[1], .ecx = r[2], .edx = r[3] };
}

static bool indexed(uint32_t leaf)
{
    return leaf == 4 || leaf == 7 || leaf == 0xb || leaf == 0xd || leaf == 0x1f || leaf == 0x8000001d;
}

/*
 * All leaves up to the last of each range, so that KVM has an answer of the model's for each, and does not take the last one's for what
 * is not there. The same function answers the guests of the software engines.
 */
struct kvm_cpuid2 *kvm_cpuid_of(const struct vcpu *vcpu)
{
    struct kvm_cpuid2 *c = new_cpuid();
    struct x86_cpu *cpu = aligned_alloc(64, align_up(sizeof(*cpu), 64));
    static const uint32_t ranges[] = { 0, 0x80000000, KVM_LEAVES };
    uint32_t r[4];

    if (!c || !cpu)
        goto out;
    memset(cpu, 0, sizeof(*cpu));
    cpu->model = vcpu->model;
    cpu->index = vcpu->index;
    cpu->cpus = vcpu->count;
    cpu->tsc_hz = vcpu->tsc_hz;
    cpu->s.xcr0 = 1;            /* KVM fills in what follows from the guest's own */
    c->nent = 0;
    for (unsigned i = 0; i < ARRAY_SIZE(ranges); i++) {
        x86_cpuid(cpu, ranges[i], 0, r);
        for (uint32_t leaf = ranges[i]; leaf <= r[0] && leaf - ranges[i] < 64; leaf++) {
            unsigned subleaves = !indexed(leaf) ? 1 : leaf == 0xd ? 8 : leaf == 7 ? 3 : 5;

            for (uint32_t sub = 0; sub < subleaves; sub++)
                add_leaf(c, cpu, leaf, sub, indexed(leaf));
        }
    }
out:
    if (!cpu) {
        free(c);
        c = NULL;
    }
    free(cpu);
    return c;
}
