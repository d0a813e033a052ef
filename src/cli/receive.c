/* `ringfort receive`: waits for a machine that `ringfort migrate` sends, and runs it. */
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "cli/cli.h"
#include "cli/detach.h"
#include "cli/verb.h"
#include "migrate/channel.h"
#include "vm/config.h"
#include "vm/config_value.h"
#include "vm/control/control.h"
#include "vm/control/registry.h"
#include "vm/migrate.h"
#include "vm/status.h"
#include "vm/vm.h"

static const char help[] =
    "Usage: ringfort receive NAME --listen tcp:HOST:PORT|unix:PATH [flag...]\n\n"
    "Waits for a machine that 'ringfort migrate' sends here, and runs it under this name. The source says\n"
    "what machine it is; its disks and kernel have to be found under the same paths. Disks that\n"
    "come along (migrate --with-disks) become files in ~/.local/share/ringfort/machines/NAME.\n\n"
    "  --listen ADDRESS     where; HOST may be empty for all addresses of this host\n"
    "  --tls DIR            encrypted, with ca.pem, cert.pem and key.pem in DIR on both sides\n"
    "  --disks DIR          put disks that come along there instead, as NAME.disk0 and so on\n"
    "  --detach             return as soon as it listens, and go on in the background\n"
    "  --engine ENGINE      how processors run (default: as on the source)\n"
    "  --console CONSOLE    the serial port's other end (default: as on the source)\n"
    "  --net KIND[,...]     in place of the machine's cards, as many and of the same addresses: for\n"
    "                       another tap or other forwarded ports\n"
    "  --log-level LEVEL    error, warn, info or debug\n"
    "  -o, --output FORMAT  text (default) or json, of the line that says where it listens\n"
    "  --help               show this text\n\n"
    "Exit status: as 'ringfort run'; 3 also when the machine did not arrive.\n";

#define OWN_FLAGS 4u /* of those below; the rest are the configuration's */

struct receiving {
    struct control *control;
};

static int on_config(void *opaque, const struct vm_config *config)
{
    struct receiving *s = opaque;

    return control_open(config, &s->control);
}

static int say(const struct verb *v, const struct vm_reception *r, const char *listen)
{
    char line[512];

    if (v->json)
        return verb_print_json(json_pack("{s:s, s:s, s:i}", "name", v->words[0], "listen", listen, "port", (int)vm_reception_port(r)));
    if (vm_reception_port(r))
        snprintf(line, sizeof(line), "%s: waiting for a machine at %.300s (port %u)\n", v->words[0], listen, vm_reception_port(r));
    else
        snprintf(line, sizeof(line), "%s: waiting for a machine at %.300s\n", v->words[0], listen);
    return cli_print(line);
}

/* Until there is a machine, or there will be none: NULL, with the exit status. */
static struct vm *await(struct vm_reception *r, int signals, int *status)
{
    struct pollfd p[2] = { { .fd = vm_reception_fd(r), .events = POLLIN }, { .fd = signals, .events = POLLIN } };
    struct vm *vm;

    *status = VM_STATUS_HOST;
    while (poll(p, 2, -1) < 0 && errno == EINTR)
        ;
    if (p[1].revents && !p[0].revents) {
        *status = VM_STATUS_USER;
        vm_reception_cancel(r);
    }
    vm = vm_reception_wait(r);
    if (!vm)
        vm_reception_end(r, NULL);
    return vm;
}

static int serve(struct vm *vm, struct receiving *s, const char *name, bool detached)
{
    char console[4096];
    int err = 0;

    if (detached)
        err = registry_log_path(name, "console", true, console, sizeof(console));
    if (detached && !err)
        err = control_keep_console(s->control, console);
    if (!err)
        err = control_serve(s->control, vm);
    if (err) {
        vm_end(vm, vm_status_of(err));
        log_error("the machine gets no control socket and is not taken");
    }
    return vm_run(vm);
}

static int receive(const struct verb *v, const struct vm_reception_options *opt, struct detach *detach)
{
    struct receiving s = { 0 };
    struct vm_reception *r;
    struct vm *vm = NULL;
    enum migrate_stage end;
    int status = VM_STATUS_HOST, signals = vm_signals_open();

    r = vm_reception_create(opt);
    if (!r)
        goto out;
    if (!detach)
        say(v, r, opt->target.listen);
    else if (vm_reception_port(r) && strcmp(strrchr(opt->target.listen, ':'), ":0") == 0)
        log_warn("waiting for a machine at port %u", vm_reception_port(r));
    if (detach && detach_ready(detach))
        goto out;
    vm_reception_on_config(r, on_config, &s);
    vm = await(r, signals, &status);
    close(signals);
    signals = -1;
    if (vm) {
        status = serve(vm, &s, v->words[0], detach != NULL);
        end = vm_reception_end(r, NULL);
        if (end != MIGRATE_DONE)
            status = VM_STATUS_HOST;
    }
    if (detach)
        log_warn("ended with status %d", status);
    control_close(s.control);
    vm_destroy(vm);
    control_destroy(s.control);
out:
    vm_reception_free(r);
    if (signals >= 0)
        close(signals);
    return status;
}

int cli_receive(char **args)
{
    struct verb_flag flags[] = { { .name = "--listen", .form = "ADDRESS" },   { .name = "--tls", .form = "DIR" },
                                 { .name = "--detach" },                      { .name = "--disks", .form = "DIR" },
                                 { .name = "--engine", .form = "ENGINE" },    { .name = "--console", .form = "CONSOLE" },
                                 { .name = "--net", .form = "KIND" },         { .name = "--log-level", .form = "LEVEL" },
                                 { 0 } };
    struct verb v = { .name = "receive", .min_words = 1, .max_words = 1, .what = "NAME --listen ADDRESS", .help = help, .flags = flags };
    const char *given[ARRAY_SIZE(flags)][2] = { { NULL } };
    struct vm_reception_options opt = { .flags = (const char *const (*)[2])given };
    struct detach detach = { .ready_fd = -1 };
    char error[CHANNEL_ERROR_MAX];
    struct vm_config config;
    char disks[PATH_MAX], tls[PATH_MAX];
    unsigned n = 0;
    int status;

    if (!verb_parse(&v, args, &status))
        return status;
    if (!flags[0].given) {
        log_error("receive: --listen is missing; did you mean --listen tcp::4444?");
        return VM_STATUS_USAGE;
    }
    if (channel_check_address(flags[0].value, error)) {
        log_error("receive: --listen: %s", error);
        return VM_STATUS_USAGE;
    }
    /* What the configuration's flags say is checked now, not when a source has come. */
    if (vm_config_init(&config))
        return VM_STATUS_HOST;
    status = vm_status_of(vm_config_set_flag(&config, "name", v.words[0]));
    for (unsigned i = OWN_FLAGS; flags[i].name && !status; i++)
        if (flags[i].given) {
            given[n][0] = flags[i].name + 2;
            given[n++][1] = flags[i].value;
            status = vm_status_of(vm_config_set_flag(&config, flags[i].name + 2, flags[i].value));
        }
    if (!status)
        status = vm_status_of(vm_config_finish(&config));
    if (!status) {
        log_set_level(config.log_level);
        log_set_machine(config.name);
    }
    vm_config_destroy(&config);
    if (status)
        return status;
    opt.name = v.words[0];
    opt.target.listen = flags[0].value;
    opt.target.tls_dir = flags[1].given ? tls : NULL;
    status = flags[3].given ? verb_folder(&v, &flags[3], disks) : 0;
    if (!status && flags[3].given && access(disks, W_OK | X_OK) < 0) {
        log_error("receive: --disks %s: no disks can be made there: %s", config_quote(flags[3].value), strerror(errno));
        status = vm_status_of(-errno);
    }
    if (!status && flags[1].given)
        status = verb_folder(&v, &flags[1], tls);
    if (status)
        return status;
    opt.disks = flags[3].given ? disks : NULL;
    if (flags[2].given && detach_begin(&detach, v.words[0], &status))
        return status;
    return receive(&v, &opt, flags[2].given ? &detach : NULL);
}
