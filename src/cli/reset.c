/* `ringfort reset`: the reset button. */
#include "cli/cli.h"
#include "cli/verb.h"

int cli_reset(char **args)
{
    struct verb v = {
        .name = "reset",
        .min_words = 1,
        .max_words = 1,
        .what = "NAME",
        .help = "Usage: ringfort reset NAME [-o text|json]\n\n"
                "Presses a machine's reset button: the guest begins anew, without being asked.\n\n"
                "  -o, --output FORMAT  text (default) or json\n"
                "  --help               show this text\n",
    };
    return verb_post(&v, args, "/v1/reset");
}
