/* The figures of a run as JSON. stats.h says what they mean and how memory is measured. */
#include "vm/stats.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/loop.h"
#include "base/resident.h"
#include "base/util.h"
#include "engine/engine.h"

#define SAMPLE_NS 100000000L

struct vm_stats {
    const char *file;
    bool direct; /* a pipe, terminal or device: written in place */
    json_t *root;
    int timer_fd;
    struct loop_fd *timer;
    uint64_t start_ns, start_cpu_ns;
    uint64_t native_ns; /* of processes that vCPUs have */
    uint64_t vcpu_ns, instructions, first_user_ns;
};

static uint64_t monotonic_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t process_cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void on_timer(void *opaque, int fd, short revents)
{
    uint64_t expirations;
    if (read(fd, &expirations, sizeof(expirations)) == sizeof(expirations))
        resident_note();
}

/* The figures are written under this name first, so that there are never half of them under the other. NULL: out of memory. */
static char *temporary_name(const struct vm_stats *s)
{
    char *name;

    return asprintf(&name, "%s.new-%d", s->file, (int)getpid()) < 0 ? NULL : name;
}

/* That the file can be written at the end: found out before the guest has run for a day. */
static int check_file(struct vm_stats *s)
{
    struct stat st;
    int r = 0;
    if (stat(s->file, &st) == 0 && !S_ISREG(st.st_mode)) {
        s->direct = true;
        if (S_ISDIR(st.st_mode))
            r = -EISDIR;
        else if (access(s->file, W_OK) < 0)
            r = -errno;
    } else {
        char *name = temporary_name(s);
        if (!name)
            return -ENOMEM;
        int fd = open(name, O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
        if (fd < 0)
            r = -errno;
        else
            unlink(name);
        if (fd >= 0)
            close(fd);
        free(name);
    }
    if (r < 0)
        log_error("--stats: cannot write %s: %s", s->file, strerror(-r));
    return r;
}

int vm_stats_create(struct loop *loop, const char *file, struct vm_stats **out)
{
    struct vm_stats *s = calloc(1, sizeof(*s));
    int r;
    if (!s)
        return -ENOMEM;
    s->timer_fd = -1;
    s->file = file;
    s->root = json_object();
    s->start_ns = monotonic_ns();
    s->start_cpu_ns = process_cpu_ns();
    r = s->root ? check_file(s) : -ENOMEM;
    if (r < 0)
        goto out;
    if (!resident_note())
        log_warn("--stats: no memory figures: cannot read /proc/self/status");
    if (loop) {
        const struct itimerspec every = {.it_interval.tv_nsec = SAMPLE_NS,
                                         .it_value.tv_nsec = SAMPLE_NS};
        s->timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
        if (s->timer_fd < 0 || timerfd_settime(s->timer_fd, 0, &every, NULL) < 0) {
            r = -errno;
            log_error("--stats: no timer: %s", strerror(errno));
            goto out;
        }
        s->timer = loop_fd_add(loop, s->timer_fd, POLLIN, on_timer, s);
        if (!s->timer) {
            r = -ENOMEM;
            goto out;
        }
    }
    *out = s;
    return 0;
out:
    vm_stats_destroy(s);
    return r;
}

void vm_stats_destroy(struct vm_stats *s)
{
    if (!s)
        return;
    loop_fd_remove(s->timer);
    if (s->timer_fd >= 0)
        close(s->timer_fd);
    json_decref(s->root);
    free(s);
}

void vm_stats_set_engine(struct vm_stats *s, const char *name)
{
    json_object_set_new(s->root, "engine", json_string(name));
}

void vm_stats_add(struct vm_stats *s, const char *path, uint64_t value)
{
    char copy[128];
    json_t *object = s->root;
    snprintf(copy, sizeof(copy), "%s", path);
    char *key = copy;
    for (char *slash; (slash = strchr(key, '/')); key = slash + 1) {
        *slash = 0;
        json_t *inner = json_object_get(object, key);
        if (!inner && json_object_set_new(object, key, inner = json_object()) < 0)
            return;
        object = inner;
    }
    json_int_t old = json_integer_value(json_object_get(object, key));
    json_object_set_new(object, key, json_integer(old + (json_int_t)value));
}

void vm_stats_add_vcpu(struct vm_stats *s, const struct engine_counters *c, uint64_t cpu_ns)
{
    const struct {
        const char *path;
        uint64_t value;
    } counter[] = {
        {"exits/mmio", c->mmio_exits},
        {"exits/port", c->port_exits},
        {"exits/halt", c->halts},
        {"exits/exception", c->exceptions},
        {"exits/interrupt", c->interrupts},
        {"engine_counters/tlb_misses", c->tlb_misses},
        {"engine_counters/tlb_flushes", c->tlb_flushes},
        {"engine_counters/page_walks", c->page_walks},
        {"engine_counters/blocks_decoded", c->blocks_decoded},
        {"engine_counters/block_flushes", c->block_flushes},
        {"engine_counters/code_writes", c->code_writes},
        {"engine_counters/units", c->units},
        {"engine_counters/units_apart", c->units_apart},
        {"engine_counters/units_looping", c->units_looping},
        {"engine_counters/unit_bytes", c->unit_bytes},
        {"engine_counters/guest_bytes", c->guest_bytes},
        {"engine_counters/chains", c->chains},
        {"engine_counters/entries", c->entries},
        {"engine_counters/checks_missed", c->checks_missed},
        {"engine_counters/groups_missed", c->groups_missed},
        {"engine_counters/interpreted_ops", c->interpreted_ops},
        {"engine_counters/jumps_missed", c->jumps_missed},
        {"engine_counters/returns_missed", c->returns_missed},
        {"engine_counters/return_overflows", c->return_overflows},
        {"engine_counters/native_runs", c->native_runs},
        {"engine_counters/native_ns", c->native_ns},
        {"engine_counters/native_cpu_ns", c->native_cpu_ns},
        {"engine_counters/native_faults", c->native_faults},
        {"engine_counters/native_pages", c->native_pages},
        {"engine_counters/native_steps", c->native_steps},
        {"engine_counters/native_demotions", c->native_demotions},
        {"engine_counters/native_sandboxes", c->native_sandboxes},
    };
    for (unsigned i = 0; i < ARRAY_SIZE(counter); i++)
        vm_stats_add(s, counter[i].path, counter[i].value);
    s->instructions += c->instructions;
    s->vcpu_ns += cpu_ns + c->native_cpu_ns;
    s->native_ns += c->native_cpu_ns;
    if (c->first_user_ns && (!s->first_user_ns || c->first_user_ns < s->first_user_ns))
        s->first_user_ns = c->first_user_ns;
}

static void set_seconds(struct vm_stats *s, const char *key, uint64_t ns)
{
    json_object_set_new(s->root, key, json_real((double)ns / 1e9));
}

static int write_all(int fd, const char *text, size_t len)
{
    while (len) {
        ssize_t n = write(fd, text, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        text += n;
        len -= (size_t)n;
    }
    return 0;
}

static int write_file(const struct vm_stats *s, const char *text)
{
    char *name = s->direct ? strdup(s->file) : temporary_name(s);
    int r;
    if (!name)
        return -ENOMEM;
    /* A pipe that nobody reads must not hold up the end. */
    int fd = open(name, s->direct ? O_WRONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY : O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    r = fd < 0 ? -errno : write_all(fd, text, strlen(text));
    if (fd >= 0 && close(fd) < 0 && r == 0)
        r = -errno;
    if (r == 0 && !s->direct && rename(name, s->file) < 0)
        r = -errno;
    if (r < 0 && fd >= 0 && !s->direct)
        unlink(name);
    free(name);
    return r;
}

int vm_stats_write(struct vm_stats *s)
{
    uint64_t wall = monotonic_ns() - s->start_ns, cpu = process_cpu_ns() - s->start_cpu_ns + s->native_ns;
    bool memory_known = resident_note();
    json_object_set_new(s->root, "guest_instructions", json_integer((json_int_t)s->instructions));
    set_seconds(s, "wall_seconds", wall);
    set_seconds(s, "cpu_seconds", cpu);
    set_seconds(s, "vcpu_cpu_seconds", s->vcpu_ns);
    json_object_set_new(
        s->root, "instructions_per_second",
        json_real(s->vcpu_ns ? (double)s->instructions / ((double)s->vcpu_ns / 1e9) : 0));
    json_object_set_new(s->root, "seconds_to_first_user_instruction",
                        s->first_user_ns ? json_real((double)s->first_user_ns / 1e9) : json_null());
    json_object_set_new(s->root, "peak_rss_beyond_ram_bytes",
                        memory_known ? json_integer((json_int_t)resident_peak()) : json_null());

    char *text = json_dumps(s->root, JSON_INDENT(4) | JSON_REAL_PRECISION(9)), *line = NULL;
    int r = text && asprintf(&line, "%s\n", text) >= 0 ? 0 : -ENOMEM;
    if (r == 0)
        r = write_file(s, line);
    if (r < 0)
        log_error("--stats: cannot write %s: %s", s->file, strerror(-r));
    if (text)
        free(line);
    free(text);
    return r;
}
