/* The nearest known word: optimal string alignment distance, case ignored. Pure, any thread. */
#include "vm/suggest.h"

#include <ctype.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "base/util.h"

#define MAX_WORD 63

static bool same(char a, char b)
{
    return tolower((unsigned char)a) == tolower((unsigned char)b);
}

unsigned suggest_distance(const char *a, const char *b)
{
    /* Three rows are enough: a swap looks two rows back. */
    uint8_t row[3][MAX_WORD + 1];
    size_t m = strnlen(a, MAX_WORD), n = strnlen(b, MAX_WORD);

    for (size_t j = 0; j <= n; j++)
        row[0][j] = (uint8_t)j;
    for (size_t i = 1; i <= m; i++) {
        uint8_t *now = row[i % 3], *last = row[(i + 2) % 3], *before = row[(i + 1) % 3];
        now[0] = (uint8_t)i;
        for (size_t j = 1; j <= n; j++) {
            unsigned best = last[j - 1] + !same(a[i - 1], b[j - 1]);
            best = MIN(best, last[j] + 1u);
            best = MIN(best, now[j - 1] + 1u);
            if (i > 1 && j > 1 && same(a[i - 1], b[j - 2]) && same(a[i - 2], b[j - 1]))
                best = MIN(best, before[j - 2] + 1u);
            now[j] = (uint8_t)best;
        }
    }
    return row[m % 3][n];
}

const char *suggest_nearest(const char *word, const char *const *names)
{
    const char *nearest = NULL;
    unsigned least = ~0u;
    size_t len = strlen(word);

    if (len > MAX_WORD)
        return NULL;
    for (; *names; names++) {
        size_t longer = MAX(len, strlen(*names)), shorter = MIN(len, strlen(*names));
        unsigned d = suggest_distance(word, *names);
        bool prefix = shorter >= 2 && strncasecmp(word, *names, shorter) == 0;
        if (d > MAX(longer / 3, (size_t)1) && !prefix)
            continue;
        if (d < least) {
            least = d;
            nearest = *names;
        }
    }
    return nearest;
}
