"""Runs every test of the project, in parallel where they do not measure time, and counts the results.

Kinds of tests, by the beginning of their names:
  build            the release build has no errors
  unit/ device/ cpu/ cli/ ...   programs that Meson knows, by their suites
  sanitize/...     the unit, device and fuzz tests again, built with ASan and UBSan
  boot/ENGINE/...  real kernels and the Debian server (tests/boot/run)
Each test's output is build/logs/NAME.log; that of one which is not done in time ends with its threads' stacks. The end of
the logs of failed tests is repeated before the last line, which is "N passed, N failed", with ", N skipped" where a host lacks
what a test needs. Exit status: 0 when nothing failed.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import fnmatch
import json
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from patience import Deadline
from stacks import marked, stacks

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build/logs"
ENGINES = ["interp", "translate", "kvm"]
SANITIZED_SUITES = {"unit", "device", "fuzz"}
SANITIZER_ENV = {
    # The translator gives its threads a signal stack of their own.
    "ASAN_OPTIONS": "detect_stack_use_after_return=1:use_sigaltstack=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
}
MESON_SKIPPED = 77
# Meson's bounds (timeout:) are for an idle machine, and all are stretched on a busy one (patience.py). A test that declares none worth
# mentioning gets this one.
USUAL_SECONDS = 300
# How much slower the sanitizers may make a test that declares a longer one.
SANITIZED_FACTOR = 2
# Marks a test's processes, wherever they went.
MARK = "RINGFORT_CHECK"
REPEATED_LINES, REPEATED_STACK_LINES = 30, 200
NOT_DONE = "---- not done in time; its processes:"
START = time.monotonic()


@dataclass
class Test:
    name: str
    command: list
    seconds: float              # bound
    env: dict = field(default_factory=dict)
    workdir: str = str(ROOT)
    alone: bool = False
    reports: bool = False       # prints PASS, FAIL and SKIP lines of its own


class Tally:
    def __init__(self):
        self.lock = threading.Lock()
        self.passed = self.failed = self.skipped = 0
        self.failures = []

    def add(self, verdict, name, note="", log=None):
        with self.lock:
            if verdict == "PASS":
                self.passed += 1
            elif verdict == "SKIP":
                self.skipped += 1
            else:
                self.failed += 1
                self.failures.append((name, note, log))
            print(f"[{time.monotonic() - START:4.0f} s] {verdict} {name}" + (f": {note}" if note else ""), flush=True)


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def wait_until_dead(pid, seconds):
    with contextlib.suppress(OSError):
        fd = os.pidfd_open(pid)
        select.select([fd], [], [], seconds)
        os.close(fd)


def tell_where_it_is(mark, out):
    """Of a test that is not done: all threads' stacks, and in Python's own words where that is what hangs."""
    out.write(f"\n{NOT_DONE}\n".encode())
    for pid in marked(MARK, mark):
        out.write(stacks(pid).encode())
        out.flush()
        with contextlib.suppress(OSError):
            if "python" in os.readlink(f"/proc/{pid}/exe"):
                os.kill(pid, signal.SIGABRT)
                wait_until_dead(pid, 10)        # it writes its stack first


def end_processes(mark, process):
    """What the test left running ends with it, before another one begins."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for _ in range(20):             # one may start another while they are looked for
        left = marked(MARK, mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            wait_until_dead(pid, 10)
        if not left:
            break


def run_test(test, tally):
    log = LOGS / (test.name.replace("/", "-") + ".log")
    mark = f"{os.getpid()}/{test.name}"
    env = {**os.environ, **test.env, MARK: mark, "PYTHONFAULTHANDLER": "1"}
    with open(log, "wb") as out:
        out.write(("+ " + shlex.join(map(str, test.command)) + "\n").encode())
        out.flush()
        process = subprocess.Popen(test.command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                                   cwd=test.workdir, env=env, start_new_session=True, preexec_fn=die_with_parent)
        deadline = Deadline(test.seconds)
        status = None
        try:
            while status is None and (left := deadline.left()):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(left)
            waited = deadline.gone()
            if status is None:
                out.seek(0, os.SEEK_END)
                tell_where_it_is(mark, out)
        finally:
            end_processes(mark, process)
    took = f"{waited:.1f} s"
    text = log.read_text(errors="replace")
    if not test.reports:
        if status == 0:
            tally.add("PASS", test.name, took)
        elif status == MESON_SKIPPED:
            tally.add("SKIP", test.name, text.strip().splitlines()[-1])
        else:
            tally.add("FAIL", test.name, verdict_of(status, waited), log)
        return
    group = test.name.rpartition("/")[0]
    results = re.findall(r"^(PASS|FAIL|SKIP) ([\w.+/-]+)(?:: (.*))?$", text, re.M)
    for verdict, name, note in results:
        tally.add(verdict, f"{group}/{name}", note, log)
    if status != 0 and not any(verdict == "FAIL" for verdict, _, _ in results):
        tally.add("FAIL", test.name, verdict_of(status, waited), log)
    elif not results:
        tally.add("FAIL", test.name, "no result was printed", log)


def verdict_of(status, waited):
    if status is None:
        return f"not done after {waited:.0f} s"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def repeat_logs(failures):
    """The end of each failed test's log, as the logs do not leave every machine that runs this."""
    for log in dict.fromkeys(log for _, _, log in failures if log and log.exists()):
        names = ", ".join(name for name, _, l in failures if l == log)
        said, _, where = log.read_text(errors="replace").partition(NOT_DONE)
        last = said.splitlines()[-REPEATED_LINES:]
        if where:
            last += [NOT_DONE, *where.splitlines()[:REPEATED_STACK_LINES]]
        print(f"\n---- {names}: the end of {log.relative_to(ROOT)}")
        print("".join(f"  | {line[:300].rstrip()}\n" for line in last), end="")


def build(variant, tally=None, name=None):
    """scripts/build; the path of the command, or None when that failed."""
    started = time.monotonic()
    done = subprocess.run([ROOT / "scripts/build", variant], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          text=True, check=False)
    ok = done.returncode == 0
    if tally:
        tally.add("PASS" if ok else "FAIL", name, f"{time.monotonic() - started:.1f} s", LOGS / f"build-{variant}.log")
    return done.stdout.strip() if ok else None


def meson_tests(folder):
    """What `meson test` would run in a build folder: (suite, Test)."""
    text = subprocess.run(["meson", "introspect", "--tests", ROOT / folder], stdout=subprocess.PIPE, text=True,
                          check=True).stdout
    for t in json.loads(text):
        suite = t["suite"][0].rpartition(":")[2] if t["suite"] else "other"
        yield suite, Test(f"{suite}/{t['name']}", t["cmd"], max(USUAL_SECONDS, 2 * t["timeout"]), dict(t["env"]),
                          t["workdir"] or str(ROOT / folder), alone=not t["is_parallel"])


def boot_tests(engine, ringfort):
    """The cases of tests/boot/run; ringfort may be None for listing."""
    text = subprocess.run([ROOT / "tests/boot/run", "--list"], stdout=subprocess.PIPE, text=True, check=True,
                          env={**os.environ, "ENGINE": engine, "RINGFORT": ringfort or ""}).stdout
    for line in text.splitlines():
        name, seconds, kind = line.split()
        yield Test(f"boot/{engine}/{name}", [str(ROOT / "tests/boot/run"), name], float(seconds),
                   {"ENGINE": engine, "RINGFORT": ringfort or ""}, alone=kind == "alone", reports=True)


def run_all(tests, tally):
    """In parallel, the longest first; then one by one those that want the machine for themselves."""
    workers = max(1, min(os.cpu_count() or 1, 4))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda t: run_test(t, tally), sorted((t for t in tests if not t.alone), key=lambda t: -t.seconds)))
    for t in tests:
        if t.alone:
            run_test(t, tally)


def main():
    parser = argparse.ArgumentParser(prog="check", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the build and the unit tests")
    parser.add_argument("--list", action="store_true", help="print the names of the tests and do nothing else")
    parser.add_argument("--engine", action="append", help=f"engine of the boot tests ({', '.join(ENGINES)})")
    parser.add_argument("pattern", nargs="*", help="only tests whose name matches this shell pattern, or begins with it")
    options = parser.parse_args()

    def chosen(test):
        if options.quick and not test.name.startswith("unit/"):
            return False
        return not options.pattern or any(fnmatch.fnmatch(test.name, p) or test.name.startswith(p) for p in options.pattern)

    LOGS.mkdir(parents=True, exist_ok=True)
    tally = Tally()
    ringfort = build("release", None if options.list else tally, "build")
    native, sanitized, boots = [], [], []
    if ringfort:
        for suite, test in meson_tests("build"):
            native.append(test)
            if suite in SANITIZED_SUITES:
                sanitized.append(Test("sanitize/" + test.name, [], 0))
        for engine in options.engine or ENGINES:
            boots += boot_tests(engine, ringfort)
    if options.list:
        for test in [*native, *sanitized, *boots]:
            if chosen(test):
                print(test.name)
        return 0 if ringfort else 1

    native, sanitized, boots = ([t for t in tests if chosen(t)] for tests in (native, sanitized, boots))
    if ringfort and not (native or sanitized or boots):
        parser.error("no test has such a name; see --list")
    run_all(native, tally)
    if sanitized and build("sanitize", tally, "sanitize/build"):
        wanted = {t.name for t in sanitized}
        tests = []
        for _, test in meson_tests("build-sanitize"):
            test.name = "sanitize/" + test.name
            if test.seconds > USUAL_SECONDS:
                test.seconds *= SANITIZED_FACTOR
            test.env = {**test.env, **SANITIZER_ENV}
            if test.name in wanted:
                tests.append(test)
        run_all(tests, tally)
    run_all(boots, tally)

    if tally.failures:
        repeat_logs(tally.failures)
        print("\nFailed:")
        for name, note, log in tally.failures:
            print(f"  {name}: {note}" + (f"\n      {log.relative_to(ROOT)}" if log else ""))
        print()
    print(f"{tally.passed} passed, {tally.failed} failed" + (f", {tally.skipped} skipped" if tally.skipped else ""))
    return 1 if tally.failed else 0


if __name__ == "__main__":
    sys.exit(main())
