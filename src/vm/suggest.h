/* "Did you mean …?": the known word that a mistyped one is nearest to. Pure functions, any thread.
 */
#ifndef RINGFORT_VM_SUGGEST_H
#define RINGFORT_VM_SUGGEST_H

#include <stddef.h>

/* Insertions, deletions, replacements and swaps of neighbours that turn a into b. Words are cut at
 * 63 bytes. */
unsigned suggest_distance(const char *a, const char *b);
/*
 * The nearest of names (NULL-terminated), or NULL when none is near enough to be what was meant:
 * about a third of its letters may differ, or one of the two begins with the other.
 */
const char *suggest_nearest(const char *word, const char *const *names);

#endif
