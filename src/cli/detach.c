/* Leaving the terminal behind; detach.h says when. One thread. */
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/log.h"
#include "cli/cli.h"
#include "cli/detach.h"
#include "vm/control/registry.h"
#include "vm/status.h"

/* In the parent: until the machine runs, or its process has ended. */
static int await_child(int fd, pid_t pid, const char *name)
{
    char ready;
    ssize_t n;
    int status;

    do
        n = read(fd, &ready, 1);
    while (n < 0 && errno == EINTR);
    if (n == 1) {
        char line[REGISTRY_MAX_NAME + 2];
        snprintf(line, sizeof(line), "%s\n", name);
        return cli_print(line);
    }
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            return VM_STATUS_HOST;
    if (WIFEXITED(status))
        return WEXITSTATUS(status) ? WEXITSTATUS(status) : VM_STATUS_HOST;
    log_error("the machine's process was killed by signal %d while it started", WTERMSIG(status));
    return VM_STATUS_HOST;
}

static int use_null(void)
{
    int null = open("/dev/null", O_RDWR);
    int err = null < 0 || dup2(null, STDIN_FILENO) < 0 || dup2(null, STDOUT_FILENO) < 0 ? -errno : 0;

    if (null > STDERR_FILENO)
        close(null);
    return err;
}

bool detach_begin(struct detach *d, const char *name, int *status)
{
    int pipe_fd[2];

    d->ready_fd = -1;
    *status = vm_status_of(registry_log_path(name, "log", true, d->log, sizeof(d->log)));
    if (*status)
        return true;
    if (pipe2(pipe_fd, O_CLOEXEC) < 0) {
        *status = vm_status_of(-errno);
        log_error("--detach: cannot make a pipe: %s", strerror(errno));
        return true;
    }
    fflush(stdout);
    pid_t pid = fork();
    if (pid < 0) {
        *status = vm_status_of(-errno);
        log_error("--detach: cannot start a process: %s", strerror(errno));
        close(pipe_fd[0]);
        close(pipe_fd[1]);
        return true;
    }
    if (pid) {
        close(pipe_fd[1]);
        *status = await_child(pipe_fd[0], pid, name);
        close(pipe_fd[0]);
        return true;
    }
    close(pipe_fd[0]);
    d->ready_fd = pipe_fd[1];
    setsid();
    int err = use_null();
    if (err)
        log_warn("--detach: cannot open /dev/null: %s", strerror(-err));
    return false;
}

int detach_ready(struct detach *d)
{
    char older[sizeof(d->log) + 8];
    ssize_t n;

    snprintf(older, sizeof(older), "%s.old", d->log);
    rename(d->log, older);
    int fd = open(d->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW | O_NOCTTY, 0600);
    if (fd < 0) {
        int err = errno;
        log_error("--detach: cannot write %s: %s; set XDG_STATE_HOME to a folder of yours", d->log, strerror(err));
        return -err;
    }
    dup2(fd, STDERR_FILENO);
    close(fd);
    log_set_times(true);
    do
        n = write(d->ready_fd, "", 1);
    while (n < 0 && errno == EINTR);
    close(d->ready_fd);
    d->ready_fd = -1;
    return 0;
}
