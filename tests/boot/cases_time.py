"""A guest's time: what idleness costs the host, how late timers and interrupts come, how clocks run.

One small guest with timing.c does all of it. The host may be busy, so medians are judged, the best of three; what there was besides is
printed. Environment: ENGINE and RINGFORT as for all; TIME_SECONDS, for how long clocks run under load and for how long the
guest is idle: `TIME_SECONDS=600 tests/boot/run 'time-*'` is the long form. time-by-tsc, the same without KVM's clock, only when it is named.
"""

import os
import re
import subprocess
import time

import machine
from cases import case
from machine import Failure, Skipped, busybox, check, log

SECONDS = int(os.environ.get("TIME_SECONDS", "8"))
ROUNDS = 3

IDLE_PERCENT = 3.0      # of one processor of the host, by the whole process
IDLE_WAKEUPS = 150.0    # a second, of all threads
LATE_US = 1000.0        # a timer of an idle guest
LATENCY_US = {"interp": 5000.0}     # an interrupt of a busy one; else:
LATENCY_DEFAULT_US = 2000.0
BUSY = 0.1              # of the time that the machine would run, it waits for a processor
DRIFT_PPM = 100.0
# Lines on the console are compared: of those of a second, the fastest. They still take so long to come, one time or the other.
CONSOLE_S = 0.003
# Linux reads whole seconds from the RTC when it starts, and adds a half.
DATE_S = 0.55


def used(pid):
    """Of all threads so far: processor seconds, voluntary switches, seconds of waiting for a processor."""
    seconds = switches = waited = 0
    for task in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{task}/schedstat", encoding="ascii") as f:
            ran, delayed = f.read().split()[:2]
            seconds += int(ran) / 1e9
            waited += int(delayed) / 1e9
        with open(f"/proc/{pid}/task/{task}/status", encoding="ascii") as f:
            switches += int(re.search(r"^voluntary_ctxt_switches:\s+(\d+)", f.read(), re.M).group(1))
    return seconds, switches, waited


def best(m, what, start):
    """The smallest of the medians that the guest found, in µs."""
    found = re.findall(rf"^late {what} \d+ (\S+) (\S+) (\S+) (\S+)", m.console[start:], re.M)
    check(len(found) == ROUNDS, f"{len(found)} measurements of {what} instead of {ROUNDS}:\n{m.console[-1500:]}")
    first = min(found, key=lambda f: float(f[0]))
    log(f"{what}: late by {first[0]} µs; 90th, 99th percentile and most: {', '.join(first[1:])}")
    return float(first[0])


def not_late(m, names, bound, start):
    late = {name: best(m, name, start) for name in names}
    bad = ", ".join(f"{name} {us:.0f} µs" for name, us in late.items() if us > bound)
    check(not bad, f"later than {bound:.0f} µs in the median: {bad}")


def latency(m, loads, start, before, after):
    """cpu/latency_* measures the engine alone, whatever else the host does; this is with the guest's kernel, on a host with time for it."""
    waited = (after[2] - before[2]) / (after[0] - before[0] + after[2] - before[2])
    bound = LATENCY_US.get(machine.ENGINE, LATENCY_DEFAULT_US)
    try:
        not_late(m, loads, bound, start)
    except Failure as e:
        if waited > BUSY:
            raise Skipped(f"the host was busy, the machine waited for a processor for {waited:.0%} of the time: {e}") from None
        raise


def clocks(m, start):
    """The guest's clocks against the host's, from the beginning to the end of the stamps."""
    ahead = []      # guest's time, and by how much the host's arrival is ahead of it
    wall = time.time() - time.monotonic()
    for match in re.finditer(r"^stamp (\d+) (\d+)\s*$", m.console[start:], re.M):
        at = m.arrived(start + match.start())
        ahead.append((int(match[1]) / 1e9, at - int(match[1]) / 1e9, at + wall - int(match[2]) / 1e9))
    check(len(ahead) >= SECONDS * 20 - 1, f"only {len(ahead)} stamps came in {SECONDS} s")
    first, last = ahead[:20], ahead[-20:]
    elapsed = last[-1][0] - first[-1][0]
    drift = min(a[1] for a in last) - min(a[1] for a in first)
    date = min((a[2] for a in ahead), key=abs)
    log(f"in {elapsed:.1f} s under load the guest's clock lost {drift * 1e3:.3f} ms ({drift / elapsed * 1e6:.1f} ppm); its date was "
        f"{date * 1e3:.1f} ms behind")
    check(abs(drift) <= elapsed * DRIFT_PPM / 1e6 + CONSOLE_S, f"the guest's clock lost {drift * 1e3:.3f} ms in {elapsed:.1f} s")
    check(abs(date) <= DATE_S, f"the guest's date is {date:.3f} s behind the host's")


def idle(m):
    m.expect(r"^idle begins", 60)
    time.sleep(1)       # its shell goes to sleep, what was logged is written
    before, began = used(m.process.pid), time.monotonic()
    time.sleep(SECONDS)
    after, elapsed = used(m.process.pid), time.monotonic() - began
    percent, wakeups = (after[0] - before[0]) / elapsed * 100, (after[1] - before[1]) / elapsed
    log(f"idle for {elapsed:.1f} s: {percent:.2f} % of a processor, {wakeups:.0f} wake-ups a second")
    check(percent <= IDLE_PERCENT, f"an idle guest takes {percent:.2f} % of a processor, with {wakeups:.0f} wake-ups a second")
    check(wakeups <= IDLE_WAKEUPS, f"an idle guest wakes its process {wakeups:.0f} times a second")


def slept(m):
    """The shell's `sleep 2`, as the host sees it."""
    seconds = m.arrived(m.expect(r"^slept", 60).start()) - m.arrived(m.expect(r"^sleeps", 60).start())
    log(f"sleep 2 took {seconds:.3f} s")
    check(1.995 <= seconds <= 2.5, f"sleep 2 took {seconds:.3f} s")


@case(180 + 3 * SECONDS, alone=True, parts=True)
def time_in_guest(report, folder):
    extra = machine.programs(folder, "timing")
    loads = subprocess.run([folder / "programs/bin/timing", "loads"], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    rounds = " ".join(map(str, range(ROUNDS)))
    command = (f"for i in {rounds}; do /bin/timing late 100; for l in {' '.join(loads)}; do /bin/timing under $l 40; done; done; echo late ends; "
               f"echo sleeps; sleep 2; echo slept; /bin/timing stamps {SECONDS} loop; echo stamps end; "
               f"echo idle begins; sleep {SECONDS + 3}; echo idle ends")
    with busybox(folder, "--initrd", extra, command=command) as m:
        start = m.expect(r"^RF: command begins", 150).end()
        before = used(m.process.pid)
        m.expect(r"^late ends", 120)
        after = used(m.process.pid)
        report.part("time-idle-timers", not_late, m, ["sleep", "timerfd"], LATE_US, start)
        report.part("time-latency", latency, m, loads, start, before, after)
        report.part("time-sleep", slept, m)
        m.expect(r"^stamps end", SECONDS + 60)
        report.part("time-clocks", clocks, m, start)
        report.part("time-idle", idle, m)
        m.expect(r"^idle ends", SECONDS + 60)
        check("EARLY" not in m.console, f"a sleep ended too early:\n{m.console[-1500:]}")
        m.powered_off(30)


@case(180 + SECONDS, alone=True, wanted=True)
def time_by_tsc(folder):
    """The kernel learns the TSC's rate from CPUID."""
    with open("/proc/cpuinfo", encoding="ascii") as f:
        if "GenuineIntel" not in f.read():
            raise Skipped("only Intel's processors say it")
    extra = machine.programs(folder, "timing")
    with busybox(folder, "--initrd", extra, cmdline="no-kvmclock",
                 command=f"cat /sys/devices/system/clocksource/clocksource0/current_clocksource; /bin/timing stamps {SECONDS} loop; echo stamps end") as m:
        start = m.expect(r"^RF: command begins", 150).end()
        m.expect(r"^tsc\s", 30, start)
        m.expect(r"^stamps end", SECONDS + 60, start)
        clocks(m, start)
        m.powered_off(30)
