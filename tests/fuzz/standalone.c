/*
 * Runs a fuzz target without a fuzzer, as a short test that every build can do: each file of the
 * corpus as it is, then mutations of them by a seeded generator.
 *
 * Usage: PROGRAM ROUNDS FOLDER [seed]. Prints the seed; an input that fails leaves its number and
 * seed, which repeat it.
 */
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define INPUT_SIZE 4096
#define MAX_FILES  256

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct input {
    uint8_t data[INPUT_SIZE];
    size_t size;
} corpus[MAX_FILES];
static unsigned corpus_count;
static uint64_t state, seed;
static volatile unsigned long round_number;

/* splitmix64. */
static uint64_t random64(void)
{
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static size_t below(size_t n)
{
    return n ? (size_t)(random64() % n) : 0;
}

static void load(const char *folder)
{
    DIR *dir = opendir(folder);
    struct dirent *entry;
    char path[1024];
    while (dir && (entry = readdir(dir)) && corpus_count < MAX_FILES) {
        snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
        FILE *f = *entry->d_name == '.' ? NULL : fopen(path, "rb");
        if (!f)
            continue;
        corpus[corpus_count].size = fread(corpus[corpus_count].data, 1, INPUT_SIZE, f);
        corpus_count++;
        fclose(f);
    }
    if (dir)
        closedir(dir);
}

/* Copies some bytes of a random file to some offset, overwriting or inserting. */
static void splice_file(struct input *in)
{
    const struct input *from = &corpus[below(corpus_count)];
    size_t start = below(from->size + 1), len = below(from->size - start + 1),
           at = below(in->size + 1);
    len = len > 64 && random64() % 4 ? below(64) : len;
    if (random64() & 1) {
        if (len > INPUT_SIZE - in->size)
            len = INPUT_SIZE - in->size;
        memmove(in->data + at + len, in->data + at, in->size - at);
        in->size += len;
    } else if (len > in->size - at) {
        len = in->size - at;
    }
    memcpy(in->data + at, from->data + start, len);
}

static void mutate(struct input *in)
{
    size_t at = below(in->size), len = below(16);
    switch (random64() % 6) {
    case 0:
        if (in->size)
            in->data[at] ^= (uint8_t)(1u << (random64() % 8));
        break;
    case 1:
        if (in->size)
            in->data[at] = (uint8_t)random64();
        break;
    case 2:
        if (in->size)
            in->data[at] = (uint8_t) "0129-+.eE\"'{}[]:,=xMGK\\/ \0"[random64() % 27];
        break;
    case 3:
        len = len > in->size - at ? in->size - at : len;
        memmove(in->data + at, in->data + at + len, in->size - at - len);
        in->size -= len;
        break;
    default:
        splice_file(in);
    }
}

static void failed(int number)
{
    char text[128];
    int n = snprintf(text, sizeof(text), "signal %d at round %lu of seed %llu\n", number,
                     round_number, (unsigned long long)seed);
    ssize_t ignored = write(STDOUT_FILENO, text, (size_t)n);
    (void)ignored;
    signal(number, SIG_DFL);
    raise(number);
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "Usage: %s ROUNDS FOLDER [seed]\n", argv[0]);
        return 2;
    }
    unsigned long rounds = strtoul(argv[1], NULL, 0);
    load(argv[2]);
    if (!corpus_count) {
        fprintf(stderr, "%s: no files\n", argv[2]);
        return 2;
    }
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    seed = argc > 3 ? strtoull(argv[3], NULL, 0)
                    : (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    state = seed;
    printf("seed %llu, %u files, %lu rounds\n", (unsigned long long)seed, corpus_count, rounds);
    fflush(stdout);
    signal(SIGABRT, failed);
    signal(SIGSEGV, failed);
    /* The target complains about every input; a sanitizer's report would drown. SHOW_ERRORS=1 shows
     * all. */
    int null = open("/dev/null", O_WRONLY);
    if (!getenv("SHOW_ERRORS") && null >= 0)
        dup2(null, STDERR_FILENO);

    for (unsigned i = 0; i < corpus_count; i++)
        LLVMFuzzerTestOneInput(corpus[i].data, corpus[i].size);
    for (; round_number < rounds; round_number++) {
        struct input in = corpus[below(corpus_count)];
        for (size_t n = 1 + below(8); n; n--)
            mutate(&in);
        /* An allocation of its exact size, so that a sanitizer sees each byte too many. */
        uint8_t *exact = malloc(in.size ? in.size : 1);
        if (!exact)
            return 1;
        memcpy(exact, in.data, in.size);
        LLVMFuzzerTestOneInput(exact, in.size);
        free(exact);
    }
    return 0;
}
