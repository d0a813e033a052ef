/* `ringfort resume`: lets a paused guest go on. */
#include "cli/cli.h"
#include "cli/verb.h"

int cli_resume(char **args)
{
    struct verb v = {
        .name = "resume",
        .min_words = 1,
        .max_words = 1,
        .what = "NAME",
        .help = "Usage: ringfort resume NAME [-o text|json]\n\n"
                "Lets a machine go on that 'ringfort pause' has stopped. For the guest no time has passed.\n\n"
                "  -o, --output FORMAT  text (default) or json\n"
                "  --help               show this text\n",
    };
    return verb_post(&v, args, "/v1/resume");
}
