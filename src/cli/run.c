/* `ringfort run`: a configuration, then the machine's life. */
#include "cli/cli.h"

#include <errno.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/util.h"
#include "cli/detach.h"
#include "vm/control/control.h"
#include "vm/control/registry.h"
#include "vm/status.h"
#include "vm/vm.h"

static const char help_head[] =
    "Usage: ringfort run --kernel FILE [flag...]\n"
    "       ringfort run --config FILE [flag...]\n\n"
    "Runs a virtual machine until the guest powers off: in the foreground, or with --detach in the\n"
    "background.\n";
static const char help_tail[] =
    "\n"
    "Leaving: the guest powers off; or Ctrl-] on the terminal ends the run at once. SIGTERM, "
    "SIGINT\n"
    "and SIGHUP press the guest's power button; the second of them ends the run at once. Disks "
    "are\n"
    "flushed either way. Ctrl-C on the terminal goes to the guest.\n\n"
    "Exit status:\n"
    "  0  the guest powered off\n"
    "  1  the user ended the run while the guest was running\n"
    "  2  bad usage or configuration, or a file that is not what it should be\n"
    "  3  the host lacks something: memory, permission, a free port, a device\n"
    "  4  the guest crashed beyond continuing (--on-crash exit)\n"
    "  5  a backend failed for good: no space, I/O error\n"
    "  V * 2 + 1 after a write of V to isa-debug-exit\n\n"
    "Example:\n"
    "  ringfort run --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0 root=/dev/vda1' "
    "\\\n"
    "      --memory 1G --disk path=server.img --net user,hostfwd=tcp:127.0.0.1:2222-:22\n";

/* In the process that stays: the control socket, the machine, and letting the terminal go. */
static int serve_machine(const struct vm_config *config, struct control *control, struct vm *vm, struct detach *detach)
{
    char console[4096];
    int err = 0;

    if (detach)
        err = registry_log_path(config->name, "console", true, console, sizeof(console));
    if (detach && !err)
        err = control_keep_console(control, console);
    if (!err)
        err = control_serve(control, vm);
    if (!err)
        err = vm_start(vm);
    /* A restored machine waits until somebody can see it. */
    if (!err)
        err = vm_resume(vm, VM_HOLD_SAVE);
    if (detach && !err)
        err = detach_ready(detach);
    if (err)
        return vm_status_of(err);
    int status = vm_run(vm);
    if (detach)
        log_warn("ended with status %d", status);
    return status;
}

static struct vm *make(void *opaque, int *status)
{
    return vm_create(opaque, status);
}

int cli_run_machine(const struct vm_config *config, struct detach *detach, struct vm *(*make_vm)(void *opaque, int *status),
                    void *opaque)
{
    struct control *control;
    int status = vm_status_of(control_open(config, &control));
    if (status)
        return status;
    struct vm *vm = make_vm(opaque, &status);
    if (vm)
        status = serve_machine(config, control, vm, detach);
    control_close(control);
    vm_destroy(vm);
    control_destroy(control);
    return status;
}

static int print_config(const struct vm_config *config)
{
    char *text = vm_config_to_json(config);
    int status = text ? cli_print(text) : VM_STATUS_USAGE;
    free(text);
    return status;
}

int cli_run(char **args)
{
    struct cli_own_flag own[] = {
        {.info = {"print-config", NULL, "print the configuration that results, as JSON, and exit",
                  false}},
        {.info = {"detach", NULL,
                  "return as soon as the machine runs and leave it running; see\n"
                  "'ringfort ls', 'ringfort console' and 'ringfort logs'",
                  false}}};
    struct vm_config config;
    struct detach detach = {.ready_fd = -1};

    if (cli_wants_help(args))
        return cli_print_help(help_head, own, ARRAY_SIZE(own), help_tail);
    if (vm_config_init(&config) < 0) {
        log_error("out of memory");
        return VM_STATUS_HOST;
    }
    int status = cli_read_config(args, "run", own, ARRAY_SIZE(own), &config);
    if (status)
        goto out;
    if (own[0].given) {
        status = print_config(&config);
        goto out;
    }
    if (!config.kernel) {
        log_error("run: --kernel is missing; did you mean --kernel vmlinuz?");
        status = VM_STATUS_USAGE;
        goto out;
    }
    log_set_level(config.log_level);
    log_set_machine(config.name);
    status = vm_status_of(vm_config_check_host(&config));
    if (status == 0 && own[1].given && detach_begin(&detach, config.name, &status))
        goto out;
    if (status == 0)
        status = cli_run_machine(&config, own[1].given ? &detach : NULL, make, &config);
out:
    vm_config_destroy(&config);
    return status;
}
