/*
 * Compares an engine with the host processor on random cases.
 *
 * Batches go through two stages side by side: the child process runs one natively while the engine runs the
 * one before. A case that differs is cut down to the instructions that matter and shown. Exit status: 0 all equal, 1
 * differences, 2 something failed, 77 the host cannot do it.
 */
#include <Zydis/Zydis.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "diff.h"
#include "engine/engine.h"
#include "engine/translate/options.h"
#include "engine/translate/sandbox.h"

#define SKIPPED 77
#define DIFFERENCE_TEXT 16384

struct options {
    struct generate_options generate;
    const char *engine, *model;
    uint64_t first, count;
    double seconds;
    unsigned shown;             /* differences to show */
    bool one, minimize, progress;
};

struct batch {
    unsigned count;
    uint8_t data[DATA_SIZE];
    struct cpu_case c[BATCH];
};

static struct host *host;
static struct guest *guest;
static struct batch batches[2];
static struct cpu_result guest_result;
static uint64_t compared, skipped, differences, excused, unstable;
static uint32_t generated[ZYDIS_MNEMONIC_MAX_VALUE + 1], differing[ZYDIS_MNEMONIC_MAX_VALUE + 1];
static uint64_t by_vector[32];

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---- one case by itself; data memory is set on both sides ---- */

static bool run_alone(const struct cpu_case *c, char *text, size_t size)
{
    static struct cpu_result h;

    host_start(host, c, 1);
    host_finish(host, &h);
    if (h.end != END_FAULT) {
        snprintf(text, size, "  the native side does not end with a fault\n");
        return true;
    }
    guest_run(guest, c, &guest_result);
    return compare_results(c, &h, &guest_result, text, size) || known_difference(c, &h, &guest_result);
}

/* Replaces one instruction after the other by NOPs, as long as the case still differs. */
static void minimize(struct cpu_case *c, char *text, size_t size)
{
    for (unsigned i = c->insns; i-- > 0;) {
        struct case_insn saved = c->insn[i];
        uint8_t bytes[16];

        if (saved.offset + saved.length > c->bytes)
            continue;
        memcpy(bytes, c->code + saved.offset, saved.length);
        memset(c->code + saved.offset, 0x90, saved.length);
        if (run_alone(c, text, size))
            memcpy(c->code + saved.offset, bytes, saved.length);
        else
            c->insn[i].mnemonic = ZYDIS_MNEMONIC_NOP;
    }
    run_alone(c, text, size);
}

/* For showing: without what became NOPs. */
static void drop_nops(struct cpu_case *c)
{
    unsigned n = 0;

    for (unsigned i = 0; i < c->insns; i++)
        if (c->insn[i].mnemonic != ZYDIS_MNEMONIC_NOP)
            c->insn[n++] = c->insn[i];
    c->insns = (uint16_t)n;
}

/* Differences found while the native side is busy wait here. */
static struct pending {
    struct cpu_case c;
    uint8_t data[DATA_SIZE];
    struct cpu_result host_result;
    char text[DIFFERENCE_TEXT];
} pending[BATCH];
static unsigned pendings;

static void suspect(const struct batch *b, const struct cpu_case *c, const struct cpu_result *host_result, const char *text)
{
    struct pending *p = &pending[pendings++];

    p->c = *c;
    memcpy(p->data, b->data, DATA_SIZE);
    p->host_result = *host_result;
    snprintf(p->text, sizeof(p->text), "%s", text);
}

/*
 * A task switch of the host in the middle of a case loses x87 error pointers, and resets what the processor knows about unused
 * components: then the host does not do the same twice.
 */
static bool host_repeats(const struct pending *p)
{
    static struct cpu_result again;

    for (unsigned i = 0; i < 3; i++) {
        host_start(host, &p->c, 1);
        host_finish(host, &again);
        if (!compare_results(&p->c, &p->host_result, &again, NULL, 0))
            return false;
    }
    return true;
}

static void judge(const struct options *o, struct pending *p)
{
    static char again[DIFFERENCE_TEXT];

    host_set_data(host, p->data);
    guest_set_data(guest, p->data);
    if (!host_repeats(p)) {
        unstable++;
        return;
    }
    if (differences++ >= o->shown)
        return;
    printf("difference: --seed %" PRIu64 " --case %" PRIu64 "\n", o->generate.seed, p->c.number);
    if (o->minimize) {
        if (run_alone(&p->c, again, sizeof(again))) {
            printf("  equal when it runs alone, so what ran before matters\n");
        } else {
            minimize(&p->c, p->text, sizeof(p->text));
            drop_nops(&p->c);
        }
    }
    if (p->c.insns)
        differing[p->c.insn[p->c.insns - 1].mnemonic]++;
    print_case(&p->c);
    fputs(p->text, stdout);
    fflush(stdout);
}

static void judge_pending(const struct options *o)
{
    for (unsigned i = 0; i < pendings; i++)
        judge(o, &pending[i]);
    pendings = 0;
}

/* ---- batches ---- */

static void make_batch(const struct options *o, struct batch *b, uint64_t first, uint64_t last)
{
    uint64_t end = (first / BATCH + 1) * BATCH;

    if (end > last)
        end = last;
    b->count = (unsigned)(end - first);
    generate_data(b->data, &o->generate, first);
    for (unsigned i = 0; i < b->count; i++) {
        generate_case(&b->c[i], &o->generate, first + i);
        for (unsigned k = 0; k < b->c[i].insns; k++)
            generated[b->c[i].insn[k].mnemonic]++;
    }
}

static void compare_batch(const struct options *o, const struct batch *b, const struct cpu_result *results)
{
    static char text[DIFFERENCE_TEXT];

    guest_set_data(guest, b->data);
    for (unsigned i = 0; i < b->count; i++) {
        if (results[i].end != END_FAULT) {
            if (results[i].end == END_CRASH)
                printf("native side crashed: --seed %" PRIu64 " --case %" PRIu64 "\n", o->generate.seed, b->c[i].number);
            skipped++;
            continue;
        }
        guest_run(guest, &b->c[i], &guest_result);
        compared++;
        if (results[i].vector < 32)
            by_vector[results[i].vector]++;
        if (compare_results(&b->c[i], &results[i], &guest_result, text, sizeof(text)))
            continue;
        if (known_difference(&b->c[i], &results[i], &guest_result))
            excused++;
        else
            suspect(b, &b->c[i], &results[i], text);
    }
}

static void run(const struct options *o)
{
    static struct cpu_result results[BATCH];
    uint64_t next = o->first, last = o->first + o->count;
    double start = now(), shown = start;
    unsigned turn = 0;

    make_batch(o, &batches[0], next, last);
    next += batches[0].count;
    host_set_data(host, batches[0].data);
    host_start(host, batches[0].c, batches[0].count);
    for (bool more = true; more; turn ^= 1) {
        struct batch *b = &batches[turn], *following = &batches[turn ^ 1];

        more = next < last && (o->seconds <= 0 || now() - start < o->seconds);
        if (more) {
            make_batch(o, following, next, last);
            next += following->count;
        }
        host_finish(host, results);
        judge_pending(o);
        if (more) {
            host_set_data(host, following->data);
            host_start(host, following->c, following->count);
        }
        compare_batch(o, b, results);
        if (o->progress && now() - shown > 2) {
            shown = now();
            fprintf(stderr, "%" PRIu64 " cases, %" PRIu64 " differences, %.0f/s\n", compared, differences,
                    (double)compared / (shown - start));
        }
    }
    judge_pending(o);
}

/* ---- the program ---- */

static uint64_t insns_generated(void)
{
    uint64_t n = 0;

    for (unsigned i = 1; i <= ZYDIS_MNEMONIC_MAX_VALUE; i++)
        n += generated[i];
    return n;
}

static void print_figures(const struct options *o, double seconds)
{
    unsigned mnemonics = 0, ends = 0;

    for (unsigned i = 1; i <= ZYDIS_MNEMONIC_MAX_VALUE; i++) {
        mnemonics += generated[i] != 0;
        if (differing[i])
            printf("  %6u %s\n", differing[i], ZydisMnemonicGetString((ZydisMnemonic)i));
    }
    printf("ended by");
    for (unsigned i = 0; i < 32; i++)
        if (by_vector[i]) {
            printf("%s #%u %" PRIu64, ends++ ? "," : "", i, by_vector[i]);
        }
    printf("\n%sengine %s, model %s, seed %" PRIu64 ", first case %" PRIu64 ": %" PRIu64 " cases compared, %" PRIu64
           " skipped, %" PRIu64 " instructions of %u mnemonics, %.1f s, %" PRIu64
           " known, %" PRIu64
           " unstable and %" PRIu64 " differences\n",
           o->generate.kernel ? "kernel mode, " : o->generate.code16 ? "16-bit code, " : "", o->engine, o->model, o->generate.seed, o->first, compared, skipped, insns_generated(), mnemonics, seconds, excused, unstable, differences);
}

static void print_mnemonics(void)
{
    for (unsigned i = 1; i <= ZYDIS_MNEMONIC_MAX_VALUE; i++)
        if (generated[i])
            printf("%8u %s\n", generated[i], ZydisMnemonicGetString((ZydisMnemonic)i));
}

static const char help[] =
    "Usage: difftest [--engine NAME] [--model NAME] [--seed N|random] [--first N] [--count N] [--case N] [--seconds S]\n"
    "                [--percent32 P] [--percent-ac P] [--max-insns N] [--only MNEMONIC,...] [--show N] [--no-minimize] [--progress]\n"
    "                [--mnemonics] [--keep-vcpu] [--no-liveness] [--lockstep] [--code16] [--kernel] [--interrupts]\n"
    "                [--direct]\n"
    "                [--shape groups|stack|loops|vectors|mixed|self|walks]\n";

/* Mnemonics, comma-separated, in any case. */
static const bool *parse_mnemonics(const char *list)
{
    static bool wanted[ZYDIS_MNEMONIC_MAX_VALUE + 1];

    for (const char *at = list; ; at++) {
        size_t length = strcspn(at, ",");
        unsigned m = 1;

        while (m <= ZYDIS_MNEMONIC_MAX_VALUE && (strlen(ZydisMnemonicGetString((ZydisMnemonic)m)) != length ||
                                                 strncasecmp(ZydisMnemonicGetString((ZydisMnemonic)m), at, length) != 0))
            m++;
        if (m > ZYDIS_MNEMONIC_MAX_VALUE) {
            fprintf(stderr, "difftest: '%.*s' is no instruction; names are Zydis', comma-separated, such as div,idiv,xrstor64\n", (int)length,
                    at);
            exit(2);
        }
        wanted[m] = true;
        at += length;
        if (!*at)
            return wanted;
    }
}

static uint64_t parse_number(const char *text)
{
    char *end;
    uint64_t v = strtoull(text, &end, 0);

    if (!*text || *end) {
        fprintf(stderr, "difftest: '%s' is no number\n%s", text, help);
        exit(2);
    }
    return v;
}

int main(int argc, char **argv)
{
    enum { ENGINE = 1, MODEL, SEED, FIRST, COUNT, CASE, SECONDS, PERCENT32, PERCENT_AC, MAX, ONLY, SHOW, NO_MINIMIZE, PROGRESS, MNEMONICS, KEEP, NO_LIVENESS, LOCKSTEP, SHAPE, KERNEL, INTERRUPTS, CODE16, DIRECT };
    static const struct option names[] = {
        { "engine", 1, 0, ENGINE }, { "model", 1, 0, MODEL }, { "seed", 1, 0, SEED }, { "first", 1, 0, FIRST },
        { "count", 1, 0, COUNT }, { "case", 1, 0, CASE }, { "seconds", 1, 0, SECONDS }, { "percent32", 1, 0, PERCENT32 }, { "percent-ac", 1, 0, PERCENT_AC },
        { "max-insns", 1, 0, MAX }, { "only", 1, 0, ONLY }, { "show", 1, 0, SHOW }, { "no-minimize", 0, 0, NO_MINIMIZE },
        { "progress", 0, 0, PROGRESS }, { "mnemonics", 0, 0, MNEMONICS }, { "keep-vcpu", 0, 0, KEEP },
        { "no-liveness", 0, 0, NO_LIVENESS }, { "lockstep", 0, 0, LOCKSTEP }, { "shape", 1, 0, SHAPE }, { "kernel", 0, 0, KERNEL },
        { "interrupts", 0, 0, INTERRUPTS }, { "code16", 0, 0, CODE16 }, { "direct", 0, 0, DIRECT },
        { 0 },
    };
    struct options o = { .engine = "interp", .model = "host", .count = 20000, .shown = 20, .minimize = true };
    bool skip, mnemonics = false, interrupts = false, direct = false, none = false;
    double start;

    o.generate = (struct generate_options){ .seed = 1, .percent32 = 15, .percent_ac = 2 };
    for (int c; (c = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (c) {
        case ENGINE: o.engine = optarg; break;
        case MODEL: o.model = optarg; break;
        case SEED: o.generate.seed = strcmp(optarg, "random") ? parse_number(optarg) : (uint64_t)time(NULL); break;
        case FIRST: o.first = parse_number(optarg); break;
        case COUNT: o.count = parse_number(optarg); break;
        case CASE: o.first = parse_number(optarg), o.count = 1, o.one = true; break;
        case SECONDS: o.seconds = (double)parse_number(optarg); break;
        case PERCENT32: o.generate.percent32 = (unsigned)parse_number(optarg); break;
        case PERCENT_AC: o.generate.percent_ac = (unsigned)parse_number(optarg); break;
        case MAX: o.generate.max_insns = (unsigned)parse_number(optarg); break;
        case ONLY: o.generate.only = parse_mnemonics(optarg); break;
        case SHOW: o.shown = (unsigned)parse_number(optarg); break;
        case NO_MINIMIZE: o.minimize = false; break;
        case PROGRESS: o.progress = true; break;
        case MNEMONICS: mnemonics = true; break;
        case KEEP: guest_keep_vcpu(true); break;
        case NO_LIVENESS: translate_options.liveness = false; break;
        case SHAPE:
            while (shape_names[o.generate.shape] && strcmp(shape_names[o.generate.shape], optarg) != 0)
                o.generate.shape++;
            if (!shape_names[o.generate.shape++]) {
                fputs(help, stderr);
                return 2;
            }
            break;
        case KERNEL: o.generate.kernel = compare_kernel = true; break;
        case CODE16: o.generate.code16 = true; break;
        case DIRECT: direct = compare_direct = true; break;
        case INTERRUPTS: interrupts = true; break;
        case LOCKSTEP: translate_options.lockstep = true; break;
        default: fputs(help, stderr); return 2;
        }
    }
    if (optind < argc || o.count == 0 || (o.generate.code16 && (o.generate.kernel || o.generate.shape)) ||
        (direct && (o.generate.kernel || o.generate.code16 || strcmp(o.engine, "translate") != 0))) {
        fputs(help, stderr);
        return 2;
    }
    if (direct) {
        if (!sandbox_abilities()->usable) {
            fprintf(stderr, "skipped: %s\n", sandbox_abilities()->text);
            return SKIPPED;
        }
        /* Such code is all that is for it, and what it does not run is to be right, too. */
        translate_options.direct = TRANSLATE_DIRECT_ALWAYS;
        translate_options.liveness = false;
        o.generate.percent32 = 0;
    }
    /* Which flags are dead cannot be known of code that changes behind the instruction that changes it. */
    if (o.generate.shape == SHAPE_WRITES_CODE)
        translate_options.liveness = false;
    compare_flags_at_faults = strcmp(o.engine, "translate") != 0 || !translate_options.liveness;
    host = host_create(&skip, o.generate.shape == SHAPE_WRITES_CODE, o.generate.code16, direct);
    if (!host)
        return skip ? SKIPPED : 2;
    if (o.generate.kernel)      /* there is no 32-bit kernel code here, and alignment is checked for programs alone */
        o.generate.percent32 = o.generate.percent_ac = 0;
    guest = guest_create(o.engine, o.model, direct, o.generate.kernel, o.generate.shape == SHAPE_WRITES_CODE);
    o.generate.model = guest_model(guest);
    if (guest_emulated(guest)) {
        fprintf(stderr, "skipped: this host's KVM emulates the guest, incompletely\n");
        return SKIPPED;
    }
    if (interrupts)
        guest_interrupt(guest);
    start = now();
    run(&o);
    if (mnemonics)
        print_mnemonics();
    if (o.generate.only && !insns_generated()) {
        fprintf(stderr, "difftest: none of these instructions is one that model %s has and that programs see the same of everywhere\n", o.model);
        return 2;
    }
    if (o.one && !differences) {
        print_case(&batches[0].c[0]);
        printf("equal\n");
    }
    print_figures(&o, now() - start);
    if (interrupts) {
        printf("%" PRIu64 " NMIs were taken\n", guest_interrupts(guest));
        none = guest_interrupts(guest) == 0;
    }
    if (direct) {
        printf("%" PRIu64 " times code ran directly\n", guest_direct_runs(guest));
        none = none || guest_direct_runs(guest) < compared / 2;
    }
    guest_destroy(guest);
    host_destroy(host);
    if (none)
        return 2;
    return differences ? 1 : 0;
}
