/* See snapshot_store.h for the folders; the list and the end of snapshots. */
#include "vm/snapshot_store.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "memory/memory.h"
#include "vm/config_value.h"
#include "vm/snapshot.h"

#define NEWEST_VERSION 2
#define REGION_ALIGN MIB(2)
#define MAX_META MIB(1)

uint64_t snapshot_region_offset(const struct memory *m, unsigned region)
{
    uint64_t offset = 0;

    for (unsigned i = 0; i < region; i++)
        offset += align_up(m->region[i].size, REGION_ALIGN);
    return offset;
}

int snapshot_check_name(const char *name)
{
    size_t len = strlen(name);
    bool ok = len > 0 && len < VM_SNAPSHOT_NAME_MAX && name[0] != '.' && name[0] != '-';

    for (size_t i = 0; i < len; i++)
        ok = ok && (isalnum((unsigned char)name[i]) || strchr("-_.", name[i]));
    if (ok)
        return 0;
    log_error("%s cannot be the name of a snapshot: use 1 to %d letters, digits, '-', '_' and '.', as before-upgrade",
              config_quote(name), VM_SNAPSHOT_NAME_MAX - 1);
    return -EINVAL;
}

static int make_folders(char *path)
{
    for (char *p = path + 1;; p++) {
        char c = *p;

        if (c && c != '/')
            continue;
        *p = 0;
        int r = mkdir(path, 0700);
        *p = c;
        if (r < 0 && errno != EEXIST)
            return -errno;
        if (!c)
            return 0;
    }
}

int snapshot_open_root(const char *kind, char path[PATH_MAX])
{
    const char *data = getenv("XDG_DATA_HOME"), *home = getenv("HOME");
    int n, fd, err;

    if (data && *data == '/')
        n = snprintf(path, PATH_MAX, "%s/ringfort/%s", data, kind);
    else if (home && *home == '/')
        n = snprintf(path, PATH_MAX, "%s/.local/share/ringfort/%s", home, kind);
    else {
        log_error("no place for %s: set XDG_DATA_HOME or HOME to a folder", kind);
        return -ENOENT;
    }
    err = n >= PATH_MAX ? -ENAMETOOLONG : make_folders(path);
    fd = err ? -1 : open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (!err && fd < 0)
        err = -errno;
    if (err)
        log_error("%s: cannot open this folder: %s", path, strerror(-err));
    return err ? err : fd;
}

/* What is there of a machine of that name gets out of the way. */
static int keep_former(int root, const char *root_path, const char *name)
{
    char kept[256];
    time_t now = time(NULL);

    for (unsigned i = 0; i < 1000; i++) {
        snprintf(kept, sizeof(kept), "%.128s.until-%lld-%u", name, (long long)now, i);
        if (renameat(root, name, root, kept) == 0) {
            log_warn("the disks of the former machine %s are kept in %s/%s; remove that folder when nobody needs them", name,
                     root_path, kept);
            return 0;
        }
        if (errno == ENOENT)
            return 0;
        if (errno != EEXIST && errno != ENOTEMPTY)
            break;
    }
    return -errno;
}

/* Removes what was never finished, and the folder if there was nothing else. */
static void remove_partial(int root, const char *name)
{
    int fd = openat(root, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    const size_t suffix = strlen(SNAPSHOT_PARTIAL);

    if (!dir) {
        if (fd >= 0)
            close(fd);
        return;
    }
    for (struct dirent *e; (e = readdir(dir));) {
        size_t len = strlen(e->d_name);

        if (len > suffix && strcmp(e->d_name + len - suffix, SNAPSHOT_PARTIAL) == 0)
            unlinkat(fd, e->d_name, 0);
    }
    closedir(dir);
    unlinkat(root, name, AT_REMOVEDIR);
}

int snapshot_make_machine_folder(const char *name, char path[PATH_MAX])
{
    char root_path[PATH_MAX];
    int root = snapshot_open_root("machines", root_path), fd = -1, err;

    if (root < 0)
        return root;
    snprintf(path, PATH_MAX, "%.2000s/%.128s", root_path, name);
    remove_partial(root, name);
    err = keep_former(root, root_path, name);
    if (!err && mkdirat(root, name, 0700) < 0)
        err = -errno;
    if (!err)
        fd = openat(root, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (!err && fd < 0)
        err = -errno;
    close(root);
    if (err)
        log_error("%s: cannot make this folder: %s", path, strerror(-err));
    return err ? err : fd;
}

int snapshot_remove_tree(int dirfd, const char *name)
{
    int fd = openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), err = 0;
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);

    if (!dir) {
        err = -errno;
        if (fd >= 0)
            close(fd);
        return err;
    }
    for (struct dirent *e; (e = readdir(dir));) {
        if (strcmp(e->d_name, ".") == 0 || strcmp(e->d_name, "..") == 0)
            continue;
        if (unlinkat(fd, e->d_name, 0) < 0 && errno != ENOENT)
            err = -errno;
    }
    closedir(dir);
    if (!err && unlinkat(dirfd, name, AT_REMOVEDIR) < 0)
        err = -errno;
    return err;
}

int snapshot_link_bases(int from, int to, const char *path)
{
    int fd = openat(from, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), err = 0;
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);

    if (!dir) {
        err = -errno;
        if (fd >= 0)
            close(fd);
    }
    for (struct dirent *e; dir && !err && (e = readdir(dir));)
        if (strncmp(e->d_name, SNAPSHOT_BASE_PREFIX, strlen(SNAPSHOT_BASE_PREFIX)) == 0 &&
            linkat(from, e->d_name, to, e->d_name, 0) < 0 && errno != EEXIST)
            err = -errno;
    if (dir)
        closedir(dir);
    if (err)
        log_error("%s: cannot link the files below its disks: %s", path, strerror(-err));
    return err;
}

void snapshot_sweep(int root)
{
    int fd = openat(root, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);

    if (!dir) {
        if (fd >= 0)
            close(fd);
        return;
    }
    for (struct dirent *e; (e = readdir(dir));) {
        int one;

        if (strncmp(e->d_name, ".new-", 5) != 0 && strncmp(e->d_name, ".old-", 5) != 0)
            continue;
        one = openat(root, e->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        if (one >= 0 && flock(one, LOCK_EX | LOCK_NB) == 0)
            snapshot_remove_tree(root, e->d_name);
        if (one >= 0)
            close(one);
    }
    closedir(dir);
}

int snapshot_write_meta(int dirfd, const char *path, const json_t *meta)
{
    int fd = openat(dirfd, SNAPSHOT_META, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600), err = 0;

    if (fd < 0)
        err = -errno;
    else if (json_dumpfd(meta, fd, JSON_INDENT(2)) < 0 || write(fd, "\n", 1) != 1 || fsync(fd) < 0)
        err = errno ? -errno : -EIO;
    if (fd >= 0)
        close(fd);
    if (err)
        log_error("%s/%s: cannot write: %s", path, SNAPSHOT_META, strerror(-err));
    return err;
}

/* All of a small file; json_loadfd() would take a system call for each byte. */
static json_t *read_json(int fd)
{
    struct stat st;
    json_t *json = NULL;
    ssize_t n = -1;
    char *text;

    if (fstat(fd, &st) < 0 || !S_ISREG(st.st_mode) || st.st_size > (off_t)MAX_META)
        return NULL;
    text = malloc((size_t)st.st_size + 1);
    if (text)
        n = pread(fd, text, (size_t)st.st_size, 0);
    if (n == st.st_size)
        json = json_loadb(text, (size_t)n, JSON_REJECT_DUPLICATES, NULL);
    free(text);
    return json;
}

json_t *snapshot_read_meta(int root, const char *name, const char *path, bool quiet)
{
    char file[VM_SNAPSHOT_NAME_MAX + 32];
    json_int_t version;
    json_t *meta = NULL;
    int fd;

    snprintf(file, sizeof(file), "%.*s/%s", VM_SNAPSHOT_NAME_MAX, name, SNAPSHOT_META);
    fd = openat(root, file, O_RDONLY | O_CLOEXEC);
    if (fd >= 0)
        meta = read_json(fd);
    if (fd >= 0)
        close(fd);
    version = json_integer_value(json_object_get(meta, "version"));
    if (meta && json_is_object(meta) && version >= 1 && version <= NEWEST_VERSION)
        return meta;
    if (!quiet && fd < 0)
        log_error("there is no snapshot %s in %s; 'ringfort snapshot ls' shows those that there are", name, path);
    else if (!quiet && meta && version > NEWEST_VERSION)
        log_error("%s/%s: made by a newer ringfort: use that one", path, file);
    else if (!quiet)
        log_error("%s/%s: this does not describe a snapshot; it is damaged", path, file);
    json_decref(meta);
    return NULL;
}

static void copy_text(char *to, size_t size, const json_t *meta, const char *key)
{
    const char *text = json_string_value(json_object_get(meta, key));

    snprintf(to, size, "%s", text ? text : "");
}

static uint64_t stored_bytes(int root, const char *name)
{
    int fd = openat(root, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *dir = fd < 0 ? NULL : fdopendir(fd);
    uint64_t sum = 0;
    struct stat st;

    if (!dir) {
        if (fd >= 0)
            close(fd);
        return 0;
    }
    for (struct dirent *e; (e = readdir(dir));)
        if (e->d_name[0] != '.' && fstatat(fd, e->d_name, &st, AT_SYMLINK_NOFOLLOW) == 0)
            sum += (uint64_t)st.st_blocks * 512;
    closedir(dir);
    return sum;
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct vm_snapshot_info *)a)->name, ((const struct vm_snapshot_info *)b)->name);
}

static void describe(int root, const char *name, const json_t *meta, struct vm_snapshot_info *s)
{
    memset(s, 0, sizeof(*s));
    snprintf(s->name, sizeof(s->name), "%s", name);
    copy_text(s->machine, sizeof(s->machine), meta, "machine");
    copy_text(s->created, sizeof(s->created), meta, "created");
    copy_text(s->engine, sizeof(s->engine), meta, "engine");
    s->memory = (uint64_t)json_integer_value(json_object_get(meta, "memory"));
    s->cpus = (unsigned)json_integer_value(json_object_get(meta, "cpus"));
    s->disks = (unsigned)json_array_size(json_object_get(meta, "disks"));
    s->stored = stored_bytes(root, name);
}

int vm_snapshot_list(struct vm_snapshot_info **list, unsigned *count)
{
    char path[PATH_MAX];
    int root = snapshot_open_root("snapshots", path), err = 0;
    DIR *dir;

    *list = NULL;
    *count = 0;
    if (root < 0)
        return root;
    dir = fdopendir(root);
    for (struct dirent *e; dir && (e = readdir(dir));) {
        struct vm_snapshot_info *more;
        json_t *meta;

        if (e->d_name[0] == '.' || strlen(e->d_name) >= VM_SNAPSHOT_NAME_MAX)
            continue;
        meta = snapshot_read_meta(root, e->d_name, path, true);
        if (!meta)
            continue;
        more = realloc(*list, (*count + 1) * sizeof(**list));
        if (more) {
            *list = more;
            describe(root, e->d_name, meta, &more[(*count)++]);
        } else {
            err = -ENOMEM;
        }
        json_decref(meta);
    }
    if (dir)
        closedir(dir);
    else
        close(root);
    if (err)
        log_error("out of memory");
    else if (*count)
        qsort(*list, *count, sizeof(**list), by_name);
    return err;
}

int vm_snapshot_remove(const char *name)
{
    char path[PATH_MAX], old[VM_SNAPSHOT_NAME_MAX + 32];
    int err = snapshot_check_name(name), root;

    if (err)
        return err;
    root = snapshot_open_root("snapshots", path);
    if (root < 0)
        return root;
    /* Away at once or not at all: a removal that is killed leaves nothing that looks like a snapshot. */
    snprintf(old, sizeof(old), ".old-%s-%ld", name, (long)getpid());
    if (renameat(root, name, root, old) < 0)
        err = -errno;
    if (err == -ENOENT)
        log_error("there is no snapshot %s; 'ringfort snapshot ls' shows those that there are", name);
    else if (err)
        log_error("%s/%s: cannot remove: %s", path, name, strerror(-err));
    if (!err && (err = snapshot_remove_tree(root, old)))
        log_error("%s/%s: cannot remove all of it: %s", path, old, strerror(-err));
    close(root);
    return err;
}
