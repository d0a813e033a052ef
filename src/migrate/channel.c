/*
 * Sockets with bounded waits, and TLS on them; see channel.h.
 *
 * Sockets do not block: each transfer is tried, and poll() waits for the next chance. Aborting shuts the socket down, which
 * ends a poll() in another thread; the flag then says whose doing it was.
 */
#include "migrate/channel.h"

#include <errno.h>
#include <fcntl.h>
#include <gnutls/gnutls.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "base/util.h"

/* Ciphers and versions: TLS 1.3 alone, since both ends are ours. */
#define PRIORITIES "NORMAL:-VERS-ALL:+VERS-TLS1.3"

struct channel_tls {
    gnutls_certificate_credentials_t credentials;
};

struct channel {
    int fd;
    gnutls_session_t session;   /* NULL: no TLS, or not yet */
    struct channel_tls *tls;    /* an accepted connection's, until its handshake */
    unsigned connect_ms, idle_ms;
    uint64_t deadline;          /* now_ms(); 0: none */
    _Atomic bool aborted;
    _Atomic uint64_t bytes;
    pthread_mutex_t sending;    /* one thread at a time */
    char error[CHANNEL_ERROR_MAX];
};

struct channel_listener {
    int fd, wake[2];
    unsigned port;
    char path[sizeof(((struct sockaddr_un *)0)->sun_path)];     /* "": not a Unix socket */
};

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- addresses ---- */

struct address {
    bool is_unix;
    char host[256], port[8];
    struct sockaddr_un un;
};

static int parse(const char *text, struct address *a, char error[CHANNEL_ERROR_MAX])
{
    memset(a, 0, sizeof(*a));
    if (strncmp(text, "unix:", 5) == 0) {
        a->is_unix = true;
        a->un.sun_family = AF_UNIX;
        if (!text[5] || strlen(text + 5) >= sizeof(a->un.sun_path)) {
            snprintf(error, CHANNEL_ERROR_MAX, "'%.150s': the path of a Unix socket has 1 to %zu characters", text,
                     sizeof(a->un.sun_path) - 1);
            return -EINVAL;
        }
        strcpy(a->un.sun_path, text + 5);
        return 0;
    }
    if (strncmp(text, "tcp:", 4) == 0) {
        const char *host = text + 4, *colon = strrchr(host, ':');
        size_t len = colon ? (size_t)(colon - host) : 0;
        char *end;
        unsigned long port = colon ? strtoul(colon + 1, &end, 10) : 0;

        if (len >= 2 && host[0] == '[' && host[len - 1] == ']') {
            host++;
            len -= 2;
        } else if (memchr(host, ':', len)) {
            colon = NULL;
        }
        if (colon && colon[1] >= '0' && colon[1] <= '9' && !*end && port <= 65535 && len < sizeof(a->host)) {
            memcpy(a->host, host, len);
            snprintf(a->port, sizeof(a->port), "%lu", port);
            return 0;
        }
    }
    snprintf(error, CHANNEL_ERROR_MAX, "'%.150s' is not an address: it has the form tcp:HOST:PORT or unix:PATH", text);
    return -EINVAL;
}

int channel_check_address(const char *address, char error[CHANNEL_ERROR_MAX])
{
    struct address a;

    return parse(address, &a, error);
}

static void set_up(int fd, bool tcp)
{
    int one = 1, idle = 5, times = 3;
    unsigned user_ms = 20000;

    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    if (!tcp)
        return;
    /* All wishes: without them a dead host is found out later, by the bound on waiting. */
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle, sizeof(idle));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &idle, sizeof(idle));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &times, sizeof(times));
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &user_ms, sizeof(user_ms));
}

static int resolve(const struct address *a, bool listen, struct addrinfo **out, char error[CHANNEL_ERROR_MAX])
{
    struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICSERV | (listen ? AI_PASSIVE : 0) };
    int ret = getaddrinfo(a->host[0] ? a->host : NULL, a->port, &hints, out);

    if (ret) {
        snprintf(error, CHANNEL_ERROR_MAX, "cannot resolve '%.100s': %s", a->host, gai_strerror(ret));
        return -ENOENT;
    }
    return 0;
}

/* ---- listening ---- */

/* True when the path is a socket that nobody answers on. */
static bool is_stale(const struct sockaddr_un *un)
{
    struct stat st;
    bool stale = false;
    int fd;

    if (lstat(un->sun_path, &st) || !S_ISSOCK(st.st_mode))
        return false;
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0) {
        stale = connect(fd, (const struct sockaddr *)un, sizeof(*un)) && errno == ECONNREFUSED;
        close(fd);
    }
    return stale;
}

static int bind_unix(struct channel_listener *l, const struct address *a)
{
    l->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (l->fd < 0)
        return -errno;
    if (is_stale(&a->un))
        unlink(a->un.sun_path);
    /* Nobody but this user is to connect. */
    mode_t mask = umask(0077);
    int ret = bind(l->fd, (const struct sockaddr *)&a->un, sizeof(a->un)) ? -errno : 0;
    umask(mask);
    if (ret)
        return ret;
    strcpy(l->path, a->un.sun_path);
    return listen(l->fd, 32) ? -errno : 0;
}

static int bind_tcp(struct channel_listener *l, const struct addrinfo *list)
{
    int err = -EADDRNOTAVAIL, one = 1;

    for (const struct addrinfo *i = list; i; i = i->ai_next) {
        struct sockaddr_storage bound;
        socklen_t len = sizeof(bound);

        l->fd = socket(i->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
        if (l->fd < 0) {
            err = -errno;
            continue;
        }
        setsockopt(l->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
        if (bind(l->fd, i->ai_addr, i->ai_addrlen) == 0 && listen(l->fd, 32) == 0 &&
            getsockname(l->fd, (struct sockaddr *)&bound, &len) == 0) {
            l->port = ntohs(bound.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&bound)->sin6_port
                                                        : ((struct sockaddr_in *)&bound)->sin_port);
            return 0;
        }
        err = -errno;
        close(l->fd);
        l->fd = -1;
    }
    return err;
}

struct channel_listener *channel_listen(const char *address, char error[CHANNEL_ERROR_MAX])
{
    struct channel_listener *l = calloc(1, sizeof(*l));
    struct addrinfo *list = NULL;
    struct address a;
    int err;

    if (!l) {
        snprintf(error, CHANNEL_ERROR_MAX, "out of memory");
        return NULL;
    }
    l->fd = l->wake[0] = l->wake[1] = -1;
    if (parse(address, &a, error) || (!a.is_unix && resolve(&a, true, &list, error)))
        goto fail;
    err = pipe2(l->wake, O_CLOEXEC | O_NONBLOCK) ? -errno : a.is_unix ? bind_unix(l, &a) : bind_tcp(l, list);
    if (err) {
        snprintf(error, CHANNEL_ERROR_MAX, "cannot listen on '%.150s': %s", address, strerror(-err));
        goto fail;
    }
    if (list)
        freeaddrinfo(list);
    return l;
fail:
    if (list)
        freeaddrinfo(list);
    channel_listener_close(l);
    return NULL;
}

unsigned channel_listener_port(const struct channel_listener *l) { return l->port; }

void channel_listener_close(struct channel_listener *l)
{
    if (!l)
        return;
    if (l->path[0])
        unlink(l->path);
    for (unsigned i = 0; i < 2; i++)
        if (l->wake[i] >= 0)
            close(l->wake[i]);
    if (l->fd >= 0)
        close(l->fd);
    free(l);
}

void channel_listener_abort(struct channel_listener *l)
{
    /* The byte stays in the pipe. */
    if (write(l->wake[1], "", 1) < 0)
        return;
}

int channel_accept(struct channel_listener *l, const struct channel_options *opt, int wait_ms, struct channel **out,
                   char error[CHANNEL_ERROR_MAX])
{
    struct pollfd p[2] = { { .fd = l->fd, .events = POLLIN }, { .fd = l->wake[0], .events = POLLIN } };
    uint64_t until = now_ms() + (uint64_t)(wait_ms > 0 ? wait_ms : 0);

    for (;;) {
        uint64_t now = now_ms();
        int left = wait_ms < 0 ? -1 : until > now ? (int)(until - now) : 0, n = poll(p, 2, left), fd;

        if (n < 0 && errno != EINTR) {
            snprintf(error, CHANNEL_ERROR_MAX, "cannot wait for connections: %s", strerror(errno));
            return -errno;
        }
        if (n > 0 && p[1].revents)
            return -ECANCELED;
        if (n == 0)
            return -ETIMEDOUT;
        fd = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0) {
            /* Connections that went away again, and the like. */
            if (errno != EMFILE && errno != ENFILE && errno != ENOMEM && errno != ENOBUFS)
                continue;
            snprintf(error, CHANNEL_ERROR_MAX, "cannot accept a connection: %s", strerror(errno));
            return -errno;
        }
        set_up(fd, !l->path[0]);
        *out = channel_from_fd(fd, opt->idle_ms);
        if (!*out) {
            snprintf(error, CHANNEL_ERROR_MAX, "out of memory");
            return -ENOMEM;
        }
        (*out)->tls = opt->tls;
        (*out)->connect_ms = opt->connect_ms;
        return 0;
    }
}

/* ---- transfer ---- */

struct channel *channel_from_fd(int fd, unsigned idle_ms)
{
    struct channel *c = calloc(1, sizeof(*c));

    if (!c) {
        close(fd);
        return NULL;
    }
    c->fd = fd;
    c->idle_ms = idle_ms;
    pthread_mutex_init(&c->sending, NULL);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    return c;
}

static int fail(struct channel *c, int err)
{
    if (atomic_load(&c->aborted))
        err = -ECANCELED;
    if (err == -EPIPE)
        err = -ECONNRESET;
    if (err == -ECONNRESET)
        snprintf(c->error, sizeof(c->error), "the other side closed the connection");
    else if (err == -ETIMEDOUT)
        snprintf(c->error, sizeof(c->error), "the other side does not answer");
    else if (err == -ECANCELED)
        snprintf(c->error, sizeof(c->error), "cancelled");
    else
        snprintf(c->error, sizeof(c->error), "%s", strerror(-err));
    return err;
}

static int fail_tls(struct channel *c, int ret)
{
    if (atomic_load(&c->aborted) || ret == GNUTLS_E_PUSH_ERROR || ret == GNUTLS_E_PULL_ERROR ||
        ret == GNUTLS_E_PREMATURE_TERMINATION)
        return fail(c, -ECONNRESET);
    if (ret == GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR) {
        gnutls_datum_t text;

        if (gnutls_certificate_verification_status_print(gnutls_session_get_verify_cert_status(c->session), GNUTLS_CRT_X509,
                                                         &text, 0) == 0) {
            snprintf(c->error, sizeof(c->error), "TLS: the other side's certificate is not acceptable: %.180s",
                     (const char *)text.data);
            gnutls_free(text.data);
            return -EPROTO;
        }
    }
    if (ret == GNUTLS_E_FATAL_ALERT_RECEIVED)
        snprintf(c->error, sizeof(c->error), "TLS: the other side refuses: %s",
                 gnutls_alert_get_name(gnutls_alert_get(c->session)));
    else
        snprintf(c->error, sizeof(c->error), "TLS: %s", gnutls_strerror(ret));
    return -EPROTO;
}

/* Until the socket is ready. 0, or a negative errno. until: now_ms(), 0: no bound. */
static int wait_for(struct channel *c, short events, uint64_t until)
{
    struct pollfd p = { .fd = c->fd, .events = events };

    if (c->deadline && (!until || until > c->deadline))
        until = c->deadline;
    for (;;) {
        uint64_t now = now_ms();
        int n;

        if (atomic_load(&c->aborted))
            return -ECANCELED;
        n = poll(&p, 1, !until ? -1 : until > now ? (int)MIN(until - now, 1000000u) : 0);
        if (n > 0)
            return 0;
        if (n < 0 && errno != EINTR)
            return -errno;
        if (n == 0 && until && now_ms() >= until)
            return -ETIMEDOUT;
    }
}

/* One try: bytes, 0 for "not now" with the events to wait for, or a negative errno (told). */
static ssize_t try_send(struct channel *c, void *data, size_t len, short *events)
{
    ssize_t n;

    *events = POLLOUT;
    if (!c->session) {
        n = send(c->fd, data, len, MSG_NOSIGNAL);
        if (n >= 0)
            return n;
        return errno == EAGAIN || errno == EINTR ? 0 : fail(c, -errno);
    }
    n = gnutls_record_send(c->session, data, len);
    if (n >= 0)
        return n;
    if (n == GNUTLS_E_AGAIN || n == GNUTLS_E_INTERRUPTED) {
        *events = gnutls_record_get_direction(c->session) ? POLLOUT : POLLIN;
        return 0;
    }
    return fail_tls(c, (int)n);
}

static ssize_t try_recv(struct channel *c, void *data, size_t len, short *events)
{
    ssize_t n;

    *events = POLLIN;
    if (!c->session) {
        n = recv(c->fd, data, len, 0);
        if (n > 0)
            return n;
        if (n == 0)
            return fail(c, -ECONNRESET);
        return errno == EAGAIN || errno == EINTR ? 0 : fail(c, -errno);
    }
    n = gnutls_record_recv(c->session, data, len);
    if (n > 0)
        return n;
    if (n == 0)
        return fail(c, -ECONNRESET);
    if (n == GNUTLS_E_AGAIN || n == GNUTLS_E_INTERRUPTED) {
        *events = gnutls_record_get_direction(c->session) ? POLLOUT : POLLIN;
        return 0;
    }
    return fail_tls(c, (int)n);
}

/* All of it by one of the two above. */
static int transfer(struct channel *c, uint8_t *p, size_t len, ssize_t (*attempt)(struct channel *, void *, size_t, short *))
{
    while (len) {
        short events;
        ssize_t n = attempt(c, p, len, &events);
        int err = n < 0 ? (int)n : 0;

        if (n == 0 && (err = wait_for(c, events, c->idle_ms ? now_ms() + c->idle_ms : 0)))
            err = fail(c, err);
        if (err)
            return err;
        atomic_fetch_add_explicit(&c->bytes, (uint64_t)n, memory_order_relaxed);
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

int channel_send_parts(struct channel *c, const struct iovec *part, unsigned parts)
{
    int err = 0;

    pthread_mutex_lock(&c->sending);
    for (unsigned i = 0; i < parts && !err; i++)
        err = transfer(c, part[i].iov_base, part[i].iov_len, try_send);
    pthread_mutex_unlock(&c->sending);
    return err;
}

int channel_send(struct channel *c, const void *data, size_t len)
{
    return channel_send_parts(c, &(struct iovec){ (void *)data, len }, 1);
}

int channel_recv(struct channel *c, void *data, size_t len) { return transfer(c, data, len, try_recv); }

int channel_wait(struct channel *c, int wait_ms)
{
    int err;

    if (c->session && gnutls_record_check_pending(c->session))
        return 1;
    err = wait_for(c, POLLIN, wait_ms < 0 ? 0 : now_ms() + (uint64_t)wait_ms);
    return err == -ETIMEDOUT ? 0 : err ? fail(c, err) : 1;
}

void channel_set_deadline(struct channel *c, unsigned ms) { c->deadline = ms ? now_ms() + ms : 0; }
const char *channel_error(const struct channel *c) { return c->error; }
uint64_t channel_bytes(const struct channel *c) { return atomic_load_explicit(&c->bytes, memory_order_relaxed); }

void channel_abort(struct channel *c)
{
    atomic_store(&c->aborted, true);
    shutdown(c->fd, SHUT_RDWR);
}

void channel_close(struct channel *c)
{
    if (!c)
        return;
    if (c->session)
        gnutls_deinit(c->session);
    close(c->fd);
    pthread_mutex_destroy(&c->sending);
    free(c);
}

/* ---- TLS ---- */

struct channel_tls *channel_tls_load(const char *dir, char error[CHANNEL_ERROR_MAX])
{
    struct channel_tls *t = calloc(1, sizeof(*t));
    char ca[4096], cert[4096], key[4096];
    int ret;

    if (!t || gnutls_certificate_allocate_credentials(&t->credentials) < 0) {
        snprintf(error, CHANNEL_ERROR_MAX, "out of memory");
        free(t);
        return NULL;
    }
    if (snprintf(ca, sizeof(ca), "%s/ca.pem", dir) >= (int)sizeof(ca) ||
        snprintf(cert, sizeof(cert), "%s/cert.pem", dir) >= (int)sizeof(cert) ||
        snprintf(key, sizeof(key), "%s/key.pem", dir) >= (int)sizeof(key)) {
        snprintf(error, CHANNEL_ERROR_MAX, "the name of the folder with certificates is too long");
        goto fail;
    }
    ret = gnutls_certificate_set_x509_trust_file(t->credentials, ca, GNUTLS_X509_FMT_PEM);
    if (ret <= 0) {
        snprintf(error, CHANNEL_ERROR_MAX, "no certificate of an authority in '%.150s': %s", ca,
                 ret ? gnutls_strerror(ret) : "the file has none");
        goto fail;
    }
    ret = gnutls_certificate_set_x509_key_file(t->credentials, cert, key, GNUTLS_X509_FMT_PEM);
    if (ret < 0) {
        snprintf(error, CHANNEL_ERROR_MAX, "cannot use '%.90s' with '%.90s': %s", cert, key, gnutls_strerror(ret));
        goto fail;
    }
    return t;
fail:
    channel_tls_free(t);
    return NULL;
}

void channel_tls_free(struct channel_tls *t)
{
    if (!t)
        return;
    gnutls_certificate_free_credentials(t->credentials);
    free(t);
}

/* host: that the other side's certificate has to be for; NULL: any that the authority signed. */
static int tls_handshake(struct channel *c, struct channel_tls *tls, bool server, const char *host)
{
    uint64_t until = now_ms() + c->connect_ms;
    int ret = gnutls_init(&c->session, (server ? GNUTLS_SERVER : GNUTLS_CLIENT) | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL);

    if (ret < 0) {
        c->session = NULL;
        return fail(c, -ENOMEM);
    }
    ret = gnutls_priority_set_direct(c->session, PRIORITIES, NULL);
    if (ret >= 0)
        ret = gnutls_credentials_set(c->session, GNUTLS_CRD_CERTIFICATE, tls->credentials);
    if (ret < 0)
        return fail_tls(c, ret);
    if (server)
        gnutls_certificate_server_set_request(c->session, GNUTLS_CERT_REQUIRE);
    gnutls_session_set_verify_cert(c->session, host, 0);
    gnutls_transport_set_int(c->session, c->fd);
    while ((ret = gnutls_handshake(c->session)) < 0) {
        int err;

        if (ret != GNUTLS_E_AGAIN && ret != GNUTLS_E_INTERRUPTED) {
            if (gnutls_error_is_fatal(ret)) {
                int told = fail_tls(c, ret);

                gnutls_alert_send_appropriate(c->session, ret);
                if (told == -ECONNRESET)
                    snprintf(c->error, sizeof(c->error), "TLS: the other side closed the connection: does it use TLS, too?");
                return told;
            }
            continue;
        }
        err = wait_for(c, gnutls_record_get_direction(c->session) ? POLLOUT : POLLIN, until);
        if (err)
            return fail(c, err);
    }
    return 0;
}

int channel_handshake(struct channel *c)
{
    struct channel_tls *tls = c->tls;

    c->tls = NULL;
    return tls ? tls_handshake(c, tls, true, NULL) : 0;
}

/* ---- connecting ---- */

static int connect_bounded(const struct sockaddr *to, socklen_t len, int family, unsigned ms, int *out)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), err = 0;
    socklen_t errlen = sizeof(err);

    if (fd < 0)
        return -errno;
    if (connect(fd, to, len)) {
        struct pollfd p = { .fd = fd, .events = POLLOUT };

        if (errno != EINPROGRESS)
            err = errno;
        else if (poll(&p, 1, (int)ms) <= 0)
            err = ETIMEDOUT;
        else if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &errlen))
            err = errno;
    }
    if (err) {
        close(fd);
        return -err;
    }
    *out = fd;
    return 0;
}

struct channel *channel_connect(const char *address, const struct channel_options *opt, char error[CHANNEL_ERROR_MAX])
{
    struct addrinfo *list = NULL;
    struct channel *c;
    struct address a;
    int fd = -1, err = -EADDRNOTAVAIL;

    if (parse(address, &a, error) || (!a.is_unix && resolve(&a, false, &list, error)))
        return NULL;
    if (a.is_unix)
        err = connect_bounded((const struct sockaddr *)&a.un, sizeof(a.un), AF_UNIX, opt->connect_ms, &fd);
    for (const struct addrinfo *i = list; i && fd < 0; i = i->ai_next)
        err = connect_bounded(i->ai_addr, i->ai_addrlen, i->ai_family, opt->connect_ms, &fd);
    if (list)
        freeaddrinfo(list);
    if (fd < 0) {
        snprintf(error, CHANNEL_ERROR_MAX, "cannot connect to '%.150s': %s", address, strerror(-err));
        return NULL;
    }
    set_up(fd, !a.is_unix);
    c = channel_from_fd(fd, opt->idle_ms);
    if (!c) {
        snprintf(error, CHANNEL_ERROR_MAX, "out of memory");
        return NULL;
    }
    c->connect_ms = opt->connect_ms;
    if (opt->tls && tls_handshake(c, opt->tls, false, a.is_unix ? NULL : a.host)) {
        snprintf(error, CHANNEL_ERROR_MAX, "%s", c->error);
        channel_close(c);
        return NULL;
    }
    return c;
}
