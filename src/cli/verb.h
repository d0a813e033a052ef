/*
 * What the verbs about running machines share: their arguments, the machine that is meant, and how they print.
 *
 * A verb fills in a struct verb and calls verb_parse(). Every verb takes --help and -o text|json.
 */
#ifndef RINGFORT_CLI_VERB_H
#define RINGFORT_CLI_VERB_H

#include <jansson.h>
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>

#include "vm/control/registry.h"

#define VERB_MAX_WORDS 4

struct verb_flag {
    const char *name;    /* "--force"; the list ends with NULL */
    const char *alias;   /* "-f", or NULL */
    const char *form;    /* what its value is called in messages: "SECONDS"; NULL: it takes none */
    bool given;
    const char *value;   /* borrowed from the arguments */
};

struct verb {
    const char *name;            /* "stop"; may have two words: "snapshot save" */
    const char *help;            /* the whole text of --help */
    struct verb_flag *flags;     /* NULL: none of its own */
    unsigned min_words, max_words; /* of arguments that are no flags */
    const char *what;            /* what the missing ones are, for messages: "NAME" */
    /* Filled in. */
    const char *words[VERB_MAX_WORDS];
    unsigned word_count;
    bool json;
};

/* True: go on. False: the command ends with *status (help was printed, or an error logged). */
bool verb_parse(struct verb *v, char **args, int *status);
/* A flag's value as a number in min...max; *out keeps its value when the flag was not given. 0 or the exit status (logged). */
int verb_number(const struct verb *v, const struct verb_flag *f, uint64_t min, uint64_t max, uint64_t *out);
/* The absolute name of the folder that the flag, which is given, names. 0 or the exit status (logged). */
int verb_folder(const struct verb *v, const struct verb_flag *f, char out[PATH_MAX]);
/* The machine that words[0] means. 0 or the exit status (logged). */
int verb_machine(const struct verb *v, struct registry_entry *out);

/* Prints as indented JSON (consumed). Returns the exit status. */
int verb_print_json(json_t *answer);
/* "3d 4h", "2h 5m", "34 s"; "1.5 GiB". Static, four results live at once. */
const char *verb_duration(double seconds);
const char *verb_bytes(double bytes);

/*
 * A POST that is a job of the machine that words[0] means; body is consumed. Returns whether its answer is there to be told as text;
 * otherwise the command ends with *status: it failed (logged), or the answer, with the machine's name, was printed as JSON.
 */
bool verb_job(const struct verb *v, const char *path, json_t *body, struct registry_entry *m, json_t **answer, int *status);

/* For most simple verbs: POST path to the machine, and print its answer's "state" as "NAME: STATE". */
int verb_post(struct verb *v, char **args, const char *path);

#endif
