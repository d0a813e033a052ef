/* `ringfort pause`: the guest and its clock stand still until `ringfort resume`. */
#include "cli/cli.h"
#include "cli/verb.h"

int cli_pause(char **args)
{
    struct verb v = {
        .name = "pause",
        .min_words = 1,
        .max_words = 1,
        .what = "NAME",
        .help = "Usage: ringfort pause NAME [-o text|json]\n\n"
                "Stops a machine's processors, devices and clock, until 'ringfort resume NAME'.\n\n"
                "  -o, --output FORMAT  text (default) or json\n"
                "  --help               show this text\n",
    };
    return verb_post(&v, args, "/v1/pause");
}
