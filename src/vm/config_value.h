/*
 * Single values of a configuration between text, JSON and C: what config_options.c builds its
 * options from.
 *
 * The same value may come as JSON (true, 4, "512M", {"path": …}) or as a flag's text ("on", "4",
 * "path=a.img,…"). A flag's text with sub-options becomes the JSON object that it stands for, so
 * that there is one way to read both. Functions return 0 or a negative errno, and log one line that
 * names where the value stood.
 */
#ifndef RINGFORT_VM_CONFIG_VALUE_H
#define RINGFORT_VM_CONFIG_VALUE_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

/* Where a value stands. */
struct config_origin {
    const char *file; /* NULL: on the command line */
    const char *key;
};

/* Logs "--KEY: text" or "FILE: "KEY": text"; returns -EINVAL. */
int config_bad(const struct config_origin *o, const char *fmt, ...)
    __attribute__((format(printf, 2, 3)));
/* text in quotes for a message: control characters escaped, cut after some 80 bytes. Four results
 * live at once per thread. */
const char *config_quote(const char *text);
/* How value would be written at this place: "--memory 512M" or "memory": "512M". As config_quote()
 * for its life time. */
const char *config_form(const struct config_origin *o, const char *value);

/* A string without NUL, not empty unless empty is true. *out is a copy; what it held is freed. */
int config_string(const struct config_origin *o, const json_t *v, bool empty, char **out);
/* One of names (NULL-terminated): its index. what: "an engine". sub: the sub-option's name, or
 * NULL. */
int config_choice(const struct config_origin *o, const char *sub, const json_t *v, const char *what,
                  const char *const *names, unsigned *out);
/* true, false, "on", "off". */
int config_bool(const struct config_origin *o, const char *sub, const json_t *v, bool *out);
/* A number, or text in decimal or with 0x; min…max. */
int config_uint(const struct config_origin *o, const char *sub, const json_t *v, uint64_t min,
                uint64_t max, uint64_t *out);
/* Bytes: a number or text with K, M, G or T. A multiple of 4 KiB in min…max. */
int config_size(const struct config_origin *o, const char *sub, const json_t *v, uint64_t min,
                uint64_t max, uint64_t *out);
/* "512M": the largest suffix that is exact. */
void config_format_size(uint64_t size, char out[24]);

/*
 * An object from "first,key=value,key=value,…": first is stored under key first_key unless it has a
 * "=" (first_key NULL: there is no such word). ",," stands for a comma in a value. A key that comes
 * again gets an array. v may be an object already (then it is referenced). keys: those allowed,
 * NULL-terminated; what: "a disk", for messages. *out: a new reference.
 */
int config_object(const struct config_origin *o, const json_t *v, const char *what,
                  const char *first_key, const char *const *keys, json_t **out);
/* Only these keys (NULL-terminated) in the object; what says whose they are: "a tap net". */
int config_only_keys(const struct config_origin *o, const json_t *object, const char *what,
                     const char *const *keys);

/* "52:54:00:12:34:56", a unicast address. */
int config_mac(const struct config_origin *o, const json_t *v, uint8_t mac[6]);
struct net_forward;
/* "tcp:127.0.0.1:2222-:22". */
int config_forward(const struct config_origin *o, const json_t *v, struct net_forward *out);
void config_format_forward(const struct net_forward *f, char out[160]);
/* A console spec: stdio, pty, none, file:PATH, unix:PATH. */
int config_console(const struct config_origin *o, const json_t *v, char **out);

#endif
