/*
 * The device test protocol: drives a machine that has no running vCPU, by lines of text.
 *
 * One request line, one answer line: "OK", "OK 0x…" or "ERR <why>". The grammar is in
 * docs/device-tests.md. With it a test program reads and writes ports, MMIO, guest memory and
 * PCI configuration space, sees and acknowledges interrupts, moves the clock, saves and loads.
 * The machine should have a manual clock (machine_init(m, true)).
 */
#ifndef RINGFORT_VM_DEVTEST_H
#define RINGFORT_VM_DEVTEST_H

struct machine;

/*
 * Serves requests from fd (socket, pipe or terminal; answers go to out_fd, which may be the same) in the
 * machine's event loop until end of file or the request "quit". Machine lock not held by the caller; no other thread runs the
 * loop. The machine's event callback is replaced while this runs, and restored. 0 or a negative errno (logged).
 */
int devtest_run_fds(struct machine *m, int fd, int out_fd);

/* The same with one socket for both ways. */
int devtest_run(struct machine *m, int fd);

/* Listens on a Unix socket at path, serves one client after the other until "quit". 0 or a negative errno (logged). */
int devtest_serve(struct machine *m, const char *path);

#endif
