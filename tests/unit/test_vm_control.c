/* The parts of a machine's control that need no guest: names, routes and arguments, events, jobs, and the filter for old output. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <cmocka.h>

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/util.h"
#include "cli/terminal.h"
#include "vm/config.h"
#include "vm/control/event.h"
#include "vm/control/job.h"
#include "vm/control/server.h"

static char folder[64];

static int make_folder(void **state)
{
    strcpy(folder, "/tmp/ringfort-control-XXXXXX");
    if (!mkdtemp(folder))
        return -1;
    return setenv("XDG_RUNTIME_DIR", folder, 1);
}

static int remove_folder(void **state)
{
    char command[128];
    snprintf(command, sizeof(command), "rm -rf %s", folder);
    return system(command);
}

/* ---- Names. ---- */

static void names_are_checked(void **state)
{
    char longest[REGISTRY_MAX_NAME + 2];
    memset(longest, 'a', sizeof(longest));
    longest[REGISTRY_MAX_NAME] = 0;
    assert_true(registry_name_valid(longest));
    longest[REGISTRY_MAX_NAME] = 'a';
    longest[REGISTRY_MAX_NAME + 1] = 0;
    assert_false(registry_name_valid(longest));
    assert_true(registry_name_valid("web-1.example_2"));
    assert_true(registry_name_valid("7"));
    for (const char **bad = (const char *[]){"", ".", "..", "-x", "a/b", "../a", "a b", "a\n", "\xc3\xa4", NULL}; *bad; bad++)
        assert_false(registry_name_valid(*bad));
}

static int count_running(void)
{
    struct registry_entry *list;
    int n = registry_list(&list);
    free(list);
    return n;
}

static void a_name_is_taken_once(void **state)
{
    struct registry_claim a, b;
    struct registry_entry m;
    struct stat st;

    assert_int_equal(registry_claim("one", &a), 0);
    assert_int_equal(registry_claim("one", &b), -EBUSY);
    assert_int_equal(registry_claim("one-more", &b), 0);
    assert_int_equal(count_running(), 2);
    assert_int_equal(stat(a.socket, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    char path[80];
    snprintf(path, sizeof(path), "%s/ringfort", folder);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);

    /* The whole name goes before beginnings of others. */
    assert_int_equal(registry_find("one", &m), 0);
    assert_string_equal(m.name, "one");
    assert_int_equal(m.pid, getpid());
    assert_int_equal(registry_find("one-", &m), 0);
    assert_string_equal(m.name, "one-more");
    assert_int_equal(registry_find("on", &m), -ENOTUNIQ);
    assert_int_equal(registry_find("", &m), -ENOENT);
    assert_int_equal(registry_find("two", &m), -ENOENT);

    registry_release(&a);
    registry_release(&a);
    assert_int_equal(count_running(), 1);
    assert_int_equal(registry_find("on", &m), 0);
    registry_release(&b);
    assert_int_equal(count_running(), 0);
    assert_int_equal(registry_await_end(&m, 1), 0);
}

/* What a killed process leaves is no machine, and does not stand in the way of the next one. */
static void the_dead_are_cleared_away(void **state)
{
    struct registry_claim c;
    struct stat st;

    for (int round = 0; round < 2; round++) {
        pid_t pid = fork();
        if (pid == 0) {
            if (registry_claim("dead", &c))
                _exit(1);
            kill(getpid(), SIGKILL);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status));
        char path[128];
        snprintf(path, sizeof(path), "%s/ringfort/dead.sock", folder);
        assert_int_equal(stat(path, &st), 0);
        if (round == 0) {
            assert_int_equal(count_running(), 0);
            assert_int_equal(stat(path, &st), -1);
        } else {
            assert_int_equal(registry_claim("dead", &c), 0);
            assert_int_equal(count_running(), 1);
            registry_release(&c);
        }
    }
}

/* A folder that others may write to could hold their sockets. */
static void foreign_folders_are_refused(void **state)
{
    struct registry_claim c;
    char path[80];

    snprintf(path, sizeof(path), "%s/ringfort", folder);
    mkdir(path, 0700);
    assert_int_equal(chmod(path, 0770), 0);
    assert_int_equal(registry_claim("x", &c), -EACCES);
    assert_int_equal(count_running(), -EACCES);
    assert_int_equal(chmod(path, 0700), 0);
    assert_int_equal(registry_claim("x", &c), 0);
    registry_release(&c);
}

/* ---- Routes and arguments. ---- */

static void routes_are_found(void **state)
{
    const struct control_route *r;
    const char *name;

    assert_int_equal(control_route_find("GET", "/v1/info", &r, &name), 0);
    assert_string_equal(r->path, "/v1/info");
    assert_string_equal(name, "");
    assert_int_equal(control_route_find("GET", "/v1/jobs/12", &r, &name), 0);
    assert_string_equal(name, "12");
    assert_int_equal(control_route_find("DELETE", "/v1/jobs/12", &r, &name), 0);
    assert_string_equal(r->method, "DELETE");
    assert_int_equal(control_route_find("POST", "/v1/info", &r, &name), 405);
    for (const char **bad = (const char *[]){"", "/", "/v1/", "/v1/info/", "/v1/jobs/", "/v1/jobs/1/2", "/v1/inf", "/V1/info", "*", NULL}; *bad; bad++)
        assert_int_equal(control_route_find("GET", *bad, &r, &name), 404);
}

static void arguments_are_checked(void **state)
{
    const struct control_route route = {"POST", "/x", "force timeout text", ROUTE_QUICK, NULL, NULL};
    static const struct {
        const char *json;
        bool good;
        uint64_t timeout;
    } cases[] = {
        {"{}", true, 7},
        {"{\"timeout\": 30}", true, 30},
        {"{\"timeout\": \"30\", \"force\": \"true\", \"text\": \"x\"}", true, 30},
        {"{\"timeout\": 0}", true, 0},
        {"{\"timeout\": -1}", false, 0},
        {"{\"timeout\": 101}", false, 0},
        {"{\"timeout\": 1.5}", false, 0},
        {"{\"timeout\": \"\"}", false, 0},
        {"{\"timeout\": \"3x\"}", false, 0},
        {"{\"timeout\": \" 3\"}", false, 0},
        {"{\"timeout\": \"99999999999999999999\"}", false, 0},
        {"{\"timeout\": null}", false, 0},
        {"{\"force\": 1}", false, 0},
        {"{\"force\": \"yes\"}", false, 0},
        {"{\"text\": 1}", false, 0},
        {"{\"text\": \"a\\u0000b\"}", false, 0},
        {"{\"forse\": true}", false, 0},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        json_t *args = json_loads(cases[i].json, JSON_ALLOW_NUL, NULL), *answer = NULL;
        const struct control_request r = {.name = "", .args = args};
        uint64_t timeout = 7;
        bool force = false;
        const char *text = NULL;

        assert_non_null(args);
        int status = control_route_check(&route, args, &answer);
        if (!status)
            status = control_arg_uint(&r, "timeout", 0, 100, &timeout, &answer);
        if (!status)
            status = control_arg_bool(&r, "force", &force, &answer);
        if (!status)
            status = control_arg_string(&r, "text", &text, &answer);
        assert_int_equal(status, cases[i].good ? 0 : 400);
        if (cases[i].good)
            assert_int_equal(timeout, cases[i].timeout);
        else
            assert_true(json_is_string(json_object_get(answer, "error")));
        json_decref(answer);
        json_decref(args);
    }
}

/* ---- Events. ---- */

static void events_are_numbered_lines(void **state)
{
    struct events *e = events_create();
    uint64_t seq = 0;

    assert_null(events_line(e, &seq));
    events_add(e, "state", json_pack("{s:s}", "state", "paused"));
    events_add(e, "odd", json_pack("{s:s}", "text", "a\nb"));
    char *line = events_line(e, &seq);
    json_t *o = json_loads(line, 0, NULL);
    assert_string_equal(json_string_value(json_object_get(o, "event")), "state");
    assert_string_equal(json_string_value(json_object_get(o, "state")), "paused");
    assert_int_equal(json_integer_value(json_object_get(o, "seq")), 0);
    json_decref(o);
    free(line);
    line = events_line(e, &seq);
    assert_ptr_equal(strchr(line, '\n'), line + strlen(line) - 1);
    free(line);
    assert_null(events_line(e, &seq));
    assert_int_equal(seq, 2);

    /* Who is too slow is told how many it has missed, and goes on with the oldest one. */
    for (unsigned i = 0; i < EVENTS_KEPT + 10; i++)
        events_add(e, "tick", NULL);
    line = events_line(e, &seq);
    o = json_loads(line, 0, NULL);
    assert_string_equal(json_string_value(json_object_get(o, "event")), "lost");
    assert_int_equal(json_integer_value(json_object_get(o, "count")), 10);
    json_decref(o);
    free(line);
    unsigned n = 0;
    while ((line = events_line(e, &seq))) {
        free(line);
        n++;
    }
    assert_int_equal(n, EVENTS_KEPT);
    events_destroy(e);
}

/* ---- Jobs. ---- */

struct gate {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool cancelled, go;
    unsigned ended;
};

static struct gate gate = {.lock = PTHREAD_MUTEX_INITIALIZER, .changed = PTHREAD_COND_INITIALIZER};

static void set(bool *what)
{
    pthread_mutex_lock(&gate.lock);
    *what = true;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.lock);
}

static void job_cancelled(void *opaque) { set(&gate.cancelled); }

static void job_has_ended(void *opaque)
{
    pthread_mutex_lock(&gate.lock);
    gate.ended++;
    pthread_cond_broadcast(&gate.changed);
    pthread_mutex_unlock(&gate.lock);
}

static void await_ended(unsigned n)
{
    pthread_mutex_lock(&gate.lock);
    while (gate.ended < n)
        pthread_cond_wait(&gate.changed, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
}

/* Waits until it is let go or cancelled. */
static int work(struct control_request *r, json_t **answer)
{
    control_job_progress(r->job, json_pack("{s:i}", "percent", 50));
    control_job_on_cancel(r->job, job_cancelled, NULL);
    pthread_mutex_lock(&gate.lock);
    while (!gate.go && !gate.cancelled)
        pthread_cond_wait(&gate.changed, &gate.lock);
    pthread_mutex_unlock(&gate.lock);
    if (control_job_cancelled(r->job))
        return control_refuse(answer, 499, "cancelled");
    *answer = json_pack("{s:O}", "echo", json_object_get(r->args, "text"));
    return 200;
}

static const char *member(const json_t *o, const char *key) { return json_string_value(json_object_get(o, key)); }

static void jobs_run_one_at_a_time(void **state)
{
    const struct control_route route = {"POST", "/v1/things/{name}", "text", ROUTE_JOB, work, NULL};
    struct control c = {.events = events_create()};
    struct control_jobs *jobs = control_jobs_create(&c, job_has_ended, NULL);
    json_t *args = json_pack("{s:s}", "text", "hello"), *answer = NULL;
    const struct control_request r = {.control = &c, .name = "that", .args = args};
    unsigned first, second;

    gate.cancelled = gate.go = false;
    gate.ended = 0;
    assert_int_equal(control_jobs_start(jobs, &route, &r, &first, &answer), 0);
    assert_int_equal(control_jobs_result(jobs, first, &answer), 0);
    assert_int_equal(control_jobs_start(jobs, &route, &r, &second, &answer), 409);
    assert_non_null(strstr(member(answer, "error"), "things"));
    json_decref(answer);
    answer = NULL;
    set(&gate.go);
    await_ended(1);
    assert_int_equal(control_jobs_result(jobs, first, &answer), 200);
    assert_string_equal(member(answer, "echo"), "hello");
    json_decref(answer);
    answer = control_jobs_describe(jobs, first);
    assert_string_equal(member(answer, "state"), "done");
    assert_string_equal(member(answer, "kind"), "things");
    assert_string_equal(member(answer, "name"), "that");
    assert_int_equal(json_integer_value(json_object_get(json_object_get(answer, "progress"), "percent")), 50);
    json_decref(answer);
    answer = NULL;

    /* Cancelling one that has ended changes nothing; one that runs, ends it. */
    assert_int_equal(control_jobs_cancel(jobs, first), 0);
    assert_int_equal(control_jobs_cancel(jobs, 77), 404);
    gate.go = false;
    assert_int_equal(control_jobs_start(jobs, &route, &r, &second, &answer), 0);
    assert_int_equal(control_jobs_cancel(jobs, second), 0);
    await_ended(2);
    assert_int_equal(control_jobs_result(jobs, second, &answer), 499);
    json_decref(answer);
    answer = control_jobs_describe(jobs, second);
    assert_string_equal(member(answer, "state"), "cancelled");
    json_decref(answer);
    answer = control_jobs_list(jobs);
    assert_int_equal(json_array_size(answer), 2);
    json_decref(answer);

    /* The machine ends: what runs is cancelled and waited for, and nothing new begins. */
    answer = NULL;
    gate.cancelled = false;
    assert_int_equal(control_jobs_start(jobs, &route, &r, &second, &answer), 0);
    control_jobs_stop(jobs);
    assert_int_equal(control_jobs_result(jobs, second, &answer), 499);
    json_decref(answer);
    answer = NULL;
    assert_int_equal(control_jobs_start(jobs, &route, &r, &second, &answer), 409);
    json_decref(answer);
    control_jobs_destroy(jobs);

    /* Followers saw each of them begin, get on and end. */
    uint64_t seq = 0;
    unsigned done = 0, cancelled = 0;
    for (char *line; (line = events_line(c.events, &seq));) {
        done += strstr(line, "\"state\":\"done\"") && strstr(line, "\"echo\":\"hello\"");
        cancelled += strstr(line, "\"state\":\"cancelled\"") != NULL;
        free(line);
    }
    assert_int_equal(done, 1);
    assert_int_equal(cancelled, 2);
    events_destroy(c.events);
    json_decref(args);
}

/* ---- Old output on a terminal. ---- */

static void old_questions_are_not_asked_again(void **state)
{
    static const struct {
        const char *in, *out;
    } cases[] = {
        {"plain \xc3\xa4 text\r\n", "plain \xc3\xa4 text\r\n"},
        {"\x1b[1;31mred\x1b[0m\x1b[2J\x1b[H\x1b" "7\x1b(B", "\x1b[1;31mred\x1b[0m\x1b[2J\x1b[H\x1b" "7\x1b(B"},
        {"a\x1b[6nb\x1b[cc\x1b[>0cd\x1bZe\x05" "f\x1b[18tg", "abcdefg"},
        {"a\x1b]0;title\x07" "b\x1b]0;t\x1b\\c\x1bP+q544e\x1b\\d", "abcd"},
        {"a\x1b]never ended\nb", "a\nb"},
    };

    for (unsigned i = 0; i < ARRAY_SIZE(cases); i++) {
        /* However it is cut into pieces. */
        for (size_t piece = 1; piece < 9; piece++) {
            struct terminal_filter f = {0};
            char out[512];
            size_t n = 0, len = strlen(cases[i].in);
            for (size_t at = 0; at < len; at += piece)
                n += terminal_filter(&f, cases[i].in + at, MIN(piece, len - at), out + n);
            out[n] = 0;
            assert_string_equal(out, cases[i].out);
        }
    }

    /* Nothing that it lets through asks anything, whatever comes; and it never writes more than its room. */
    unsigned seed = 1;
    for (unsigned round = 0; round < 20000; round++) {
        static const char alphabet[] = "\x1b\x1b\x1b[[;0?>nctxZP]\\\x07\n\x05" "ab";
        struct terminal_filter f = {0}, again = {0};
        char in[96], out[sizeof(in) + sizeof(f.held)], twice[sizeof(out) + sizeof(f.held)];
        size_t len = round % sizeof(in);
        for (size_t i = 0; i < len; i++) {
            seed = seed * 1103515245u + 12345u;
            in[i] = alphabet[(seed >> 16) % (sizeof(alphabet) - 1)];
        }
        size_t n = terminal_filter(&f, in, len, out);
        assert_in_range(n, 0, len);
        size_t m = terminal_filter(&again, out, n, twice);
        /* What is held back at the end may be gone; nothing else. */
        assert_in_range(n - m, 0, again.state == FILTER_TEXT ? 0 : sizeof(f.held));
        assert_memory_equal(out, twice, m);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(names_are_checked),
        cmocka_unit_test_setup_teardown(a_name_is_taken_once, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(the_dead_are_cleared_away, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(foreign_folders_are_refused, make_folder, remove_folder),
        cmocka_unit_test(routes_are_found),
        cmocka_unit_test(arguments_are_checked),
        cmocka_unit_test(events_are_numbered_lines),
        cmocka_unit_test(jobs_run_one_at_a_time),
        cmocka_unit_test(old_questions_are_not_asked_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
