/*
 * The verbs of the `ringfort` command. Each gets its arguments without the verb (NULL-terminated)
 * and returns the exit status of the process; vm/vm.h lists the statuses.
 */
#ifndef RINGFORT_CLI_CLI_H
#define RINGFORT_CLI_CLI_H

#include <stdbool.h>

#include "vm/config.h"

int cli_run(char **args);
int cli_host(char **args);
int cli_snapshot(char **args);
int cli_engine(char **args);
int cli_migrate(char **args);
int cli_receive(char **args);
int cli_version(char **args);
int cli_devtest(char **args);
/* Of machines that run. */
int cli_ls(char **args);
int cli_info(char **args);
int cli_console(char **args);
int cli_logs(char **args);
int cli_pause(char **args);
int cli_resume(char **args);
int cli_stop(char **args);
int cli_reset(char **args);
int cli_top(char **args);

/* Writes text to standard output and returns the exit status: 0, or 5 when it did not get there
 * (logged). */
int cli_print(const char *text);
/* True when --help or -h is among the arguments. */
bool cli_wants_help(char **args);
/*
 * For verbs with few flags: true when **args is the flag. With value not NULL the flag takes a
 * value, from the next argument or after "=": *args moves on and *value is set, to NULL when it is
 * missing.
 */
bool cli_flag(char ***args, const char *flag, const char **value);
/*
 * Logs that arg is not an argument of this verb, naming the nearest of names (NULL-terminated,
 * without dashes); returns the exit status for bad usage.
 */
int cli_unknown(const char *verb, const char *arg, const char *const *names);

struct detach;
struct vm;
/*
 * The life of a machine that make() makes, with its control socket; detach: NULL, or the verb goes on in its own process
 * (cli/detach.h). Returns the exit status.
 */
int cli_run_machine(const struct vm_config *config, struct detach *detach, struct vm *(*make)(void *opaque, int *status),
                    void *opaque);

/* A flag of a verb that is not part of a configuration. */
struct cli_own_flag {
    struct vm_config_option_info info; /* argument NULL: takes none */
    bool given;
    const char *value; /* NULL unless given with a value; borrowed from the arguments */
};

/*
 * For verbs that take a configuration: fills config (initialised by the caller) from --config and
 * the flags, and own from the verb's own flags, and checks it. Returns an exit status: 0, or
 * another (logged).
 */
int cli_read_config(char **args, const char *verb, struct cli_own_flag *own, unsigned own_count,
                    struct vm_config *config);
/* Prints head, the list of flags of such a verb, and tail. Returns the exit status. */
int cli_print_help(const char *head, const struct cli_own_flag *own, unsigned own_count,
                   const char *tail);

#endif
