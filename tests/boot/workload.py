"""A machine, of Ringfort or another, in which commands run one at a time: the guests of scripts/workload-image.

The runner in the guest (scripts/workload/runner.c) reads a command from the console, and tells how it ended. While it
waits for the next one the guest is idle, so what the host's clocks say between two commands is exact.
"""

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import machine
from machine import Failure, Machine, Skipped, check, script

MEMORY = "1G"
READY_SECONDS = 240


@dataclass
class Result:
    status: int         # exit status of the command; 128 + signal
    wall: float         # seconds, by CLOCK_MONOTONIC where the command ran
    cpu: float          # seconds of processor time: of the whole process of the machine; natively, of the command
    guest_cpu: float    # seconds of processor time, as the kernel counted it where the command ran
    digest: str         # of the command's standard output
    output: str = field(default="", repr=False)     # the end of it; when the status is not 0, of standard error, too


def image(name):
    if os.geteuid() != 0 and not list(machine.cache().glob(f"workload-{name}-*")):
        raise Skipped(f"making the {name} image needs root")
    return script("workload-image", name)


def process_cpu(pid):
    """
    Processor seconds of all threads of a process and of its children, which may run guest code for it. To the nanosecond
    (clock_getcpuclockid(3)), but to the tick for children that are no more.
    """
    def clock(one):
        try:
            return time.clock_gettime((~one << 3) | 2)
        except OSError:         # it ended just now
            return 0

    children = {int(child) for thread in Path(f"/proc/{pid}/task").iterdir() for child in (thread / "children").read_text().split()}
    ended = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]).split()[13:15]
    return (time.clock_gettime((~pid << 3) | 2) + sum(clock(child) for child in children) +
            sum(int(ticks) for ticks in ended) / os.sysconf("SC_CLK_TCK"))


class Failed(Failure):
    """A command ended with another status than 0; the machine goes on."""


class Commands:
    """A runner on the other end of a machine's console."""

    def __init__(self, m):
        self.machine = m
        self.at = 0

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.machine.__exit__(*args)

    def cpu(self):
        return process_cpu(self.machine.process.pid)

    def _answer(self, pattern, seconds):
        """The next answer. A runner that starts anew, or a kernel that ends, is an answer too."""
        # Up to the end of the line: its beginning may have come alone.
        found = self.machine.expect(rf"^(?:{pattern}|@ready|@fatal.*|.*Kernel panic.*)\r?\n", seconds, self.at)
        self.at = found.end()
        return found

    def ready(self):
        """Waits for the runner; gives elapsed and processor seconds since the machine's start."""
        found = self._answer("@ready", READY_SECONDS)
        if found.group().strip() != "@ready":
            raise Failure(f"the guest did not start:\n{self.machine.console[-1500:]}")
        return self.machine.seconds(), self.cpu()

    def run(self, command, seconds):
        check("\n" not in command and len(command) < 4000, "a command is one line that fits into a terminal's buffer")
        start, before = self.at, self.cpu()
        self.machine.type(f"run {command}\n")
        found = self._answer(r"@done (?P<status>\d+) (?P<wall>\d+) (?P<cpu>\d+) (?P<digest>\w+)", seconds)
        cpu = self.cpu() - before
        if not found["status"]:
            raise Failure(f"{command!r} brought the guest down:\n{self.machine.console[-3000:]}")
        output = "\n".join(line[2:] for line in self.machine.console[start:self.at].splitlines() if line.startswith("| "))
        guest_cpu = int(found["cpu"]) / 1e9
        return Result(int(found["status"]), int(found["wall"]) / 1e9, guest_cpu if self.native else cpu, guest_cpu,
                      found["digest"], output)

    def succeed(self, command, seconds):
        result = self.run(command, seconds)
        if result.status != 0:
            raise Failed(f"{command!r} ended with status {result.status}; it said:\n{result.output[-2500:]}")
        return result

    native = False

    def off(self, seconds=60):
        self.machine.type("off\n")
        self.machine.powered_off(seconds)


CMDLINE = "console=ttyS0 quiet loglevel=1"


def ringfort_guest(folder, images, *args, engine, name, program=None, memory=MEMORY):
    argv = [program or machine.ringfort(), "run", "--name", name, "--engine", engine, "--memory", memory,
            "--kernel", images / "vmlinuz", "--initrd", images / "initrd.cpio", "--cmdline", CMDLINE,
            "--disk", f"path={images / 'disk.img'},readonly=on", "--stats", folder / f"{name}-stats.json", *args]
    return Commands(Machine(folder, command=list(map(str, argv)), name=name))


def qemu_program():
    program = shutil.which("qemu-system-x86_64")
    if not program:
        raise Skipped("there is no qemu-system-x86_64 (package qemu-system-x86)")
    return program


def qemu_guest(folder, images, *args, cpu="max", name="qemu", memory=MEMORY):
    argv = [qemu_program(), "-accel", "tcg", "-cpu", cpu, "-machine", "q35", "-m", memory, "-nodefaults", "-no-user-config",
            "-display", "none", "-serial", "stdio", "-no-reboot", "-kernel", images / "vmlinuz",
            "-initrd", images / "initrd.cpio", "-append", CMDLINE,
            # Several machines read the image at once, each with locks of its own kind; nobody writes.
            "-drive", f"driver=raw,file.driver=file,file.filename={images / 'disk.img'},file.locking=off,if=virtio,readonly=on",
            *args]
    return Commands(Machine(folder, command=list(map(str, argv)), name=name))


# The same tree, with a private /tmp in memory, loopback and one processor, as the guests have them.
NATIVE = """
set -e
mount --make-rprivate /
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount -t tmpfs -o mode=1777 tmpfs "$1/tmp"
mount -t tmpfs tmpfs "$1/run"
exec chroot "$1" /workload/runner
"""


def native_guest(folder, images, name="native"):
    if os.geteuid() != 0:
        raise Skipped("running natively in the guest's tree needs root (chroot)")
    processor = max(os.sched_getaffinity(0))
    m = Machine(folder, name=name, command=["taskset", "-c", str(processor), "unshare", "--mount", "--net", "sh", "-c", NATIVE,
                                            "sh", str(images / "root")])
    commands = Commands(m)
    commands.native = True
    return commands
