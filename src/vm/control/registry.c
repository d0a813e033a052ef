/* Names, locks and sockets of the machines that run; registry.h says where they are. */
#include "vm/control/registry.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/log.h"
#include "base/util.h"
#include "vm/config_value.h"
#include "vm/suggest.h"

#define MAX_FOLDERS 2
/* Whoever clears away after a dead machine holds its lock for a moment. */
#define LOCK_TRIES    20
#define LOCK_RETRY_NS 10000000
#define BACKLOG       128

_Static_assert(REGISTRY_MAX_PATH == sizeof(((struct sockaddr_un *)0)->sun_path), "as the kernel has it");

bool registry_name_valid(const char *name)
{
    size_t n = strlen(name);
    return n >= 1 && n <= REGISTRY_MAX_NAME && isalnum((unsigned char)name[0]) &&
           strspn(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-") == n;
}

/* ---- Folders. ---- */

struct folder {
    char path[REGISTRY_MAX_PATH];
};

/* A folder of ours: su keeps the environment of whom it leaves, and root's files in there would be in their way. */
static bool is_own_folder(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode) && st.st_uid == geteuid();
}

static bool add_folder(struct folder *f, unsigned *n, const char *fmt, const char *base, unsigned uid)
{
    int len = snprintf(f[*n].path, sizeof(f->path), fmt, base, uid);
    if (len < 0 || (size_t)len >= sizeof(f->path))
        return false;
    ++*n;
    return true;
}

/*
 * Where machines may be; the first is where new ones go. A session has its own runtime folder and a service
 * has none: unless the user chose a folder, either finds the other's machines.
 */
static unsigned folders(struct folder f[MAX_FOLDERS])
{
    const char *xdg = getenv("XDG_RUNTIME_DIR");
    unsigned uid = geteuid(), n = 0;
    char session[64];

    snprintf(session, sizeof(session), "/run/user/%u", uid);
    bool chosen = xdg && *xdg == '/' && strcmp(xdg, session) != 0 && is_own_folder(xdg);
    if (chosen && add_folder(f, &n, "%s/ringfort", xdg, 0))
        return n;
    if (is_own_folder(session))
        add_folder(f, &n, "%s/ringfort", session, 0);
    if (uid == 0)
        add_folder(f, &n, "%s", "/run/ringfort", 0);
    else
        add_folder(f, &n, "%s/ringfort-%u", "/tmp", uid);
    return n;
}

/* A folder in /tmp may be somebody else's: whoever owns it could put a socket there and listen to what we type. */
static int check_private(const char *path)
{
    struct stat st;

    if (lstat(path, &st) < 0)
        return -errno;
    if (S_ISDIR(st.st_mode) && st.st_uid == geteuid() && !(st.st_mode & 077))
        return 0;
    log_error("%s is to hold control sockets and must be a folder of yours with mode 0700; move it away, or set "
              "XDG_RUNTIME_DIR",
              path);
    return -EACCES;
}

static int make_private(const char *path)
{
    if (mkdir(path, 0700) < 0 && errno != EEXIST) {
        int err = errno;
        log_error("cannot make %s for control sockets: %s; set XDG_RUNTIME_DIR to a folder of yours", path,
                  strerror(err));
        return -err;
    }
    return check_private(path);
}

/* ---- Locks. ---- */

static bool file_path(char out[REGISTRY_MAX_PATH], const char *folder, const char *name, const char *suffix)
{
    int n = snprintf(out, REGISTRY_MAX_PATH, "%s/%s.%s", folder, name, suffix);
    return n > 0 && n < REGISTRY_MAX_PATH;
}

/* The file that is locked is still the one of that name. */
static bool same_file(int fd, const char *path)
{
    struct stat a, b;
    return fstat(fd, &a) == 0 && stat(path, &b) == 0 && a.st_ino == b.st_ino && a.st_dev == b.st_dev;
}

/* The locked file, -EWOULDBLOCK when another process has it, -ENOENT without create, or another errno. */
static int lock_file(const char *path, bool create)
{
    for (;;) {
        int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | (create ? O_CREAT : 0), 0600);
        if (fd < 0)
            return -errno;
        if (flock(fd, LOCK_EX | LOCK_NB) < 0) {
            int err = errno;
            close(fd);
            return -err;
        }
        if (same_file(fd, path))
            return fd;
        close(fd); /* its former owner has just removed it */
    }
}

static pid_t owner(const char *lock)
{
    char text[32] = "";
    int fd = open(lock, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return 0;
    ssize_t n = read(fd, text, sizeof(text) - 1);
    close(fd);
    return n > 0 ? (pid_t)strtol(text, NULL, 10) : 0;
}

/* True when the machine runs; what a dead one has left is removed. */
static bool is_running(const char *lock, const char *socket)
{
    int fd = lock_file(lock, false);
    if (fd == -ENOENT)
        unlink(socket);
    if (fd < 0)
        return fd == -EWOULDBLOCK;
    unlink(socket);
    unlink(lock);
    close(fd);
    return false;
}

/* ---- Taking a name. ---- */

static int listen_at(const char *path)
{
    struct sockaddr_un addr = {.sun_family = AF_UNIX};
    int err, fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    strcpy(addr.sun_path, path);
    /* The mode of an unbound socket is the mode of the file that bind() makes. */
    if (fd >= 0 && fchmod(fd, 0600) == 0 && bind(fd, (struct sockaddr *)&addr, sizeof(addr)) == 0 &&
        listen(fd, BACKLOG) == 0)
        return fd;
    err = errno;
    log_error("control socket %s: %s", path, strerror(err));
    if (fd >= 0)
        close(fd);
    return -err;
}

static int taken(const char *name, const char *lock)
{
    log_error("a machine named %s runs already (process %d); give another --name, or first: ringfort stop %s", name,
              (int)owner(lock), name);
    return -EBUSY;
}

/* Machines in the other folders have the name, too. */
static int check_elsewhere(const struct folder *f, unsigned n, const char *name)
{
    char lock[REGISTRY_MAX_PATH], socket[REGISTRY_MAX_PATH];

    for (unsigned i = 1; i < n; i++)
        if (file_path(lock, f[i].path, name, "lock") && file_path(socket, f[i].path, name, "sock") &&
            access(lock, F_OK) == 0 && is_running(lock, socket))
            return taken(name, lock);
    return 0;
}

int registry_claim(const char *name, struct registry_claim *out)
{
    struct registry_claim c = {.lock_fd = -1, .listen_fd = -1};
    struct folder f[MAX_FOLDERS];
    unsigned n = folders(f);
    char pid[16];
    int err;

    *out = c;
    if (!n || !file_path(c.lock, f[0].path, name, "lock") || !file_path(c.socket, f[0].path, name, "sock")) {
        log_error("the path of the control socket of %s gets longer than %d characters; give a shorter --name or "
                  "XDG_RUNTIME_DIR",
                  name, REGISTRY_MAX_PATH - 1);
        return -ENAMETOOLONG;
    }
    err = make_private(f[0].path);
    if (!err)
        err = check_elsewhere(f, n, name);
    if (err)
        return err;
    for (unsigned i = 0; i < LOCK_TRIES; i++) {
        c.lock_fd = lock_file(c.lock, true);
        if (c.lock_fd != -EWOULDBLOCK)
            break;
        nanosleep(&(struct timespec){.tv_nsec = LOCK_RETRY_NS}, NULL);
    }
    if (c.lock_fd == -EWOULDBLOCK)
        return taken(name, c.lock);
    if (c.lock_fd < 0) {
        err = c.lock_fd;
        log_error("cannot lock %s: %s", c.lock, strerror(-err));
        return err;
    }
    int len = snprintf(pid, sizeof(pid), "%d\n", (int)getpid());
    if (ftruncate(c.lock_fd, 0) < 0 || pwrite(c.lock_fd, pid, (size_t)len, 0) != len)
        log_warn("cannot write the process id into %s: %s", c.lock, strerror(errno));
    unlink(c.socket); /* a dead machine's */
    c.listen_fd = listen_at(c.socket);
    if (c.listen_fd < 0) {
        err = c.listen_fd;
        c.socket[0] = 0;
        registry_release(&c);
        return err;
    }
    *out = c;
    return 0;
}

void registry_close_socket(struct registry_claim *c)
{
    if (c->listen_fd < 0)
        return;
    unlink(c->socket);
    close(c->listen_fd);
    c->listen_fd = -1;
}

void registry_release(struct registry_claim *c)
{
    registry_close_socket(c);
    if (c->lock_fd >= 0) {
        unlink(c->lock);
        close(c->lock_fd);
    }
    *c = (struct registry_claim){.lock_fd = -1, .listen_fd = -1};
}

/* ---- Looking. ---- */

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct registry_entry *)a)->name, ((const struct registry_entry *)b)->name);
}

/* Adds the running machines of one folder. */
static int list_folder(const char *folder, struct registry_entry **list, unsigned *count)
{
    DIR *d = opendir(folder);
    if (!d)
        return errno == ENOENT || errno == EACCES ? 0 : -errno;
    int err = check_private(folder);
    for (struct dirent *e; !err && (e = readdir(d));) {
        struct registry_entry entry = {0};
        char lock[REGISTRY_MAX_PATH];
        size_t n = strlen(e->d_name);

        if (n <= 5 || n - 5 > REGISTRY_MAX_NAME || strcmp(e->d_name + n - 5, ".sock") != 0)
            continue;
        memcpy(entry.name, e->d_name, n - 5);
        if (!registry_name_valid(entry.name) || !file_path(entry.socket, folder, entry.name, "sock") ||
            !file_path(lock, folder, entry.name, "lock") || !is_running(lock, entry.socket))
            continue;
        entry.pid = owner(lock);
        struct registry_entry *more = reallocarray(*list, *count + 1, sizeof(**list));
        if (!more) {
            err = -ENOMEM;
            log_error("out of memory");
            break;
        }
        *list = more;
        more[(*count)++] = entry;
    }
    closedir(d);
    return err;
}

int registry_list(struct registry_entry **out)
{
    struct folder f[MAX_FOLDERS];
    unsigned n = folders(f), count = 0;

    *out = NULL;
    for (unsigned i = 0; i < n; i++) {
        int err = list_folder(f[i].path, out, &count);
        if (err) {
            free(*out);
            *out = NULL;
            return err;
        }
    }
    if (count)
        qsort(*out, count, sizeof(**out), by_name);
    return (int)count;
}

static int not_found(const char *word, const struct registry_entry *list, int count)
{
    const char **names = calloc((size_t)count + 1, sizeof(*names));
    const char *nearest = NULL;

    for (int i = 0; names && i < count; i++)
        names[i] = list[i].name;
    if (names)
        nearest = suggest_nearest(word, names);
    if (nearest)
        log_error("no machine is called %s; did you mean %s?", config_quote(word), nearest);
    else if (count)
        log_error("no machine is called %s; 'ringfort ls' shows those that run", config_quote(word));
    else
        log_error("no machine is called %s: none runs", config_quote(word));
    free(names);
    return -ENOENT;
}

static int ambiguous(const char *word, const struct registry_entry *list, int count)
{
    char text[256] = "";
    size_t n = 0;

    for (int i = 0; i < count && n < sizeof(text); i++)
        if (strncmp(list[i].name, word, strlen(word)) == 0)
            n += (size_t)snprintf(text + n, sizeof(text) - n, "%s%s", n ? ", " : "", list[i].name);
    log_error("%s may mean %s; give more of the name", config_quote(word), text);
    return -ENOTUNIQ;
}

int registry_find(const char *word, struct registry_entry *out)
{
    struct registry_entry *list;
    int matches = 0, count = registry_list(&list), err = count < 0 ? count : 0;

    for (int i = 0; i < count; i++) {
        if (strcmp(list[i].name, word) == 0) {
            *out = list[i];
            matches = 1;
            break;
        }
        if (*word && strncmp(list[i].name, word, strlen(word)) == 0) {
            *out = list[i];
            matches++;
        }
    }
    if (!err && matches == 0)
        err = not_found(word, list, count);
    else if (!err && matches > 1)
        err = ambiguous(word, list, count);
    free(list);
    return err;
}

int registry_await_end(const struct registry_entry *m, unsigned seconds)
{
    char lock[REGISTRY_MAX_PATH];
    size_t n = strlen(m->socket);
    struct timespec nap = {.tv_nsec = LOCK_RETRY_NS};

    memcpy(lock, m->socket, n - 4);
    strcpy(lock + n - 4, "lock");
    for (uint64_t left = seconds * (1000000000ull / LOCK_RETRY_NS); left; left--) {
        /* Another machine may have the name already. */
        int fd = owner(lock) == m->pid ? lock_file(lock, false) : -ENOENT;
        if (fd >= 0)
            close(fd);
        if (fd != -EWOULDBLOCK)
            return 0;
        nanosleep(&nap, NULL);
    }
    return -ETIMEDOUT;
}

/* ---- Files that stay. ---- */

/* mkdir -p, for the user alone. */
static int make_path(char *path)
{
    for (char *slash = strchr(path + 1, '/');; slash = strchr(slash + 1, '/')) {
        if (slash)
            *slash = 0;
        int r = mkdir(path, 0700) < 0 && errno != EEXIST ? -errno : 0;
        if (slash)
            *slash = '/';
        if (r)
            return r;
        if (!slash)
            return 0;
    }
}

int registry_log_path(const char *name, const char *what, bool make, char *out, size_t size)
{
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    const struct passwd *user = home && *home == '/' ? NULL : getpwuid(geteuid());
    char folder[512];
    int n, err = 0;

    if (user)
        home = user->pw_dir;
    if (state && *state == '/')
        n = snprintf(folder, sizeof(folder), "%s/ringfort", state);
    else if (geteuid() == 0)
        n = snprintf(folder, sizeof(folder), "/var/log/ringfort");
    else
        n = snprintf(folder, sizeof(folder), "%s/.local/state/ringfort", home ? home : "");
    if (n < 0 || (size_t)n >= sizeof(folder) || folder[0] != '/')
        err = -ENAMETOOLONG;
    else if (make)
        err = make_path(folder);
    if (!err && (size_t)snprintf(out, size, "%s/%s.%s", folder, name, what) >= size)
        err = -ENAMETOOLONG;
    if (err)
        log_error("no folder for the machine's logs: %s: %s; set XDG_STATE_HOME to a folder of yours", folder,
                  strerror(-err));
    return err;
}
