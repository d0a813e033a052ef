/* The `ringfort` command: finds the verb. */
#include "cli/cli.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "base/util.h"
#include "vm/config_value.h"
#include "vm/suggest.h"
#include "vm/vm.h"

static const struct verb {
    const char *name, *help;
    int (*run)(char **args);
} verbs[] = {
    {"run", "run a virtual machine", cli_run},
    {"ls", "list the machines that run", cli_ls},
    {"info", "show what a machine is and does", cli_info},
    {"console", "attach the terminal to a machine's console", cli_console},
    {"logs", "print what a machine's console has printed", cli_logs},
    {"pause", "stop a machine's guest and clock for a while", cli_pause},
    {"resume", "let a paused machine go on", cli_resume},
    {"stop", "press a machine's power button, and wait for its end", cli_stop},
    {"reset", "press a machine's reset button", cli_reset},
    {"snapshot", "save a running machine, and go on from what was saved", cli_snapshot},
    {"engine", "change how a running machine's processors are run", cli_engine},
    {"migrate", "move a running machine to another process or host", cli_migrate},
    {"receive", "wait for a machine that is moved here, and run it", cli_receive},
    {"top", "show the machines' use of the host, live", cli_top},
    {"host", "show what this host offers to each engine", cli_host},
    {"version", "show the version", cli_version},
    {"devtest", "drive a machine's devices without a guest, by lines of text", cli_devtest},
};

static int print_help(void)
{
    char text[4096];
    int n = snprintf(text, sizeof(text),
                     "Usage: ringfort VERB [argument...]\n\n"
                     "Runs unmodified operating systems in virtual machines.\n\nVerbs:\n");
    for (unsigned i = 0; i < ARRAY_SIZE(verbs); i++)
        n += snprintf(text + n, sizeof(text) - (size_t)n, "  %-9s %s\n", verbs[i].name,
                      verbs[i].help);
    snprintf(text + n, sizeof(text) - (size_t)n,
             "\n'ringfort VERB --help' shows a verb's arguments; see also ringfort(1).\n");
    return cli_print(text);
}

/*
 * Who was started without one of the three would open its next file (a lock, a disk) under that number, and messages and
 * console output would go into it. What is put there instead reads as empty and cannot be written, which is then said.
 */
static void fill_standard_fds(void)
{
    int fd;

    while ((fd = open("/dev/null", O_RDONLY)) >= 0 && fd <= STDERR_FILENO)
        ;
    if (fd >= 0)
        close(fd);
}

int main(int argc, char **argv)
{
    const char *names[ARRAY_SIZE(verbs) + 2] = {NULL};
    const char *name = argc > 1 ? argv[1] : "";

    fill_standard_fds();
    tsc_frequency_begin();
    for (unsigned i = 0; i < ARRAY_SIZE(verbs); i++) {
        names[i] = verbs[i].name;
        if (strcmp(name, verbs[i].name) == 0)
            return verbs[i].run(argv + 2);
    }
    if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0)
        return print_help();
    if (strcmp(name, "--version") == 0)
        return cli_version((char *[]){NULL});
    if (!*name) {
        log_error("a verb is missing; did you mean 'ringfort run --kernel FILE'? 'ringfort --help' "
                  "lists the verbs");
        return VM_STATUS_USAGE;
    }
    const char *nearest = suggest_nearest(name, names);
    if (!nearest && *name == '-')
        nearest = "run";
    if (nearest)
        log_error("unknown verb %s; did you mean 'ringfort %s%s%s'?", config_quote(name), nearest,
                  *name == '-' ? " " : "", *name == '-' ? name : "");
    else
        log_error("unknown verb %s; 'ringfort --help' lists the verbs", config_quote(name));
    return VM_STATUS_USAGE;
}
