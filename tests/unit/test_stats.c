/* The figures of a run: what is written, where, and how memory beyond guest RAM is measured. */
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>
#include <jansson.h>

#include "base/log.h"
#include "base/resident.h"
#include "base/util.h"
#include "engine/engine.h"
#include "vm/stats.h"

static char dir[] = "/tmp/ringfort-stats-XXXXXX";
static char path[64];

static int setup(void **state)
{
    strcpy(dir + strlen(dir) - 6, "XXXXXX");
    assert_non_null(mkdtemp(dir));
    snprintf(path, sizeof(path), "%s/s.json", dir);
    return 0;
}

static int teardown(void **state)
{
    unlink(path);
    /* Fails when the test left something else behind, such as a half-written file. */
    return rmdir(dir);
}

static json_t *read_back(void)
{
    json_error_t error;
    json_t *root = json_load_file(path, 0, &error);
    if (!root)
        fail_msg("%s: %s", path, error.text);
    return root;
}

static json_int_t integer(const json_t *root, const char *a, const char *b)
{
    const json_t *v = json_object_get(root, a);
    if (b)
        v = json_object_get(v, b);
    if (!json_is_integer(v))
        fail_msg("no integer at %s %s", a, b ? b : "");
    return json_integer_value(v);
}

static void test_figures(void **state)
{
    struct vm_stats *s;
    struct engine_counters c = {.instructions = 3000000, .first_user_ns = 2500000000, .mmio_exits = 5, .halts = 7,
                                .tlb_misses = 11, .native_cpu_ns = 5000000000};
    assert_int_equal(vm_stats_create(NULL, path, &s), 0);
    vm_stats_set_engine(s, "interp");
    vm_stats_add_vcpu(s, &c, 20000000);
    c.first_user_ns = 0;
    c.native_cpu_ns = 0;
    vm_stats_add_vcpu(s, &c, 980000000);
    vm_stats_add(s, "devices/virtio-blk0/reads", 2);
    vm_stats_add(s, "devices/virtio-blk0/reads", 3);
    assert_int_equal(access(path, F_OK), -1);
    assert_int_equal(vm_stats_write(s), 0);
    vm_stats_destroy(s);

    json_t *root = read_back();
    assert_string_equal(json_string_value(json_object_get(root, "engine")), "interp");
    assert_int_equal(integer(root, "guest_instructions", NULL), 6000000);
    assert_int_equal(integer(root, "exits", "mmio"), 10);
    assert_int_equal(integer(root, "exits", "halt"), 14);
    assert_int_equal(integer(root, "engine_counters", "tlb_misses"), 22);
    assert_int_equal(integer(json_object_get(root, "devices"), "virtio-blk0", "reads"), 5);
    double rate = json_real_value(json_object_get(root, "instructions_per_second"));
    assert_true(rate > 0.99e6 && rate < 1.01e6);
    double user = json_real_value(json_object_get(root, "seconds_to_first_user_instruction"));
    assert_true(user > 2.49 && user < 2.51);
    assert_true(json_real_value(json_object_get(root, "wall_seconds")) > 0);
    /* What ran natively in processes of its own counts as the vCPU's and as ours. */
    assert_true(json_real_value(json_object_get(root, "cpu_seconds")) > 5);
    double vcpu = json_real_value(json_object_get(root, "vcpu_cpu_seconds"));
    assert_true(vcpu > 5.99 && vcpu < 6.01);
    assert_true(integer(root, "peak_rss_beyond_ram_bytes", NULL) > 0);
    json_decref(root);
}

static void test_never_in_user_mode(void **state)
{
    struct vm_stats *s;
    assert_int_equal(vm_stats_create(NULL, path, &s), 0);
    assert_int_equal(vm_stats_write(s), 0);
    vm_stats_destroy(s);
    json_t *root = read_back();
    assert_true(json_is_null(json_object_get(root, "seconds_to_first_user_instruction")));
    assert_int_equal(integer(root, "guest_instructions", NULL), 0);
    json_decref(root);
}

static void *touched(size_t size, int flags, int fd)
{
    void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, flags, fd, 0);
    assert_ptr_not_equal(p, MAP_FAILED);
    memset(p, 1, size);
    return p;
}

static json_int_t peak(struct vm_stats *s)
{
    assert_int_equal(vm_stats_write(s), 0);
    json_t *root = read_back();
    json_int_t bytes = integer(root, "peak_rss_beyond_ram_bytes", NULL);
    json_decref(root);
    return bytes;
}

static void test_memory(void **state)
{
    struct vm_stats *s;
    const size_t big = MIB(48);
    assert_int_equal(vm_stats_create(NULL, path, &s), 0);

    /* Guest RAM does not count, */
    int fd = memfd_create("ram", MFD_CLOEXEC);
    assert_int_equal(ftruncate(fd, (off_t)(3 * big)), 0);
    uint8_t *ram = touched(3 * big, MAP_SHARED, fd);
    json_int_t before = peak(s);
    assert_true(before < (json_int_t)big);

    /* not even when it was more once. */
    assert_int_equal(madvise(ram, 2 * big, MADV_REMOVE), 0);
    assert_true(peak(s) < (json_int_t)big);

    /* Shared memory of the process's own does, in each mapping, and other memory too, which guest RAM does not hide. */
    int own_fd = memfd_create("own", MFD_CLOEXEC);
    assert_int_equal(ftruncate(own_fd, MIB(8)), 0);
    void *own[2] = {touched(MIB(8), MAP_SHARED, own_fd), touched(MIB(8), MAP_SHARED, own_fd)};
    void *other = touched(MIB(16), MAP_PRIVATE | MAP_ANONYMOUS, -1);
    resident_add_shared(MIB(16));
    json_int_t more = peak(s);
    assert_true(more >= before + (json_int_t)MIB(31));
    assert_true(more <= before + (json_int_t)MIB(33));
    munmap(own[0], MIB(8));
    munmap(own[1], MIB(8));
    munmap(other, MIB(16));
    close(own_fd);
    resident_remove_shared(MIB(16));
    assert_true(peak(s) <= more + (json_int_t)MIB(1));

    /* What came and went between two samples is seen by the high-water mark. */
    memset(ram, 1, 2 * big);
    munmap(touched(big, MAP_PRIVATE | MAP_ANONYMOUS, -1), big);
    json_int_t after = peak(s);
    assert_true(after >= (json_int_t)(big - MIB(1)));
    assert_true(after < (json_int_t)(big + MIB(1)) + before);
    vm_stats_destroy(s);
    munmap(ram, 3 * big);
    close(fd);
}

static void test_bad_files(void **state)
{
    struct vm_stats *s;
    char text[128];
    log_set_level(LOG_ERROR);
    snprintf(text, sizeof(text), "%s/none/s.json", dir);
    assert_int_equal(vm_stats_create(NULL, text, &s), -ENOENT);
    assert_int_equal(vm_stats_create(NULL, dir, &s), -EISDIR);
    /* Full disk: an error at the end, and no half of a file. */
    assert_int_equal(vm_stats_create(NULL, "/dev/full", &s), 0);
    assert_int_equal(vm_stats_write(s), -ENOSPC);
    vm_stats_destroy(s);
    /* Nor does a pipe that nobody reads hold up the end. */
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(vm_stats_create(NULL, path, &s), 0);
    assert_int_equal(vm_stats_write(s), -ENXIO);
    vm_stats_destroy(s);
    unlink(path);
    /* The old file stays whole until the new one takes its place. */
    int fd = open(path, O_WRONLY | O_CREAT, 0600);
    assert_int_equal(write(fd, "old", 3), 3);
    close(fd);
    assert_int_equal(vm_stats_create(NULL, path, &s), 0);
    fd = open(path, O_RDONLY);
    assert_int_equal(read(fd, text, sizeof(text)), 3);
    assert_int_equal(vm_stats_write(s), 0);
    assert_int_equal(lseek(fd, 0, SEEK_SET), 0);
    assert_int_equal(read(fd, text, sizeof(text)), 3);
    close(fd);
    json_decref(read_back());
    vm_stats_destroy(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_figures, setup, teardown),
        cmocka_unit_test_setup_teardown(test_never_in_user_mode, setup, teardown),
        cmocka_unit_test_setup_teardown(test_memory, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bad_files, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
