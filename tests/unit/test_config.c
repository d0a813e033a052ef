/* The configuration object: values in every form, what is refused and how, and JSON that reads
 * back. */
#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "base/util.h"
#include "device/testdev.h"
#include "vm/config.h"
#include "vm/suggest.h"

static int setup(void **state)
{
    struct vm_config *c = malloc(sizeof(*c));
    assert_non_null(c);
    assert_int_equal(vm_config_init(c), 0);
    log_set_level(LOG_ERROR);
    *state = c;
    return 0;
}

static int teardown(void **state)
{
    vm_config_destroy(*state);
    vm_config_destroy(*state);
    free(*state);
    return 0;
}

/* What is logged while fn runs on a fresh configuration, with its result. */
static char logged[2048];
static int saved_stderr;
static FILE *capture;

static void capture_begin(void)
{
    capture = tmpfile();
    assert_non_null(capture);
    saved_stderr = dup(STDERR_FILENO);
    dup2(fileno(capture), STDERR_FILENO);
}

static void capture_end(void)
{
    dup2(saved_stderr, STDERR_FILENO);
    close(saved_stderr);
    rewind(capture);
    logged[fread(logged, 1, sizeof(logged) - 1, capture)] = 0;
    fclose(capture);
}

/* One line, naming what is wrong. */
static void assert_logged(const char *part)
{
    char *end = strchr(logged, '\n');
    if (!end || end[1] || !strstr(logged, part))
        fail_msg("expected one line with \"%s\", got \"%s\"", part, logged);
}

static void flag(struct vm_config *c, const char *name, const char *value)
{
    int r = vm_config_set_flag(c, name, value);
    if (r)
        fail_msg("--%s %s: %d", name, value, r);
}

static void refuse_flag(const char *name, const char *value, const char *part)
{
    struct vm_config c;
    assert_int_equal(vm_config_init(&c), 0);
    capture_begin();
    int r = vm_config_set_flag(&c, name, value);
    capture_end();
    if (r != -EINVAL)
        fail_msg("--%s %s was taken: %d", name, value, r);
    assert_logged(part);
    vm_config_destroy(&c);
}

static void refuse_json(const char *text, const char *part)
{
    struct vm_config c;
    assert_int_equal(vm_config_init(&c), 0);
    capture_begin();
    int r = vm_config_load_json(&c, text, strlen(text), "vm.json");
    capture_end();
    if (r != -EINVAL)
        fail_msg("%s was taken: %d", text, r);
    assert_logged("vm.json: ");
    assert_logged(part);
    vm_config_destroy(&c);
}

/* Flags "name value" up to NULL, which vm_config_finish() must refuse. */
static void refuse_together(const char *part, ...)
{
    struct vm_config c;
    const char *name;
    va_list ap;
    assert_int_equal(vm_config_init(&c), 0);
    va_start(ap, part);
    while ((name = va_arg(ap, const char *)))
        flag(&c, name, va_arg(ap, const char *));
    va_end(ap);
    capture_begin();
    int r = vm_config_finish(&c);
    capture_end();
    assert_int_equal(r, -EINVAL);
    assert_logged(part);
    vm_config_destroy(&c);
}

static void test_defaults(void **state)
{
    struct vm_config *c = *state;
    assert_int_equal(vm_config_finish(c), 0);
    assert_int_equal(c->cpus, 1);
    assert_int_equal(c->memory, MIB(512));
    assert_string_equal(c->cmdline, "");
    assert_string_equal(c->engine, "auto");
    assert_string_equal(c->cpu_model, "host");
    assert_string_equal(c->console, "stdio");
    assert_null(c->kernel);
    assert_null(c->stats);
    assert_int_equal(c->on_crash, VM_ON_CRASH_RESET);
    assert_int_equal(c->disk_count + c->net_count + c->device_count + c->initrd_count, 0);
    char name[32];
    snprintf(name, sizeof(name), "vm-%d", (int)getpid());
    assert_string_equal(c->name, name);
}

static void test_sizes(void **state)
{
    static const struct {
        const char *text;
        uint64_t size;
    } good[] = {{"16M", MIB(16)},  {"512M", MIB(512)},    {"3g", GIB(3)},
                {"1T", GIB(1024)}, {"16777216", MIB(16)}, {"20484K", KIB(20484)}};
    for (unsigned i = 0; i < ARRAY_SIZE(good); i++) {
        struct vm_config c;
        vm_config_init(&c);
        flag(&c, "memory", good[i].text);
        assert_int_equal(c.memory, good[i].size);
        vm_config_destroy(&c);
    }
    refuse_flag("memory", "512", "did you mean --memory 512M?");
    refuse_flag("memory", "512MB", "did you mean --memory 512M?");
    refuse_flag("memory", "1.5G", "did you mean --memory 1536M?");
    refuse_flag("memory", "", "not a size");
    refuse_flag("memory", "-1M", "not a size");
    refuse_flag("memory", "+64M", "not a size");
    refuse_flag("memory", " 64M", "not a size");
    refuse_flag("memory", "M", "not a size");
    refuse_flag("memory", "0", "too small: the least is 16M");
    refuse_flag("memory", "15M", "did you mean --memory 16M?");
    refuse_flag("memory", "2T", "too large: the most is 1T; did you mean --memory 1T?");
    refuse_flag("memory", "18446744073709551616", "too large");
    refuse_flag("memory", "99999999999999999999999T", "too large");
    /* 2^64 bytes exactly: a product that would wrap to zero. */
    refuse_flag("memory", "16777216T", "too large");
    refuse_flag("memory", "20481K", "not a multiple of 4K; did you mean --memory 20M?");
    refuse_json("{\"memory\": 512}", "did you mean \"memory\": \"512M\"?");
    refuse_json("{\"memory\": -1}", "not a size");
    refuse_json("{\"memory\": 1e9}", "not a size");
    refuse_json("{\"memory\": null}", "not a size");
}

static void test_numbers_and_names(void **state)
{
    struct vm_config *c = *state;
    flag(c, "cpus", "64");
    flag(c, "engine", "interp");
    flag(c, "cpu-model", "x86-64-v3");
    flag(c, "on-crash", "exit");
    flag(c, "log-level", "debug");
    flag(c, "name", "web-1.example_2");
    flag(c, "cmdline", "");
    assert_int_equal(c->cpus, 64);
    assert_string_equal(c->engine, "interp");
    assert_string_equal(c->cpu_model, "x86-64-v3");
    assert_int_equal(c->on_crash, VM_ON_CRASH_EXIT);
    assert_int_equal(c->log_level, LOG_DEBUG);

    refuse_flag("cpus", "0", "did you mean --cpus 1?");
    refuse_flag("cpus", "65", "did you mean --cpus 64?");
    refuse_flag("cpus", "-1", "1...64");
    refuse_flag("cpus", "2x", "1...64");
    refuse_flag("cpus", "99999999999999999999999", "did you mean --cpus 64?");
    refuse_json("{\"cpus\": 1.5}", "1...64");
    refuse_json("{\"cpus\": -1}", "1...64");
    refuse_json("{\"cpus\": [1]}", "1...64");
    refuse_flag("translate", "chian=off", "did you mean chain?");
    refuse_flag("translate", "chain=of", "neither on nor off; did you mean chain=on?");
    refuse_flag("translate", "chain", "did you mean chain=");
    refuse_flag("translate", "tier=3", "not a number in 0...2");
    refuse_flag("translate", "threshold=0", "not a number in 1...1000000");
    refuse_flag("translate", "cache=1K", "too small: the least is 1M");
    refuse_flag("translate", "perf=jitdumps", "not what there is; did you mean perf=jitdump?");
    refuse_json("{\"translate\": {\"tier\": true}}", "tier=true");
    refuse_flag("engine", "intrep", "did you mean --engine interp?");
    refuse_flag("engine", "warp", "there are: auto, ");
    refuse_json("{\"engine\": \"intrep\"}", "did you mean \"engine\": \"interp\"?");
    refuse_json("{\"engine\": 1}", "1 is not an engine");
    refuse_flag("cpu-model", "x86_64-v3", "did you mean --cpu-model x86-64-v3?");
    refuse_flag("on-crash", "rest", "did you mean --on-crash reset?");
    refuse_flag("log-level", "verbose", "error, warn, info, debug");
    refuse_flag("name", "a b/c", "did you mean --name a-b-c?");
    refuse_flag("name", "", "1...64 letters");
    refuse_flag("kernel", "", "not empty");
    refuse_json("{\"kernel\": 5}", "5 is not a string");
    refuse_flag("stats", "", "not empty");
    assert_int_equal(vm_config_set_flag(c, "memery", "1G"), -ENOENT);
}

static void test_disks(void **state)
{
    struct vm_config *c = *state;
    flag(c, "disk", "path=a.img");
    flag(c, "disk", "cache=none,path=b,,c.img,readonly=on,serial=S-1");
    assert_int_equal(c->disk_count, 2);
    assert_string_equal(c->disks[0].block.path, "a.img");
    assert_false(c->disks[0].block.readonly);
    assert_int_equal(c->disks[0].block.cache, BLOCK_CACHE_WRITEBACK);
    assert_null(c->disks[0].serial);
    assert_string_equal(c->disks[1].block.path, "b,c.img");
    assert_true(c->disks[1].block.readonly);
    assert_int_equal(c->disks[1].block.cache, BLOCK_CACHE_NONE);
    assert_string_equal(c->disks[1].serial, "S-1");

    refuse_flag("disk", "a.img", "did you mean path=a.img?");
    refuse_flag("disk", "readonly=on", "did you mean --disk path=disk.img?");
    refuse_flag("disk", "path=", "not empty");
    refuse_flag("disk", "path=a,path=b", "not a string");
    refuse_flag("disk", "path=a,", "not an option with a value");
    refuse_flag("disk", "path=a,=b", "not an option with a value");
    refuse_flag("disk", "path=a,redonly=on", "did you mean readonly?");
    refuse_flag("disk", "path=a,readonly=yes", "did you mean readonly=on?");
    refuse_flag("disk", "path=a,cache=writebak", "did you mean cache=writeback?");
    refuse_flag("disk", "path=a,serial=123456789012345678901", "at most 20");
    refuse_flag("disk", "path=a,serial=a b", "printable");
    refuse_json("{\"disk\": {\"path\": \"a\", \"readonly\": 1}}", "readonly=1");
    refuse_json("{\"disk\": [{\"pth\": \"a\"}]}", "did you mean path?");
    refuse_json("{\"disk\": [3]}", "neither an object nor a string");
}

static void test_nets(void **state)
{
    struct vm_config *c = *state;
    flag(c, "net", "user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-10.0.2.15:5353");
    flag(c, "net", "tap,ifname=tap0,mac=52:54:00:AB:cd:01");
    assert_int_equal(vm_config_finish(c), 0);
    assert_int_equal(c->net_count, 2);
    assert_int_equal(c->nets[0].type, VM_NET_USER);
    assert_int_equal(c->nets[0].user.forward_count, 2);
    const struct net_forward *f = c->nets[0].user.forwards;
    assert_false(f[0].udp);
    assert_string_equal(f[0].host_addr, "127.0.0.1");
    assert_int_equal(f[0].host_port, 2222);
    assert_string_equal(f[0].guest_addr, "");
    assert_int_equal(f[0].guest_port, 22);
    assert_true(f[1].udp);
    assert_string_equal(f[1].host_addr, "0.0.0.0");
    assert_string_equal(f[1].guest_addr, "10.0.2.15");
    assert_int_equal(c->nets[1].type, VM_NET_TAP);
    assert_string_equal(c->nets[1].tap.ifname, "tap0");
    assert_memory_equal(c->nets[1].mac, "\x52\x54\x00\xab\xcd\x01", 6);
    assert_memory_equal(c->nets[0].mac, "\x52\x54\x00", 3);

    static const char *const bad[] = {"tcp::22",
                                      "tcp::0-:22",
                                      "tcp::2222-:0",
                                      "tcp::65536-:22",
                                      "tcp::2222-:65536",
                                      "icmp::1-:1",
                                      "tcp:2222-22",
                                      "tcp:localhost:2222-:22",
                                      "tcp:1.2.3:2222-:22",
                                      "tcp::2222-:22x",
                                      "tcp::22 22-:22",
                                      "",
                                      "tcp:",
                                      "tcp:-",
                                      "tcp:::1:2222-:22",
                                      "tcp::+22-:22"};
    for (unsigned i = 0; i < ARRAY_SIZE(bad); i++) {
        char value[100];
        snprintf(value, sizeof(value), "user,hostfwd=%s", bad[i]);
        refuse_flag("net", value, "did you mean hostfwd=tcp:127.0.0.1:2222-:22?");
    }
    refuse_flag("net", "usr", "did you mean --net user?");
    refuse_flag("net", "", "not empty");
    refuse_flag("net", "hostfwd=tcp::1-:1", "lacks its type");
    refuse_flag("net", "tap", "did you mean --net tap,ifname=tap0?");
    refuse_flag("net", "tap,ifname=0123456789abcdef", "at most 15");
    refuse_flag("net", "tap,ifname=a/b", "no slash");
    refuse_flag("net", "tap,ifname=t,hostfwd=tcp::1-:1", "a tap net has no option 'hostfwd'");
    refuse_flag("net", "user,ifname=t", "a user net has no option 'ifname'");
    refuse_flag("net", "none,mac=52:54:00:12:34:56", "has no option");
    refuse_flag("net", "user,mac=52:54:00:12:34", "not an Ethernet address");
    refuse_flag("net", "user,mac=52:54:00:12:34:5g", "not an Ethernet address");
    refuse_flag("net", "user,mac=53:54:00:12:34:56", "did you mean mac=52:54:00:12:34:56?");
    refuse_json("{\"net\": [\"none\", \"user\"]}", "exclude each other");
    refuse_json("{\"net\": [\"user\", \"none\"]}", "exclude each other");
}

static void test_devices(void **state)
{
    struct vm_config *c = *state;
    flag(c, "device", "isa-debug-exit");
    flag(c, "device", "virtio-console,console=file:out.log");
    flag(c, "device", "virtio-console");
    flag(c, "device", "virtio-rng");
    flag(c, "device", "pc-testdev");
    assert_int_equal(vm_config_finish(c), 0);
    assert_int_equal(c->device_count, 5);
    assert_int_equal(c->devices[0].type, VM_DEVICE_DEBUG_EXIT);
    assert_int_equal(c->devices[0].iobase, TESTDEV_EXIT_PORT);
    assert_int_equal(c->devices[0].iosize, TESTDEV_EXIT_PORTS);
    assert_string_equal(c->devices[1].console, "file:out.log");
    assert_string_equal(c->devices[2].console, "none");
    assert_int_equal(c->devices[3].type, VM_DEVICE_VIRTIO_RNG);
    assert_int_equal(c->devices[4].type, VM_DEVICE_PC_TESTDEV);

    refuse_flag("device", "isa-debug-exit,iobase=0x10000", "did you mean iobase=0xfffe?");
    refuse_flag("device", "isa-debug-exit,iobase=0xffff", "did you mean iobase=0xfffe?");
    refuse_flag("device", "isa-debug-exit,iosize=3", "did you mean iosize=4?");
    refuse_flag("device", "isa-debug-exit,iosize=0", "iosize");
    refuse_flag("device", "isa-debug-exit,iobase=", "iobase");
    refuse_flag("device", "isa-debug-exit,iobase=0x", "iobase");
    refuse_flag("device", "isa-debug-exit,base=1", "did you mean iobase?");
    refuse_flag("device", "virtio-rng,iobase=1", "virtio-rng has no option 'iobase'");
    refuse_flag("device", "virtio-rgn", "did you mean --device virtio-rng?");
    refuse_flag("device", "virtio-console,console=nowhere", "not a console");
    refuse_json("{\"device\": {\"iobase\": 1}}", "lacks its type");
}

static void test_consoles(void **state)
{
    static const char *const good[] = {"stdio", "pty", "none", "file:/tmp/a,b", "unix:/tmp/s"};
    for (unsigned i = 0; i < ARRAY_SIZE(good); i++) {
        struct vm_config c;
        vm_config_init(&c);
        flag(&c, "console", good[i]);
        assert_string_equal(c.console, good[i]);
        vm_config_destroy(&c);
    }
    refuse_flag("console", "", "not a console");
    refuse_flag("console", "studio", "did you mean stdio?");
    refuse_flag("console", "file:", "lacks a path");
    refuse_flag("console", "stdio:", "not a console");
    refuse_flag("console", "/tmp/x", "did you mean file:/tmp/x?");
    char path[200] = "unix:";
    memset(path + 5, 'a', 150);
    refuse_flag("console", path, "at most 107 bytes");
}

static void test_resources(void **state)
{
    refuse_together("is also used by --disk", "disk", "path=a", "disk", "path=a", NULL);
    refuse_together("is also used by --disk", "disk", "path=a,readonly=on", "disk", "path=a", NULL);
    /* The same file by two names. */
    refuse_together("is also used by --disk", "disk", "path=/proc/self/exe", "disk",
                    "path=/proc/self/../self/exe", NULL);
    refuse_together("is also used by --kernel", "kernel", "a", "disk", "path=a", NULL);
    refuse_together("is also used by --disk", "disk", "path=a", "stats", "a", NULL);
    refuse_together("is also used by --console", "console", "file:a", "device",
                    "virtio-console,console=file:a", NULL);
    refuse_together("share the one terminal", "device", "virtio-console,console=stdio", NULL);
    refuse_together("share the one terminal", "console", "none", "device",
                    "virtio-console,console=stdio", "device", "virtio-console,console=stdio", NULL);
    refuse_together("did you mean hostfwd=tcp:127.0.0.1:2223-:80?", "net",
                    "user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=tcp:127.0.0.1:2222-:80", NULL);
    refuse_together("forwarded twice", "net", "user,hostfwd=tcp::2222-:22", "net",
                    "user,hostfwd=tcp:127.0.0.1:2222-:22", NULL);
    refuse_together("did you mean hostfwd=udp:0.0.0.0:1024-:1?", "net",
                    "user,hostfwd=udp::65535-:1,hostfwd=udp::65535-:1", NULL);
    refuse_together("two nets on the interface", "net", "tap,ifname=t", "net", "tap,ifname=t",
                    NULL);
    refuse_together("two nets with mac=", "net", "user,mac=52:54:00:00:00:01", "net",
                    "user,mac=52:54:00:00:00:01", NULL);
    refuse_together("two devices isa-debug-exit with iobase=0x501", "device", "isa-debug-exit",
                    "device", "isa-debug-exit", NULL);
    refuse_together("at most one isa-debug-exit", "device", "isa-debug-exit", "device",
                    "isa-debug-exit,iobase=0x601", NULL);
    refuse_together("at most one pc-testdev", "device", "pc-testdev", "device", "pc-testdev", NULL);
    refuse_together("taken by the serial port", "device", "isa-debug-exit,iobase=0x3ff", NULL);
    refuse_together("taken by pc-testdev", "device", "pc-testdev", "device",
                    "isa-debug-exit,iobase=0x2017", NULL);

    struct vm_config *c = *state;
    flag(c, "disk", "path=a,readonly=on");
    flag(c, "disk", "path=a,readonly=on");
    flag(c, "console", "file:/dev/null");
    flag(c, "stats", "/dev/null");
    flag(
        c, "net",
        "user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=tcp:127.0.0.2:2222-:22,hostfwd=udp::2222-:22");
    flag(c, "device", "isa-debug-exit,iobase=0x2017");
    assert_int_equal(vm_config_finish(c), 0);
}

static void test_too_many(void **state)
{
    struct vm_config *c = *state;
    for (unsigned i = 0; i < VM_CONFIG_MAX_PCI_DEVICES; i++)
        flag(c, "device", "virtio-rng");
    assert_int_equal(vm_config_finish(c), 0);
    flag(c, "disk", "path=a");
    capture_begin();
    int r = vm_config_finish(c);
    capture_end();
    assert_int_equal(r, -EINVAL);
    assert_logged("at most 30 together");

    for (unsigned i = 0; i < VM_CONFIG_MAX_INITRDS; i++)
        flag(c, "initrd", "i");
    capture_begin();
    r = vm_config_set_flag(c, "initrd", "i");
    capture_end();
    assert_int_equal(r, -EINVAL);
    assert_logged("at most 64 files");
}

static void test_json_errors(void **state)
{
    refuse_json("", "line 1");
    refuse_json("{\n\"cpus\": 1,\n}", "line 3");
    refuse_json("{\"cpus\": 1} x", "line 1");
    refuse_json("{\"cpus\": 1, \"cpus\": 2}", "duplicate");
    refuse_json("[]", "not an object");
    refuse_json("{\"memry\": \"1G\"}", "unknown key 'memry'; did you mean \"memory\"?");
    refuse_json("{\"xyzzy\": 1}", "unknown key 'xyzzy'");
    refuse_json("{\"a\\nb\": 1}", "unknown key 'a\\x0ab'");
    refuse_json("{\"kernel\": \"a\\u0000b\"}", "line 1");
    refuse_json("{\"config\": \"x\"}", "unknown key");
    /* A key of the file must not reach a machine's options through a list inside a list. */
    refuse_json("{\"initrd\": [[\"a\"]]}", "not a string");
}

static void test_override(void **state)
{
    struct vm_config *c = *state;
    static const char text[] =
        "{\"cpus\": 2, \"memory\": \"1G\", \"initrd\": \"one\", \"name\": \"file\","
        " \"disk\": [{\"path\": \"a\"}, \"path=b,readonly=on\"],"
        " \"net\": {\"type\": \"user\", \"hostfwd\": \"tcp::1-:1\"}}";
    assert_int_equal(vm_config_load_json(c, text, strlen(text), "vm.json"), 0);
    assert_int_equal(c->disk_count, 2);
    assert_true(c->disks[1].block.readonly);
    assert_int_equal(c->initrd_count, 1);
    flag(c, "cpus", "3");
    flag(c, "disk", "path=c");
    flag(c, "disk", "path=d");
    flag(c, "net", "none");
    assert_int_equal(vm_config_finish(c), 0);
    assert_int_equal(c->cpus, 3);
    assert_int_equal(c->memory, GIB(1));
    assert_int_equal(c->disk_count, 2);
    assert_string_equal(c->disks[0].block.path, "c");
    assert_string_equal(c->disks[1].block.path, "d");
    assert_int_equal(c->net_count, 0);
    assert_string_equal(c->initrds[0], "one");
    assert_string_equal(c->name, "file");

    capture_begin();
    int r = vm_config_set_flag(c, "cpus", "4");
    capture_end();
    assert_int_equal(r, -EINVAL);
    assert_logged("--cpus: is given twice");
}

static void test_round_trip(void **state)
{
    struct vm_config *c = *state, again;
    static const char *const flags[][2] = {
        {"name", "web"},
        {"kernel", "vm \"linuz\"\n\xc3\xa9"},
        {"initrd", "a"},
        {"initrd", "b"},
        {"cmdline", "console=ttyS0 x=\"y z\""},
        {"cpus", "7"},
        {"memory", "20484K"},
        {"cpu-model", "x86-64-v2"},
        {"engine", "interp"},
        {"translate", "tier=1,threshold=3,cache=65540K,chain=off,share=off,loops=off,liveness=off,redo=off,returns=off,"
                      "indirect=off,vectors=off,extend=off,count=on,lockstep=on,direct=always,perf=map"},
        {"disk", "path=a,,b,readonly=on,cache=unsafe,serial=s"},
        {"disk", "path=c"},
        {"net", "user,hostfwd=tcp::1-:2,hostfwd=udp:127.0.0.1:3-1.2.3.4:5"},
        {"net", "tap,ifname=t0,mac=02:00:00:00:00:01"},
        {"device", "isa-debug-exit,iobase=0x502,iosize=4"},
        {"device", "virtio-console,console=pty"},
        {"device", "virtio-rng"},
        {"device", "pc-testdev"},
        {"console", "unix:/tmp/s"},
        {"on-crash", "exit"},
        {"stats", "s.json"},
        {"trace-exec", "t,,x.txt,registers=on,size=3M,files=4"},
        {"log-level", "error"}};
    for (unsigned i = 0; i < ARRAY_SIZE(flags); i++)
        flag(c, flags[i][0], flags[i][1]);
    /* Every option takes part, so that a new one cannot be forgotten here. */
    struct vm_config_option_info info;
    for (unsigned i = 0; vm_config_option(i, &info); i++)
        assert_true(c->flags_given >> i & 1);
    assert_int_equal(vm_config_finish(c), 0);
    char *text = vm_config_to_json(c);
    assert_non_null(text);

    assert_int_equal(vm_config_init(&again), 0);
    assert_int_equal(vm_config_load_json(&again, text, strlen(text), "round"), 0);
    assert_int_equal(vm_config_finish(&again), 0);
    char *twice = vm_config_to_json(&again);
    assert_string_equal(text, twice);
    for (unsigned i = 0; i < translate_option_count; i++) {
        char key[40];
        snprintf(key, sizeof(key), "\"%s\": ", translate_option_table[i].name);
        assert_non_null(strstr(strstr(text, "\"translate\": {"), key));
    }
    assert_memory_equal(&again.translate, &c->translate, sizeof(c->translate));
    assert_string_equal(again.kernel, c->kernel);
    assert_int_equal(again.memory, c->memory);
    assert_int_equal(again.devices[0].iobase, 0x502);
    assert_int_equal(again.nets[0].user.forwards[1].guest_port, 5);
    assert_memory_equal(again.nets[0].mac, c->nets[0].mac, 6);
    assert_string_equal(again.disks[0].block.path, "a,b");
    assert_int_equal(again.disks[0].block.cache, BLOCK_CACHE_UNSAFE);
    assert_int_equal(again.on_crash, VM_ON_CRASH_EXIT);
    free(text);
    free(twice);
    vm_config_destroy(&again);
}

static void test_not_utf8(void **state)
{
    struct vm_config *c = *state;
    flag(c, "disk", "path=a\xff.img");
    assert_string_equal(c->disks[0].block.path, "a\xff.img");
    assert_int_equal(vm_config_finish(c), 0);
    capture_begin();
    char *text = vm_config_to_json(c);
    capture_end();
    assert_null(text);
    assert_logged("not UTF-8");
}

static void test_macs(void **state)
{
    struct vm_config *c = *state, same, other;
    vm_config_init(&same);
    vm_config_init(&other);
    flag(c, "name", "one");
    flag(&same, "name", "one");
    flag(&other, "name", "two");
    for (unsigned i = 0; i < 3; i++) {
        flag(c, "net", "user");
        flag(&same, "net", "user");
        flag(&other, "net", "user");
    }
    assert_int_equal(vm_config_finish(c), 0);
    assert_int_equal(vm_config_finish(&same), 0);
    assert_int_equal(vm_config_finish(&other), 0);
    for (unsigned i = 0; i < 3; i++) {
        assert_memory_equal(c->nets[i].mac, same.nets[i].mac, 6);
        assert_memory_not_equal(c->nets[i].mac, other.nets[i].mac, 6);
        for (unsigned k = 0; k < i; k++)
            assert_memory_not_equal(c->nets[i].mac, c->nets[k].mac, 6);
    }
    vm_config_destroy(&same);
    vm_config_destroy(&other);
}

static void test_host(void **state)
{
    struct vm_config *c = *state;
    flag(c, "memory", "16M");
    assert_int_equal(vm_config_check_host(c), 0);
    c->memory = UINT64_C(1) << 60;
    capture_begin();
    int r = vm_config_check_host(c);
    capture_end();
    assert_int_equal(r, -ENOMEM);
    assert_logged("less memory than");
}

static void test_file(void **state)
{
    struct vm_config *c = *state;
    char path[] = "/tmp/ringfort-config-XXXXXX";
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    static const char text[] = "{\"cpus\": 5}\n";
    assert_int_equal(write(fd, text, strlen(text)), strlen(text));
    assert_int_equal(vm_config_load_file(c, path), 0);
    assert_int_equal(c->cpus, 5);
    /* A sparse file that is far too large is not read into memory. */
    assert_int_equal(ftruncate(fd, 1 << 30), 0);
    capture_begin();
    int r = vm_config_load_file(c, path);
    capture_end();
    assert_int_equal(r, -EINVAL);
    assert_logged("larger than 1 MiB");
    close(fd);
    unlink(path);

    capture_begin();
    r = vm_config_load_file(c, path);
    capture_end();
    assert_int_equal(r, -ENOENT);
    assert_logged(path);
    capture_begin();
    r = vm_config_load_file(c, "/tmp");
    capture_end();
    assert_int_equal(r, -EISDIR);
    assert_logged("is a directory");
}

static void test_suggest(void **state)
{
    static const char *const names[] = {"memory", "name", "net", "cpus", NULL};
    assert_int_equal(suggest_distance("", ""), 0);
    assert_int_equal(suggest_distance("abc", ""), 3);
    assert_int_equal(suggest_distance("kitten", "sitting"), 3);
    assert_int_equal(suggest_distance("abcd", "acbd"), 1);
    assert_int_equal(suggest_distance("ABC", "abc"), 0);
    char lengthy[300];
    memset(lengthy, 'x', sizeof(lengthy) - 1);
    lengthy[sizeof(lengthy) - 1] = 0;
    assert_int_equal(suggest_distance(lengthy, lengthy), 0);
    assert_int_equal(suggest_distance(lengthy, ""), 63);
    assert_string_equal(suggest_nearest("memroy", names), "memory");
    assert_string_equal(suggest_nearest("mem", names), "memory");
    assert_string_equal(suggest_nearest("cpu", names), "cpus");
    assert_null(suggest_nearest("xyzzy", names));
    assert_null(suggest_nearest(lengthy, names));
    assert_null(suggest_nearest("", names));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_defaults, setup, teardown),
        cmocka_unit_test_setup_teardown(test_sizes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_numbers_and_names, setup, teardown),
        cmocka_unit_test_setup_teardown(test_disks, setup, teardown),
        cmocka_unit_test_setup_teardown(test_nets, setup, teardown),
        cmocka_unit_test_setup_teardown(test_devices, setup, teardown),
        cmocka_unit_test_setup_teardown(test_consoles, setup, teardown),
        cmocka_unit_test_setup_teardown(test_resources, setup, teardown),
        cmocka_unit_test_setup_teardown(test_too_many, setup, teardown),
        cmocka_unit_test_setup_teardown(test_json_errors, setup, teardown),
        cmocka_unit_test_setup_teardown(test_override, setup, teardown),
        cmocka_unit_test_setup_teardown(test_round_trip, setup, teardown),
        cmocka_unit_test_setup_teardown(test_not_utf8, setup, teardown),
        cmocka_unit_test_setup_teardown(test_macs, setup, teardown),
        cmocka_unit_test_setup_teardown(test_host, setup, teardown),
        cmocka_unit_test_setup_teardown(test_file, setup, teardown),
        cmocka_unit_test(test_suggest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
