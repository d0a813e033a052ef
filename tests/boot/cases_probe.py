"""What a user program of a guest sees of the processor and its memory: tests/boot/probe in a guest with nothing else.

With the translator, with direct execution of user code and without it: it must not show. PROBE_MS: for each part, this long
(default: once), PROBE_PARTS: only these.
"""

import json
import os
import subprocess
import time

import machine
from cases import case
from machine import Skipped, busybox, check
from migration import Journey

TIME = os.environ.get("PROBE_MS", "0")
PARTS = os.environ.get("PROBE_PARTS", "")


def program(folder):
    """An initramfs that adds probe to the usual one."""
    return machine.programs(folder, "probe", sources=sorted((machine.ROOT / "tests/boot/probe").glob("*.c")),
                            flags=("-mno-red-zone", "-fno-strict-aliasing"))


def probe(folder, extra, name, *args, parts="", cmdline="", engine="translate"):
    with busybox(folder, "--initrd", extra, *args, command=f"/bin/probe {TIME} {PARTS or parts}", cmdline=cmdline, engine=engine, name=name) as m:
        m.expect(r"^RF: command begins", 60)
        found = m.expect(r"WRONG.*\n|^RF: command ends with status \d+|Kernel panic.*\n", 120 + 40 * int(TIME) // 1000)
        check(found.group().endswith(" 0"), f"it says:\n{m.console[-1500:]}")
        check("probe: all is right" in m.console, f"not all parts ran:\n{m.console[-1500:]}")
        for bad in ("BUG:", "Oops", "Call Trace", "soft lockup"):
            check(bad not in m.console, f"the kernel complained:\n{m.console[-2500:]}")
        m.powered_off(30)
        if engine != "translate":
            return {}
        stats = m.stats()
        counters = stats["engine_counters"]
        # Processor time of the sandboxes is the machine's, and a part of the time that they were waited for.
        native = counters["native_cpu_ns"] / 1e9
        check(native <= stats["vcpu_cpu_seconds"] <= stats["cpu_seconds"] and native <= counters["native_ns"] / 1e9 + 0.5 and
              (native > 0) == (counters["native_runs"] > 0), f"processor time is not counted right: {stats}")
        return counters


@case(600, parts=True)
def probe_direct(report, folder):
    """direct=always, on and off, on one processor and on two."""
    if machine.ENGINE != "translate":
        report.line("SKIP", "probe-direct", "runs with the tests of the translator")
        return
    try:
        machine.runs_natively()
    except Skipped as e:
        report.line("SKIP", "probe-direct", str(e))
        return
    extra = program(folder)

    def one(direct, cpus, *args, **options):
        counters = probe(folder, extra, f"{direct}-{cpus}", "--translate", f"direct={direct}", "--cpus", str(cpus), *args, **options)
        if direct == "always":
            for name in ("native_runs", "native_faults", "native_steps", "native_ns"):
                check(counters[name] > 0, f"direct execution is not there, or does nothing: {counters}")
        if direct == "off":
            check(counters["native_runs"] == 0, f"direct execution is there although it is off: {counters}")

    report.part("probe-direct-always", lambda: one("always", 1, parts="" if int(TIME) else "-moved -merged", cmdline="nofsgsbase"))
    # Those that take long are left to one each.
    some = "" if int(TIME) else "-many -moved -merged"
    report.part("probe-direct-always-2", lambda: one("always", 2, parts=some and "-many -moved", cmdline="vsyscall=xonly"))
    report.part("probe-direct-on-2", lambda: one("on", 2, parts=some, cmdline="vsyscall=none"))
    report.part("probe-direct-off", lambda: one("off", 1, parts=some))


@case(300)
def probe_moves(folder):
    """Memory that is written natively while a machine migrates in rounds, in post-copy, and while it is saved."""
    if machine.ENGINE != "translate":
        raise Skipped("runs with the tests of the translator")
    machine.runs_natively()
    with Journey(folder, memory="128M", workload="memcheck 24 2000 200", extra=("--translate", "direct=always")) as journey:
        def natively():
            """Sandboxes are children of the machine's process, and it has no other."""
            pid = json.loads(journey.run("info", journey.current, "-o", "json").stdout)["pid"]
            deadline = time.monotonic() + 20 * machine.patience()
            while not subprocess.run(["pgrep", "-P", str(pid)], stdout=subprocess.DEVNULL).returncode == 0:
                check(time.monotonic() < deadline, f"{journey.current} runs nothing natively")
                time.sleep(0.1)
            journey.progress()

        journey.start("translate")
        natively()
        journey.hop("translate", "--post-copy", "never")
        natively()
        journey.hop("translate", "--post-copy", "now")
        natively()
        journey.go_on_from_snapshot()
        natively()
        journey.hop("interp")
