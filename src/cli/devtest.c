/*
 * `ringfort devtest`: the machine of a configuration without vCPUs, its clock moved by hand, driven
 * through the device test protocol (docs/device-tests.md).
 */
#include "cli/cli.h"

#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "board/pc/pc.h"
#include "device/machine.h"
#include "vm/devtest.h"
#include "vm/parts.h"
#include "vm/status.h"

static int serve(const struct vm_config *config, const char *path)
{
    struct machine m;
    struct vm_parts parts;
    struct pc pc;
    int r = machine_init(&m, true);
    if (r < 0)
        return r;
    r = vm_parts_open(&parts, config, &m);
    if (r < 0)
        goto out;
    parts.board.tsc_hz = tsc_frequency_hz();
    r = vm_parts_build(&parts, &m, &pc);
    if (r == 0)
        r = path ? devtest_serve(&m, path) : devtest_run_fds(&m, STDIN_FILENO, STDOUT_FILENO);
    machine_destroy_devices(&m);
    vm_parts_close(&parts);
out:
    machine_destroy(&m);
    return r;
}

int cli_devtest(char **args)
{
    static const char head[] = "Usage: ringfort devtest [--socket PATH] [flag...]\n\n"
                               "Makes the machine that the flags describe, as 'ringfort run' does, "
                               "but without processors, and\n"
                               "lets lines of text drive its ports, MMIO, memory, interrupts and "
                               "clock: see docs/device-tests.md.\n"
                               "Unlike there, --console is none by default.\n";
    struct cli_own_flag own[] = {{.info = {"socket", "PATH",
                                           "serve one client after the other on this Unix socket\n"
                                           "(default: standard input and output)",
                                           false}}};
    struct vm_config config;
    static const char console[] = "{\"console\": \"none\"}";

    if (cli_wants_help(args))
        return cli_print_help(head, own, ARRAY_SIZE(own), "");
    if (vm_config_init(&config) < 0 ||
        vm_config_load_json(&config, console, strlen(console), "default") < 0) {
        log_error("out of memory");
        return VM_STATUS_HOST;
    }
    int status = cli_read_config(args, "devtest", own, ARRAY_SIZE(own), &config);
    if (status == 0) {
        log_set_level(config.log_level);
        status = vm_status_of(serve(&config, own[0].value));
    }
    vm_config_destroy(&config);
    return status;
}
