/* `ringfort version`. */
#include "cli/cli.h"

#include <stddef.h>

int cli_version(char **args)
{
    static const char *const names[] = {"help", NULL};
    for (; *args; args++) {
        if (cli_flag(&args, "--help", NULL) || cli_flag(&args, "-h", NULL))
            return cli_print("Usage: ringfort version\n\n"
                             "Prints the name and version of this program.\n\n"
                             "  --help  show this text\n");
        return cli_unknown("version", *args, names);
    }
    return cli_print("ringfort " RINGFORT_VERSION "\n");
}
