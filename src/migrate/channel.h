/*
 * Connections between the two hosts of a migration: bytes in order, over TCP or a Unix socket, encrypted if asked.
 *
 * An address is "tcp:HOST:PORT" (HOST a name, IPv4, or IPv6 in brackets; when listening empty for all) or "unix:PATH".
 * With TLS both sides show a certificate of the authority that both trust, and the connecting side wants the other's
 * to be for HOST.
 *
 * Every wait is bounded: a peer that neither takes nor gives a byte for idle_ms is as good as dead (-ETIMEDOUT). One thread
 * sends and one receives at a time; channel_abort() is for any thread. Errors are not logged but told in
 * channel_error(), because only the caller knows what they mean for the machine.
 */
#ifndef RINGFORT_MIGRATE_CHANNEL_H
#define RINGFORT_MIGRATE_CHANNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

struct channel;
struct channel_listener;
struct channel_tls;

#define CHANNEL_ERROR_MAX 512

/* What both ends of a connection, and listeners, are made with. */
struct channel_options {
    struct channel_tls *tls;    /* NULL: in clear. Borrowed */
    unsigned connect_ms;        /* the most that connecting and TLS's handshake may take */
    unsigned idle_ms;           /* 0: no bound */
};

/* dir has ca.pem, cert.pem and key.pem. NULL: error says why. */
struct channel_tls *channel_tls_load(const char *dir, char error[CHANNEL_ERROR_MAX]);
void channel_tls_free(struct channel_tls *t);

/* 0, or -EINVAL with error. For checking what a user typed, before anything is done. */
int channel_check_address(const char *address, char error[CHANNEL_ERROR_MAX]);

/* NULL: error says why. A Unix socket that nobody listens on any more is replaced. */
struct channel_listener *channel_listen(const char *address, char error[CHANNEL_ERROR_MAX]);
/* Port 0 was asked for: the one that was got. 0 for Unix sockets. */
unsigned channel_listener_port(const struct channel_listener *l);
/* Removes the socket's name, too. NULL is allowed. */
void channel_listener_close(struct channel_listener *l);
/* Any thread, for good: accepting ends with -ECANCELED. */
void channel_listener_abort(struct channel_listener *l);
/*
 * Waits at most wait_ms (-1: for ever) for a connection, without TLS's handshake: channel_handshake() makes that, so that a
 * slow stranger is the caller's to place. 0; -ETIMEDOUT, -ECANCELED, or another errno with error.
 */
int channel_accept(struct channel_listener *l, const struct channel_options *opt, int wait_ms, struct channel **out,
                   char error[CHANNEL_ERROR_MAX]);
/* TLS's, if there is TLS, of an accepted connection. 0 or a negative errno (channel_error()). */
int channel_handshake(struct channel *c);
/* Connects, with TLS's handshake. NULL: error says why. */
struct channel *channel_connect(const char *address, const struct channel_options *opt, char error[CHANNEL_ERROR_MAX]);

/* All len bytes, or a negative errno: -ECONNRESET (closed), -ETIMEDOUT, -ECANCELED (aborted), -EPROTO (TLS), … */
int channel_send(struct channel *c, const void *data, size_t len);
/* Any thread: nothing of another one's comes between the parts. */
int channel_send_parts(struct channel *c, const struct iovec *part, unsigned parts);
int channel_recv(struct channel *c, void *data, size_t len);
/* Waits for something to receive: 1, 0 after wait_ms, or a negative errno. */
int channel_wait(struct channel *c, int wait_ms);
/* All of what follows has to be over in ms from now; 0: no such bound any more. */
void channel_set_deadline(struct channel *c, unsigned ms);
/* Of the last call that failed: words to put after "the connection failed: ". */
const char *channel_error(const struct channel *c);
/* Any thread: whoever waits in the channel comes back with an error, now and later. */
void channel_abort(struct channel *c);
void channel_close(struct channel *c);          /* NULL is allowed */
/* Both directions, ever. Any thread. */
uint64_t channel_bytes(const struct channel *c);

/* For tests: a channel over a connected socket, which it owns from then on. NULL: out of memory. */
struct channel *channel_from_fd(int fd, unsigned idle_ms);

#endif
