/*
 * `ringfort host`: what this host offers to each engine, and why not; as text for people or JSON
 * for programs. Everything is found by trying it: a device node that exists may still not work.
 */
#include "cli/cli.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <liburing.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "engine/engine.h"
#include "isa/x86/cpuid.h"
#include "vm/config_value.h"
#include "vm/vm.h"

/* Something of the host: there or not, and a sentence for people that says why and what to do. */
struct finding {
    bool usable;
    char text[256];
};

static void probe_io_uring(struct finding *f)
{
    struct io_uring ring;
    int r = io_uring_queue_init(4, &ring, 0);
    if (r < 0) {
        snprintf(f->text, sizeof(f->text),
                 "%s; disks use threads instead: see the sysctl kernel.io_uring_disabled, "
                 "RLIMIT_MEMLOCK, or the container's seccomp filter",
                 strerror(-r));
        return;
    }
    io_uring_queue_exit(&ring);
    f->usable = true;
    snprintf(f->text, sizeof(f->text), "works");
}

static void probe_tun(struct finding *f)
{
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC);
    f->usable = fd >= 0;
    if (fd < 0)
        snprintf(f->text, sizeof(f->text),
                 "/dev/net/tun: %s; --net tap needs it, --net user does not", strerror(errno));
    else
        snprintf(f->text, sizeof(f->text), "/dev/net/tun opens");
    if (fd >= 0)
        close(fd);
}

static void probe_memfd(struct finding *f)
{
    int fd = memfd_create("probe", MFD_CLOEXEC);
    f->usable = fd >= 0;
    snprintf(f->text, sizeof(f->text), "%s", fd >= 0 ? "works" : strerror(errno));
    if (fd >= 0)
        close(fd);
}

static const struct {
    const char *name, *purpose;
    void (*probe)(struct finding *);
} facilities[] = {
    {"memfd", "guest memory", probe_memfd},
    {"io_uring", "disks", probe_io_uring},
    {"tun", "--net tap", probe_tun},
};

/* A line "name : value" of /proc/cpuinfo. */
static void cpu_name(char *out, size_t size)
{
    char line[512];
    FILE *f = fopen("/proc/cpuinfo", "re");
    snprintf(out, size, "unknown");
    while (f && fgets(line, sizeof(line), f)) {
        char *value = strstr(line, ": ");
        if (strncmp(line, "model name", 10) != 0 || !value)
            continue;
        value[strcspn(value, "\n")] = 0;
        snprintf(out, size, "%s", value + 2);
        break;
    }
    if (f)
        fclose(f);
}

/* All that is known, in the form that -o json prints; the text is made from it. NULL: out of
 * memory. */
static json_t *look(void)
{
    struct utsname os;
    struct sysinfo info = {0};
    char name[256];
    cpu_name(name, sizeof(name));
    uname(&os);
    sysinfo(&info);

    json_t *models = json_array(), *engines = json_object(), *found = json_object();
    const struct x86_cpu_model *model;
    for (unsigned i = 0; (model = x86_cpu_model_at(i)); i++) {
        const char *missing = NULL;
        bool usable = x86_cpu_model_usable(model, &missing) == 0;
        json_array_append_new(models, json_pack("{s:s, s:s, s:b, s:s?}", "name", model->name,
                                                "summary", model->summary, "usable", (int)usable,
                                                "missing", usable ? NULL : missing));
    }
    const struct engine *engine;
    for (unsigned i = 0; (engine = engine_at(i)); i++) {
        struct engine_report report = {0};
        engine->probe(&report);
        if (report.usable && engine->describe)
            engine->describe(report.text, sizeof(report.text));
        json_object_set_new(engines, engine->name,
                            json_pack("{s:b, s:b, s:s, s:s}", "usable", (int)report.usable, "fast",
                                      (int)report.fast, "summary", engine->summary, "text",
                                      report.text));
    }
    for (unsigned i = 0; i < ARRAY_SIZE(facilities); i++) {
        struct finding f = {0};
        facilities[i].probe(&f);
        json_object_set_new(found, facilities[i].name,
                            json_pack("{s:b, s:s, s:s}", "usable", (int)f.usable, "for",
                                      facilities[i].purpose, "text", f.text));
    }
    const struct engine *chosen = engine_choose();
    return json_pack("{s:s, s:s, s:s, s:{s:s, s:i, s:I, s:o}, s:I, s:o, s:s?, s:o}", "version",
                     RINGFORT_VERSION, "os", os.release, "machine", os.machine, "cpu", "name", name,
                     "processors", (int)sysconf(_SC_NPROCESSORS_ONLN), "tsc_hz",
                     (json_int_t)tsc_frequency_hz(), "models", models, "memory_bytes",
                     (json_int_t)((uint64_t)info.totalram * info.mem_unit), "engines", engines,
                     "auto", chosen ? chosen->name : NULL, "facilities", found);
}

static const char *text_of(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text ? text : "-";
}

static const char *usable_of(const json_t *object)
{
    return json_is_true(json_object_get(object, "usable")) ? "yes" : "no ";
}

static int print_text(const json_t *host)
{
    char *text = NULL, memory[24];
    size_t size, i;
    FILE *f = open_memstream(&text, &size);
    if (!f)
        return VM_STATUS_HOST;
    const json_t *cpu = json_object_get(host, "cpu"), *element;
    const char *key;
    uint64_t bytes = (uint64_t)json_integer_value(json_object_get(host, "memory_bytes"));
    config_format_size(align_down(bytes, MIB(1)), memory);
    fprintf(f, "processor    %s, %lld threads, TSC %.3f GHz\n", text_of(cpu, "name"),
            (long long)json_integer_value(json_object_get(cpu, "processors")),
            (double)json_integer_value(json_object_get(cpu, "tsc_hz")) / 1e9);
    fprintf(f, "memory       %s\n", memory);
    fprintf(f, "system       Linux %s, %s\n", text_of(host, "os"), text_of(host, "machine"));
    fprintf(f, "\nengines (--engine auto takes %s)\n", text_of(host, "auto"));
    json_object_foreach(json_object_get(host, "engines"), key, element)
        fprintf(f, "  %-10s %s  %s: %s\n", key, usable_of(element), text_of(element, "summary"),
                text_of(element, "text"));
    fprintf(f, "\nCPU models\n");
    json_array_foreach(json_object_get(cpu, "models"), i, element)
    {
        const char *missing = json_string_value(json_object_get(element, "missing"));
        fprintf(f, "  %-10s %s  %s%s%s\n", text_of(element, "name"), usable_of(element),
                text_of(element, "summary"), missing ? "; this host lacks " : "",
                missing ? missing : "");
    }
    fprintf(f, "\nfacilities\n");
    json_object_foreach(json_object_get(host, "facilities"), key, element)
        fprintf(f, "  %-10s %s  %s: %s\n", key, usable_of(element), text_of(element, "for"),
                text_of(element, "text"));
    if (fclose(f) != 0)
        return VM_STATUS_HOST;
    int status = cli_print(text);
    free(text);
    return status;
}

int cli_host(char **args)
{
    static const char *const names[] = {"o", "output", "help", NULL};
    const char *format = "text";
    for (; *args; args++) {
        if (cli_flag(&args, "--help", NULL) || cli_flag(&args, "-h", NULL))
            return cli_print("Usage: ringfort host [-o text|json]\n\n"
                             "Shows what this host offers to each engine, and why not.\n\n"
                             "  -o, --output FORMAT  text (default) or json\n"
                             "  --help               show this text\n");
        if (!cli_flag(&args, "-o", &format) && !cli_flag(&args, "--output", &format))
            return cli_unknown("host", *args, names);
        if (!format || (strcmp(format, "text") != 0 && strcmp(format, "json") != 0)) {
            log_error("host: the output is text or json; did you mean -o json?");
            return VM_STATUS_USAGE;
        }
    }
    json_t *host = look();
    if (!host) {
        log_error("out of memory");
        return VM_STATUS_HOST;
    }
    int status;
    if (strcmp(format, "text") == 0) {
        status = print_text(host);
    } else {
        char *text = json_dumps(host, JSON_INDENT(4)), *line = NULL;
        status = text && asprintf(&line, "%s\n", text) >= 0 ? cli_print(line) : VM_STATUS_HOST;
        free(text);
        free(line);
    }
    json_decref(host);
    return status;
}
