"""Stress in a guest: a short test with every change, and long ones only when asked for: tests/boot/run 'stress-*'.

The long ones need an image of their own (scripts/workload-image stress: stress-ng, compilers, node, LuaJIT, Java). What a program
prints is compared with what it prints on the host, in a chroot of the same tree, where that is possible (as root).
Environment: ENGINE and RINGFORT as for all; STRESS_SECONDS for each of stress-ng's classes (default 50, in all 10
minutes), STRESS_ROUNDS for the self-checking programs (default 3), STRESS_BOOTS (default 50), STRESS_ARGS for further arguments of ringfort run.
"""

import os
import shlex
import time

import machine
import workload
from cases import case
from machine import Failure, Skipped, busybox, check, log

SECONDS = int(os.environ.get("STRESS_SECONDS", "50"))
ROUNDS = int(os.environ.get("STRESS_ROUNDS", "3"))
BOOTS = int(os.environ.get("STRESS_BOOTS", "50"))
ARGS = shlex.split(os.environ.get("STRESS_ARGS", ""))


@case(300)
def stress_short(folder):
    """stress.c for a fraction of a second of each of its parts, in a guest with nothing else."""
    with busybox(folder, "--initrd", machine.programs(folder, "stress"), command="/bin/stress 400") as m:
        m.expect(r"^RF: command begins", 150)
        found = m.expect(r"^WRONG.*|^RF: command ends with status \d+", 120)
        check(found.group().endswith(" 0"), f"it says:\n{m.console[-1500:]}")
        check(m.console.count(" rounds") == 10, f"not all parts ran:\n{m.console[-1500:]}")
        m.powered_off(30)


CLASSES = {
    "cpu": "--cpu 1",
    "vm": "--vm 1 --vm-bytes 64m",
    "memcpy": "--memcpy 1",
    "atomic": "--atomic 2",
    "matrix": "--matrix 1",
    "fork": "--fork 1",
    "mmap": "--mmap 1 --mmap-bytes 64m",
    "signal": "--signal 1",
    "sigsegv": "--sigsegv 1",
    "fault": "--fault 1",
    "switch": "--switch 2",
    "futex": "--futex 2",
}


def guest(folder, images, name="stress"):
    return workload.ringfort_guest(folder, images, *ARGS, engine=machine.ENGINE, name=name)


class Together:
    """Parts of one case share a guest; one that was brought down is replaced for the next part."""

    def __init__(self, report, folder, images):
        self.report, self.folder, self.images = report, folder, images
        self.guest, self.count = None, 0

    def part(self, name, function):
        def with_guest():
            if not self.guest:
                self.count += 1
                self.guest = guest(self.folder, self.images, f"stress-{self.count}")
                self.guest.ready()
            at = len(self.guest.machine.console)
            try:
                function(self.guest)
            except workload.Failed:
                raise
            except Failure:
                self.end()
                raise
            console = self.guest.machine.console[at:]
            for bad in ("BUG:", "Oops", "Call Trace", "soft lockup", "rcu_sched"):
                check(bad not in console, f"the kernel complained:\n{console[-2500:]}")
        self.report.part(name, with_guest)

    def end(self):
        if self.guest:
            self.guest.machine.__exit__()
        self.guest = None

    def power_off(self):
        def off():
            if self.guest:
                self.guest.off()
        try:
            self.report.part("stress-power-off", off)
        finally:
            self.end()


def same(equal, message):
    if not equal:
        raise workload.Failed(message)


def natively(folder, images, commands, seconds):
    """Digests of the same commands on the host; nothing where that cannot be."""
    try:
        with workload.native_guest(folder, images) as native:
            native.ready()
            return [native.succeed(c, seconds).digest for c in commands]
    except Skipped as e:
        log(f"not compared with the host: {e}")
        return None


@case(len(CLASSES) * (SECONDS * 2 + 60) + 300, parts=True, wanted=True)
def stress_verify(report, folder):
    """stress-ng --verify, class by class."""
    together = Together(report, folder, workload.image("stress"))
    for name, flags in CLASSES.items():
        together.part(f"stress-{name}", lambda g, flags=flags: g.succeed(
            f"stress-ng --verify --oomable --metrics-brief {flags} --timeout {SECONDS}s --temp-path /tmp 2>&1",
            SECONDS * 2 + 60))
    together.power_off()


# The objects and the programs, without what carries the time or the place of the build.
BUILD = ("set -e; cd /tmp; rm -rf build; mkdir build; cd build; cp -r /workload/src/{source}/. .; {{ {make}; }} >/tmp/build.log 2>&1 || "
         "{{ tail -n 30 /tmp/build.log; exit 1; }}; find . -name '*.o' -o -name '*.lo' | LC_ALL=C sort | xargs md5sum; {test}")
PACKAGES = {
    "zlib": BUILD.format(source="zlib", make="./configure --static && make static", test="./example"),
    "lua": BUILD.format(source="lua5.4", make="make -C src liblua.a lua MYLIBS= MYCFLAGS= SYSCFLAGS='-DLUA_USE_POSIX' SYSLIBS='-lm'",
                        test="./src/lua -e 'local s = 0; for i = 1, 1000000 do s = (s * 31 + i) % 1000003 end; print(s, _VERSION)'"),
}


@case(3600, parts=True, wanted=True)
def stress_build(report, folder):
    """Packages of C are built twice in the guest, with the same objects, and those that the host makes."""
    images = workload.image("stress")
    truth = natively(folder, images, PACKAGES.values(), 600)
    together = Together(report, folder, images)
    for i, (name, command) in enumerate(PACKAGES.items()):
        def twice(g):
            first, second = g.succeed(command, 1200), g.succeed(command, 1200)
            log(f"{name}: {first.wall:.0f} s and {second.wall:.0f} s")
            same(first.digest == second.digest, f"building {name} twice gave different objects:\n{first.output}\n{second.output}")
            same(not truth or first.digest == truth[i], f"the host makes other objects of {name}")
        together.part(f"stress-build-{name}", twice)
    together.power_off()


PROGRAMS = {
    "node": f"node /workload/src/check.js {ROUNDS}",
    "luajit": f"luajit /workload/src/check.lua {ROUNDS}",
    "luajit-interpreted": f"luajit -joff /workload/src/check.lua {ROUNDS}",
    "java": f"java -Xmx256m -cp /workload Check {ROUNDS}",
    "java-interpreted": f"java -Xmx256m -Xint -cp /workload Check {ROUNDS}",
    "java-compiled": f"java -Xmx256m -Xcomp -XX:TieredStopAtLevel=1 -cp /workload Check {ROUNDS}",
}


@case(3600, parts=True, wanted=True)
def stress_jit(report, folder):
    """Self-checking programs in languages that are compiled while they run, with and without their compilers."""
    images = workload.image("stress")
    truth = natively(folder, images, PROGRAMS.values(), 600)
    together = Together(report, folder, images)
    printed = {}
    for i, (name, command) in enumerate(PROGRAMS.items()):
        def compare(g):
            result = g.succeed(command, 1200)
            log(f"{name}: {result.wall:.0f} s")
            same(not truth or result.digest == truth[i], f"on the host it prints something else than:\n{result.output}")
            first = printed.setdefault(name.partition("-")[0], result)
            same(result.digest == first.digest, f"with other compilers it prints something else:\n{first.output}\n{result.output}")
        together.part(f"stress-{name}", compare)
    together.power_off()


@case(BOOTS * 60, wanted=True)
def stress_boots(folder):
    """Boots to poweroff in a row."""
    images = workload.image("stress")
    slowest = 0
    for i in range(BOOTS):
        start = time.monotonic()
        try:
            with guest(folder, images, "boot") as g:
                g.ready()
                g.off()
        except Failure as e:
            raise Failure(f"boot {i + 1} of {BOOTS}: {e}") from None
        slowest = max(slowest, time.monotonic() - start)
    log(f"{BOOTS} boots, the slowest {slowest:.1f} s")
