/* Snapshots of a whole machine with a guest of a few bytes: what is saved is one moment, and other machines go on from it. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "block_requests.h"
#include "memory/missing.h"
#include "tiny_kernel.h"
#include "vm/config.h"
#include "vm/snapshot.h"
#include "vm/vm_internal.h"

#define FIRST 0x200000u         /* the guest's counters: first of all pages, in order */
#define PAGES 2048u

/*
 * 32-bit: EBX: the round. Each round adds one to the first word of every page from FIRST on, in order; so at any moment the
 * words are N+1 … N+1 N … N.
 *   again: mov edi, FIRST; mov ecx, PAGES; next: inc dword [edi]; add edi, 4096; loop next; jmp again
 */
static const uint8_t sweeping[] = {0xbf, 0x00, 0x00, 0x20, 0x00, 0xb9, 0x00, 0x08, 0x00, 0x00, 0xff, 0x07, 0x81,
                                   0xc7, 0x00, 0x10, 0x00, 0x00, 0xe2, 0xf6, 0xeb, 0xea};

/* Pages that the guest does not know of, whose contents are told by fill_distinct(). */
#define DISTINCT_FIRST MIB(16)
#define DISTINCT_PAGES 3000u

static char data_folder[] = "/var/tmp/ringfort-snapshots-XXXXXX";

struct running {
    char kernel[64], disk[64];
    struct vm_config config;
    struct vm *vm;
    pthread_t thread;
    int status;
};

static void *run(void *opaque)
{
    struct running *r = opaque;
    r->status = vm_run(r->vm);
    return NULL;
}

static uint32_t word(struct running *r, unsigned page)
{
    uint32_t value = 0;
    assert_int_equal(memory_read(&r->vm->machine.memory, FIRST + page * GUEST_PAGE_SIZE, &value, sizeof(value)), 0);
    return value;
}

static void await_progress(struct running *r)
{
    uint32_t before = word(r, 0);
    struct timespec t = {.tv_nsec = 1000000};

    for (unsigned i = 0; i < 20000 && word(r, 0) == before; i++)
        nanosleep(&t, NULL);
    assert_int_not_equal(word(r, 0), before);
}

/* disk_path: of its disk in place of the image that is made in any case; NULL: that. */
static void start_with(struct running *r, const char *engine, const char *disk_path)
{
    char disk[256];
    int status, fd;

    snprintf(r->kernel, sizeof(r->kernel), "%s/kernel-XXXXXX", data_folder);
    tiny_kernel_write(r->kernel, sweeping, sizeof(sweeping));
    snprintf(r->disk, sizeof(r->disk), "%s/disk-XXXXXX", data_folder);
    fd = mkstemp(r->disk);
    assert_int_equal(ftruncate(fd, MIB(16)), 0);
    assert_int_equal(pwrite(fd, "at the start", 12, MIB(3)), 12);
    close(fd);
    snprintf(disk, sizeof(disk), "path=%s", disk_path ? disk_path : r->disk);
    assert_int_equal(vm_config_init(&r->config), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "name", "sweeper"), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "kernel", r->kernel), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "memory", "32M"), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "console", "none"), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "engine", engine), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "disk", disk), 0);
    assert_int_equal(vm_config_finish(&r->config), 0);
    r->vm = vm_create(&r->config, &status);
    assert_non_null(r->vm);
    assert_int_equal(pthread_create(&r->thread, NULL, run, r), 0);
    await_progress(r);
    await_progress(r);
}

static void start(struct running *r, const char *engine) { start_with(r, engine, NULL); }

static void finish(struct running *r)
{
    vm_end(r->vm, VM_STATUS_USER);
    pthread_join(r->thread, NULL);
    vm_destroy(r->vm);
    vm_config_destroy(&r->config);
}

/* The machine stands: its words are those of one moment. */
static void assert_one_moment(struct running *r)
{
    uint32_t first = word(r, 0), n = first;

    for (unsigned i = 1; i < PAGES; i++) {
        uint32_t w = word(r, i);

        assert_true(w == n || (n == first && w + 1 == n));
        n = w;
    }
}

static void restore(struct running *r, const char *snapshot, const char *name)
{
    struct vm_snapshot *s;
    int status;

    assert_int_equal(vm_snapshot_open(snapshot, &s), 0);
    assert_int_equal(vm_config_init(&r->config), 0);
    assert_int_equal(vm_snapshot_config(s, &r->config), 0);
    assert_int_equal(vm_config_set_flag(&r->config, "name", name), 0);
    assert_int_equal(vm_config_finish(&r->config), 0);
    r->vm = vm_snapshot_restore(s, &r->config, VM_HOLD_USER, &status);
    vm_snapshot_close(s);
    assert_non_null(r->vm);
}

static void go_on(struct running *r)
{
    assert_int_equal(pthread_create(&r->thread, NULL, run, r), 0);
    assert_int_equal(vm_resume(r->vm, VM_HOLD_USER), 0);
}

/* While the guest writes all over its memory, with both engines; and a snapshot of a restored machine. */
static void saved_while_running(const char *engine)
{
    struct vm_snapshot_result result;
    struct running r, a, b, c;
    struct memory_protect *protect;
    bool copies, can_protect;

    start(&r, engine);
    await_progress(&r);
    /* Each page once, however fast the guest writes, where its writes can be stopped. */
    protect = memory_protect_create(&r.vm->machine.memory);
    can_protect = protect;
    copies = engine_find(engine)->checks_pages || can_protect;
    memory_protect_destroy(protect);
    await_progress(&r);
    assert_int_equal(vm_snapshot_save(r.vm, "first", false, &result), 0);
    assert_true(result.pause_ns > 0 && result.total_ns >= result.pause_ns);
    assert_true(result.memory_bytes >= PAGES * GUEST_PAGE_SIZE);
    assert_true(!copies || result.memory_bytes < MIB(12));
    await_progress(&r);
    assert_int_equal(vm_snapshot_save(r.vm, "first", false, &result), -EEXIST);
    uint32_t later = word(&r, 0);

    restore(&a, "first", "a");
    restore(&b, "first", "b");
    assert_one_moment(&a);
    assert_true(word(&a, 0) && word(&a, 0) < later);
    assert_int_equal(word(&a, 7), word(&b, 7));
    go_on(&a);
    await_progress(&a);
    assert_one_moment(&b);
    assert_int_equal(vm_snapshot_save(a.vm, "second", true, &result), 0);
    finish(&a);
    restore(&c, "second", "c");
    assert_one_moment(&c);
    assert_true(word(&c, 0) > word(&b, 0));
    go_on(&c);
    /* Compressed memory is the machine's own once it is there, so its writes can be stopped as before. */
    assert_int_equal(vm_await_memory(c.vm, NULL), 0);
    protect = memory_protect_create(&c.vm->machine.memory);
    assert_int_equal(protect != NULL, can_protect);
    memory_protect_destroy(protect);
    go_on(&b);
    await_progress(&c);
    await_progress(&b);

    struct vm_snapshot_info *list;
    unsigned count;
    assert_int_equal(vm_snapshot_list(&list, &count), 0);
    assert_int_equal(count, 2);
    assert_string_equal(list[0].name, "first");
    assert_string_equal(list[0].machine, "sweeper");
    assert_string_equal(list[0].engine, engine);
    assert_string_equal(list[1].machine, "a");
    assert_int_equal(list[1].memory, MIB(32));
    assert_int_equal(list[0].disks, 1);
    free(list);

    /* What goes on from it does not need it any more. */
    assert_int_equal(vm_snapshot_remove("first"), 0);
    assert_int_equal(vm_snapshot_remove("first"), -ENOENT);
    await_progress(&b);
    await_progress(&c);
    finish(&b);
    finish(&c);
    restore(&c, "second", "c");
    assert_one_moment(&c);
    vm_destroy(c.vm);
    vm_config_destroy(&c.config);
    assert_int_equal(vm_snapshot_remove("second"), 0);
    finish(&r);
}

static void test_interp(void **state) { saved_while_running("interp"); }
static void test_translate(void **state) { saved_while_running("translate"); }

/* Its vCPUs do not look at page flags: the kernel stops their writes, or RAM is saved after its dirty log. */
static void test_kvm(void **state)
{
    struct engine_report report;
    const struct engine *kvm = engine_find("kvm");

    kvm->probe(&report);
    if (!report.usable)
        skip();
    saved_while_running("kvm");
}

/* The engine may change while pages are saved. */
static void *change_engines(void *opaque)
{
    struct running *r = opaque;

    for (unsigned i = 0; i < 20; i++)
        if (vm_set_engine(r->vm, engine_find(i & 1 ? "interp" : "translate"), NULL))
            return r;
    return NULL;
}

static void test_engine_changes_meanwhile(void **state)
{
    struct vm_snapshot_result result;
    struct running r, a;
    pthread_t t;
    void *bad;

    start(&r, "interp");
    await_progress(&r);
    assert_int_equal(pthread_create(&t, NULL, change_engines, &r), 0);
    assert_int_equal(vm_snapshot_save(r.vm, "changing", false, &result), 0);
    pthread_join(t, &bad);
    assert_null(bad);
    restore(&a, "changing", "a");
    assert_one_moment(&a);
    go_on(&a);
    await_progress(&a);
    finish(&a);
    finish(&r);
    assert_int_equal(vm_snapshot_remove("changing"), 0);
}

/* A reset in the middle of a save takes nothing from what is saved. */
static void test_reset_meanwhile(void **state)
{
    struct vm_snapshot_result result;
    struct running r, a;

    start(&r, "translate");
    for (unsigned i = 0; i < 3; i++)
        await_progress(&r);
    assert_int_equal(vm_pause(r.vm, VM_HOLD_USER), 0);
    uint32_t saved = word(&r, 5);
    machine_raise(&r.vm->machine, MACHINE_RESET, 0);
    assert_int_equal(vm_snapshot_save(r.vm, "reset", false, &result), 0);
    restore(&a, "reset", "a");
    assert_one_moment(&a);
    assert_true(word(&a, 5) == saved || word(&a, 5) == 0);
    go_on(&a);
    await_progress(&a);
    finish(&a);
    finish(&r);
    assert_int_equal(vm_snapshot_remove("reset"), 0);
}

/* ---- compressed memory ---- */

/* Words of a page, which do not compress; every tenth page is a copy of another one far away, and some are zero. */
static void distinct_page(unsigned page, uint64_t words[GUEST_PAGE_SIZE / 8])
{
    uint64_t x = (page % 10 ? page : page * 7u % 1000u) + 1ull;

    memset(words, 0, GUEST_PAGE_SIZE);
    for (unsigned i = 0; page % 17 && i < GUEST_PAGE_SIZE / 8; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        words[i] = x;
    }
}

static void fill_distinct(struct running *r)
{
    uint64_t words[GUEST_PAGE_SIZE / 8];

    for (unsigned i = 0; i < DISTINCT_PAGES; i++) {
        distinct_page(i, words);
        assert_int_equal(memory_write(&r->vm->machine.memory, DISTINCT_FIRST + i * GUEST_PAGE_SIZE, words, sizeof(words)), 0);
    }
}

static void assert_distinct(struct running *r, unsigned page)
{
    uint64_t wanted[GUEST_PAGE_SIZE / 8], words[GUEST_PAGE_SIZE / 8];

    distinct_page(page, wanted);
    assert_int_equal(memory_read(&r->vm->machine.memory, DISTINCT_FIRST + page * GUEST_PAGE_SIZE, words, sizeof(words)), 0);
    assert_memory_equal(words, wanted, sizeof(words));
}

/*
 * A machine runs from a compressed snapshot before it is unpacked. Pages are right whoever brings them, and what it writes meanwhile
 * is not overwritten; it can be saved again, change its engine and be reset.
 */
static void test_packed(void **state)
{
    struct vm_snapshot_result result;
    struct running r, a, b;
    uint64_t word_of;

    start(&r, "translate");
    fill_distinct(&r);
    assert_int_equal(vm_snapshot_save(r.vm, "packed", true, &result), 0);
    finish(&r);

    restore(&a, "packed", "a");
    restore(&b, "packed", "b");
    for (unsigned i = 0; i < 400; i++)
        assert_int_equal(memory_write(&a.vm->machine.memory, DISTINCT_FIRST + i * 7 * GUEST_PAGE_SIZE, &i, sizeof(i)), 0);
    for (unsigned i = 0; i < DISTINCT_PAGES; i++)
        assert_distinct(&b, (unsigned)(i * 1103u % DISTINCT_PAGES));
    assert_one_moment(&b);
    go_on(&b);
    assert_int_equal(vm_set_engine(b.vm, engine_find("interp"), NULL), 0);
    await_progress(&b);
    assert_int_equal(vm_await_memory(a.vm, NULL), 0);
    assert_int_equal(vm_await_memory(b.vm, NULL), 0);
    assert_one_moment(&a);
    for (unsigned i = 0; i < DISTINCT_PAGES; i++) {
        assert_distinct(&b, i);
        if (i % 7 || i / 7 >= 400)
            assert_distinct(&a, i);
    }
    for (unsigned i = 0; i < 400; i++) {
        assert_int_equal(memory_read(&a.vm->machine.memory, DISTINCT_FIRST + i * 7 * GUEST_PAGE_SIZE, &word_of, sizeof(word_of)), 0);
        assert_int_equal((uint32_t)word_of, i);
    }
    finish(&b);
    vm_destroy(a.vm);
    vm_config_destroy(&a.config);

    /* At once, while pages are missing: a snapshot of it, a reset, its end. */
    restore(&a, "packed", "a");
    assert_int_equal(vm_snapshot_save(a.vm, "again", false, &result), 0);
    vm_destroy(a.vm);
    vm_config_destroy(&a.config);
    restore(&a, "again", "a");
    for (unsigned i = 0; i < DISTINCT_PAGES; i++)
        assert_distinct(&a, i);
    vm_destroy(a.vm);
    vm_config_destroy(&a.config);
    assert_int_equal(vm_snapshot_remove("again"), 0);
    restore(&a, "packed", "a");
    machine_raise(&a.vm->machine, MACHINE_RESET, 0);
    go_on(&a);
    await_progress(&a);
    assert_int_equal(vm_await_memory(a.vm, NULL), 0);
    assert_int_equal(memory_read(&a.vm->machine.memory, DISTINCT_FIRST + (DISTINCT_PAGES - 1) * GUEST_PAGE_SIZE, &word_of, sizeof(word_of)), 0);
    assert_int_equal(word_of, 0);
    finish(&a);
    restore(&a, "packed", "a");
    vm_destroy(a.vm);
    vm_config_destroy(&a.config);
    assert_int_equal(vm_snapshot_remove("packed"), 0);
}

/* As in a container that does not allow userfaultfd: in a child, which says by its exit status how it went. */
static void child_without_userfaultfd(void)
{
    struct sock_filter no_userfaultfd[] = {BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
                                           BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1),
                                           BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
                                           BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    struct sock_fprog filter = {ARRAY_SIZE(no_userfaultfd), no_userfaultfd};
    uint64_t wanted[GUEST_PAGE_SIZE / 8], words[GUEST_PAGE_SIZE / 8];
    struct running r;

    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter))
        _exit(10);
    restore(&r, "packed", "child");
    if (r.vm->fill)
        _exit(11);
    for (unsigned i = 0; i < DISTINCT_PAGES; i++) {
        distinct_page(i, wanted);
        if (memory_read(&r.vm->machine.memory, DISTINCT_FIRST + i * GUEST_PAGE_SIZE, words, sizeof(words)) ||
            memcmp(words, wanted, sizeof(words)) != 0)
            _exit(12);
    }
    vm_destroy(r.vm);
    _exit(0);
}

/* Where pages cannot come later, all of them are there at once. */
static void test_packed_at_once(void **state)
{
    struct vm_snapshot_result result;
    struct running r;
    int status = -1;
    pid_t child;

    start(&r, "translate");
    fill_distinct(&r);
    assert_int_equal(vm_snapshot_save(r.vm, "packed", true, &result), 0);
    finish(&r);
    child = fork();
    if (!child)
        child_without_userfaultfd();
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_int_equal(vm_snapshot_remove("packed"), 0);
}

static void spoil(const char *file, off_t at, const void *bytes, size_t len, off_t length)
{
    char path[160];
    int fd;

    snprintf(path, sizeof(path), "%s/ringfort/snapshots/bad/%s", data_folder, file);
    fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    if (bytes)
        assert_int_equal(pwrite(fd, bytes, len, at), len);
    if (length >= 0)
        assert_int_equal(ftruncate(fd, length), 0);
    close(fd);
}

/* Restores it. 0, -EINVAL: refused, -EIO: the machine ended when all of its memory should have come. */
static int try_open(void)
{
    struct vm_snapshot *s;
    struct vm_config c;
    struct vm *vm = NULL;
    int err = vm_snapshot_open("bad", &s), status;

    if (err)
        return err;
    assert_int_equal(vm_config_init(&c), 0);
    assert_int_equal(vm_snapshot_config(s, &c), 0);
    assert_int_equal(vm_config_finish(&c), 0);
    vm = vm_snapshot_restore(s, &c, VM_HOLD_USER, &status);
    vm_snapshot_close(s);
    err = vm ? 0 : -EINVAL;
    if (vm && vm_await_memory(vm, NULL)) {
        assert_true(vm_ended(vm, &status, NULL));
        assert_int_equal(status, VM_STATUS_BACKEND);
        err = -EIO;
    }
    vm_destroy(vm);
    vm_config_destroy(&c);
    return err;
}

static void test_damaged(void **state)
{
    struct vm_snapshot_result result;
    struct running r;

    start(&r, "interp");
    assert_int_equal(vm_snapshot_save(r.vm, "bad", false, &result), 0);
    assert_int_equal(vm_snapshot_save(r.vm, "../bad", false, &result), -EINVAL);
    assert_int_equal(vm_snapshot_save(r.vm, ".bad", false, &result), -EINVAL);
    finish(&r);
    log_set_level(-1);
    assert_int_equal(try_open(), 0);
    spoil("memory", 0, NULL, 0, MIB(32) - 4096);
    assert_int_equal(try_open(), -EINVAL);
    spoil("memory", 0, NULL, 0, MIB(32));
    assert_int_equal(try_open(), 0);
    spoil("state", 300, "?", 1, -1);
    assert_int_equal(try_open(), -EINVAL);
    spoil("state", 16, "\x02", 1, -1);
    assert_int_equal(try_open(), -EINVAL);
    spoil("state", 0, "something else..", 16, -1);
    assert_int_equal(try_open(), -EINVAL);
    spoil("state", 0, NULL, 0, 10);
    assert_int_equal(try_open(), -EINVAL);
    spoil("snapshot.json", 0, "{", 1, 1);
    assert_int_equal(try_open(), -EINVAL);
    log_set_level(LOG_WARN);
    assert_int_equal(vm_snapshot_remove("bad"), 0);
}

/* Somebody reads this page of a restored machine: gives the exit status of the process that it did so in; 0: it came back. */
static int touch_in_child(unsigned page)
{
    pid_t child = fork();
    int status = 0;

    if (!child) {
        struct running r;
        uint64_t word_of;

        restore(&r, "bad", "toucher");
        memory_read(&r.vm->machine.memory, DISTINCT_FIRST + page * GUEST_PAGE_SIZE, &word_of, sizeof(word_of));
        _exit(0);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

/* Compressed memory is checked as it is unpacked, and nobody gets to see what is not right. */
static void test_damaged_packed(void **state)
{
    struct vm_snapshot_result result;
    struct running r;
    uint64_t index, length;
    char path[160];
    struct stat st;
    uint8_t was, other;
    bool kernel;
    int fd;

    start(&r, "translate");
    fill_distinct(&r);
    assert_int_equal(vm_snapshot_save(r.vm, "bad", true, &result), 0);
    finish(&r);
    snprintf(path, sizeof(path), "%s/ringfort/snapshots/bad/memory.zst", data_folder);
    assert_int_equal(stat(path, &st), 0);
    assert_true(st.st_size < (off_t)MIB(12) && st.st_size > (off_t)MIB(10));
    fd = open(path, O_RDWR);
    assert_int_equal(pread(fd, &length, sizeof(length), st.st_size - 24), sizeof(length));
    index = (uint64_t)st.st_size - length;
    log_set_level(-1);
    assert_int_equal(try_open(), 0);
    /* Anything: damage in what says where everything is has it refused, in pages it is found before all of them are there. */
    for (off_t at = st.st_size - 1; at >= 0; at -= at > (off_t)index ? (off_t)length / 11 : st.st_size / 23) {
        assert_int_equal(pread(fd, &was, 1, at), 1);
        other = was ^ 0x10;
        assert_int_equal(pwrite(fd, &other, 1, at), 1);
        int err = try_open();
        if (err != -EINVAL && (err != -EIO || at >= (off_t)index))
            fail_msg("bit 4 of byte %lld of %lld is damaged, and it was restored", (long long)at, (long long)st.st_size);
        assert_int_equal(pwrite(fd, &was, 1, at), 1);
    }
    assert_int_equal(try_open(), 0);
    /* The last chunk's; in it is the last of the pages. */
    assert_int_equal(touch_in_child(DISTINCT_PAGES - 1), 0);
    assert_int_equal(pread(fd, &was, 1, (off_t)index - 20), 1);
    other = was ^ 1;
    assert_int_equal(pwrite(fd, &other, 1, (off_t)index - 20), 1);
    if (memory_missing_usable(&kernel) == 0)
        assert_int_equal(touch_in_child(DISTINCT_PAGES - 1), VM_STATUS_BACKEND);
    assert_int_equal(pwrite(fd, &was, 1, (off_t)index - 20), 1);
    close(fd);
    /* As it was packed once. */
    snprintf(path, sizeof(path), "%s/ringfort/snapshots/bad/snapshot.json", data_folder);
    fd = open(path, O_RDWR);
    char text[1024] = "", *version;
    assert_true(read(fd, text, sizeof(text) - 1) > 0);
    close(fd);
    version = strstr(text, "\"version\": 2");
    assert_non_null(version);
    spoil("snapshot.json", version - text + 11, "1", 1, -1);
    assert_int_equal(try_open(), -EINVAL);
    spoil("snapshot.json", version - text + 11, "2", 1, -1);
    assert_int_equal(try_open(), 0);
    /* Something behind it, and without its last bytes, up to all that is not zstd's data. */
    spoil("memory.zst", st.st_size, "", 1, -1);
    assert_int_equal(try_open(), -EINVAL);
    spoil("memory.zst", 0, NULL, 0, st.st_size - 16);
    assert_int_equal(try_open(), -EINVAL);
    spoil("memory.zst", 0, NULL, 0, st.st_size - 1);
    assert_int_equal(try_open(), -EINVAL);
    spoil("memory.zst", 0, NULL, 0, 0);
    assert_int_equal(try_open(), -EINVAL);
    log_set_level(LOG_WARN);
    assert_int_equal(vm_snapshot_remove("bad"), 0);
}

/* Through the machine's disk. */
static int disk_io(struct running *r, enum block_op op, uint64_t offset, char *buf, size_t len)
{
    struct request q;
    struct block *b = r->vm->parts.disks[0].backend;

    pthread_mutex_lock(&r->vm->machine.lock);
    request_set(&q, op, offset, buf, len);
    block_submit(b, &q.r);
    block_drain(b);
    pthread_mutex_unlock(&r->vm->machine.lock);
    assert_true(q.done);
    return q.status;
}

/* A disk on a server is copied as one that is here; what is restored needs no server, and leaves it alone. */
static void test_disk_on_server(void **state)
{
    struct vm_snapshot_result result;
    struct running r, a;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    char socket_path[64], uri[160], buf[512] = "";
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    pid_t server;

    if (system("nbdkit --version >/dev/null 2>&1") != 0)
        skip();
    snprintf(socket_path, sizeof(socket_path), "%s/nbd.sock", data_folder);
    snprintf(uri, sizeof(uri), "nbd+unix:///?socket=%s,reconnect=20", socket_path);
    server = fork();
    if (!server) {
        execlp("nbdkit", "nbdkit", "-f", "--exit-with-parent", "-U", socket_path, "memory", "16M", NULL);
        _exit(127);
    }
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", socket_path);
    for (unsigned i = 0; connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0; i++) {
        assert_true(i < 10000);
        assert_int_equal(waitpid(server, NULL, WNOHANG), 0);
        usleep(2000);
    }
    close(fd);
    start_with(&r, "translate", uri);
    assert_int_equal(disk_io(&r, BLOCK_WRITE, MIB(7), strcpy(buf, "before"), sizeof(buf)), 0);
    assert_int_equal(vm_snapshot_save(r.vm, "nbd", false, &result), 0);
    assert_int_equal(result.disk_bytes, KIB(256));
    assert_int_equal(disk_io(&r, BLOCK_WRITE, MIB(7), strcpy(buf, "after"), sizeof(buf)), 0);
    restore(&a, "nbd", "a");
    assert_int_equal(disk_io(&a, BLOCK_READ, MIB(7), buf, sizeof(buf)), 0);
    assert_string_equal(buf, "before");
    assert_int_equal(disk_io(&a, BLOCK_WRITE, MIB(7), strcpy(buf, "elsewhere"), sizeof(buf)), 0);
    assert_int_equal(disk_io(&r, BLOCK_READ, MIB(7), buf, sizeof(buf)), 0);
    assert_string_equal(buf, "after");
    finish(&r);
    kill(server, SIGKILL);
    waitpid(server, NULL, 0);
    go_on(&a);
    await_progress(&a);
    assert_int_equal(vm_snapshot_save(a.vm, "again", false, &result), 0);
    assert_int_equal(vm_snapshot_remove("nbd"), 0);
    finish(&a);
    restore(&a, "again", "b");
    assert_int_equal(disk_io(&a, BLOCK_READ, MIB(7), buf, sizeof(buf)), 0);
    assert_string_equal(buf, "elsewhere");
    vm_destroy(a.vm);
    vm_config_destroy(&a.config);
    assert_int_equal(vm_snapshot_remove("again"), 0);
}

/* A folder that a killed save left is no snapshot, and goes away with the next one. */
static void test_killed_save(void **state)
{
    struct vm_snapshot_info *list;
    struct vm_snapshot_result result;
    struct running r;
    char path[160];
    struct stat st;
    unsigned count;

    start(&r, "interp");
    snprintf(path, sizeof(path), "%s/ringfort/snapshots/.new-x-1", data_folder);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_int_equal(vm_snapshot_list(&list, &count), 0);
    assert_int_equal(count, 0);
    assert_int_equal(vm_snapshot_save(r.vm, "x", false, &result), 0);
    assert_int_equal(stat(path, &st), -1);
    assert_int_equal(vm_snapshot_remove("x"), 0);
    finish(&r);
}

static int setup(void **state)
{
    if (!mkdtemp(data_folder))
        return -1;
    return setenv("XDG_DATA_HOME", data_folder, 1);
}

static int teardown(void **state)
{
    char command[128];
    snprintf(command, sizeof(command), "rm -rf %s", data_folder);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_interp),
        cmocka_unit_test(test_translate),
        cmocka_unit_test(test_kvm),
        cmocka_unit_test(test_engine_changes_meanwhile),
        cmocka_unit_test(test_reset_meanwhile),
        cmocka_unit_test(test_packed),
        cmocka_unit_test(test_packed_at_once),
        cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_damaged_packed),
        cmocka_unit_test(test_disk_on_server),
        cmocka_unit_test(test_killed_save),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
