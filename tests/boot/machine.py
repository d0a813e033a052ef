"""A Ringfort machine under test: its process, its console, its ssh, and the images it boots from.

Everything waits for an event with a bound; nothing sleeps for luck. A machine dies with the test.
The program is $RINGFORT or the one in build/; the engine is $ENGINE (interp).
"""

import bisect
import ctypes
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import stacks  # noqa: E402
from patience import Deadline, stretch  # noqa: E402

ENGINE = os.environ.get("ENGINE", "interp")
# Bounds are for the interpreter on a slow host, and stretched on a busy one (scripts/patience.py); a fast one never meets them.
PATIENCE = float(os.environ.get("PATIENCE", "1"))


def patience():
    """What to multiply a bound by where Deadline does not fit."""
    return PATIENCE * stretch()


class Failure(Exception):
    """A test's verdict: what was expected and what was there."""


class Skipped(Exception):
    """This host lacks what the test needs."""


def check(condition, message):
    if not condition:
        raise Failure(message)


def ringfort():
    for path in (os.environ.get("RINGFORT"), ROOT / "build/ringfort", ROOT / "build/src/cli/ringfort"):
        if path and os.access(path, os.X_OK):
            return str(path)
    raise Failure("there is no built ringfort: run scripts/build")


@functools.cache
def engine_report(name):
    """What `ringfort host` says of an engine."""
    try:
        done = subprocess.run([ringfort(), "host", "-o", "json"], stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)["engines"][name]
    except (Failure, OSError, subprocess.SubprocessError, ValueError, KeyError):
        return {}


def kvm():
    return engine_report("kvm")


def runs_natively():
    """Whether user code of guests can run natively in sandboxes here; else Skipped."""
    text = engine_report("translate").get("text", "")
    if "runs natively" not in text:
        raise Skipped(text)


def script(name, *args):
    """Runs scripts/NAME and gives the last line that it prints."""
    done = subprocess.run([ROOT / "scripts" / name, *args], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                          text=True, check=False)
    check(done.returncode == 0, f"scripts/{name} {' '.join(args)} failed with status {done.returncode}")
    lines = done.stdout.split()
    return Path(lines[-1]) if lines else None


def programs(folder, *names, sources=None, flags=()):
    """Static programs in folder/programs/bin, each of tests/boot/NAME.c or of sources, and an archive that adds them to an initramfs."""
    root, archive = folder / "programs", folder / "programs.cpio"
    (root / "bin").mkdir(parents=True, exist_ok=True)
    for name in names:
        subprocess.run(["gcc", "-std=gnu17", "-O2", *flags, "-static", "-pthread", "-o", root / "bin" / name,
                        *(sources or [ROOT / f"tests/boot/{name}.c"])], check=True)
    with open(archive, "wb") as out:
        subprocess.run(["cpio", "--quiet", "-o", "-H", "newc"], input="\n".join([".", "bin", *(f"bin/{n}" for n in names), ""]).encode(),
                       stdout=out, cwd=root, check=True)
    return archive


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


class Machine:
    """One `ringfort run`, with the guest's serial port on pipes (or elsewhere, by its own --console)."""

    def __init__(self, folder, *args, memory="512M", engine=ENGINE, command=None, name="machine"):
        self.folder = Path(folder)
        self.stats_file = self.folder / f"{name}-stats.json"
        argv = command or [ringfort(), "run", "--name", name, "--engine", engine, "--memory", memory,
                           "--stats", str(self.stats_file)]
        argv = [*argv, *map(str, args)]
        self.console_log = open(self.folder / f"{name}-console.log", "wb")
        self.error_path = self.folder / f"{name}-stderr.log"
        self.stacks_path = self.folder / f"{name}-stacks.log"
        self.started = time.monotonic()
        with open(self.error_path, "wb") as errors:
            errors.write(("+ " + " ".join(argv) + "\n").encode())
            errors.flush()
            self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                                            preexec_fn=die_with_parent, env=self.environment())
        self._text = ""
        self._arrivals = []     # (offset in the text, time.monotonic()) of each piece of it
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def environment(self):
        """Control sockets and snapshots are the test's own: others may run machines of the same name."""
        return {**os.environ, "XDG_RUNTIME_DIR": str(self.folder), "XDG_DATA_HOME": str(self.folder / "data")}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(10)
        self.process.stdin.close()
        self.console_log.close()

    def _read(self):
        while chunk := os.read(self.process.stdout.fileno(), 65536):
            self.console_log.write(chunk)
            self.console_log.flush()
            with self._changed:
                self._arrivals.append((len(self._text), time.monotonic()))
                self._text += chunk.decode("utf-8", "replace")
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def console(self):
        with self._changed:
            return self._text

    def arrived(self, offset):
        """When the host saw this byte of the console, by time.monotonic()."""
        with self._changed:
            return self._arrivals[bisect.bisect_right(self._arrivals, (offset, float("inf"))) - 1][1]

    @property
    def errors(self):
        return self.error_path.read_text(errors="replace").partition("\n")[2]

    def seconds(self):
        return time.monotonic() - self.started

    def expect(self, pattern, seconds, since=0):
        """Waits until the console shows the regular expression past offset since; gives the match."""
        deadline = Deadline(seconds * PATIENCE)
        with self._changed:
            while True:
                match = re.compile(pattern, re.M).search(self._text, since)
                if match:
                    return match
                left = deadline.left()
                if self._ended or left <= 0:
                    why = "the machine ended" if self._ended else f"{deadline.gone():.0f} s passed"
                    self.note_stacks()
                    raise Failure(f"{why} before the console showed {pattern!r}; it ends with:\n"
                                  f"{self._text[-1500:]}\nand ringfort said:\n{self.errors[-1500:]}")
                self._changed.wait(min(left, 1))

    def note_stacks(self):
        """Where the machine's threads are, for whoever looks at why it hangs: in a log beside the console's."""
        if self.process.poll() is None:
            self.stacks_path.write_text(stacks.stacks(self.process.pid))

    def type(self, text):
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def wait(self, seconds):
        """The exit status (negative: a signal); a machine that does not end is a failure."""
        deadline = Deadline(seconds * PATIENCE)
        while left := deadline.left():
            try:
                return self.process.wait(left)
            except subprocess.TimeoutExpired:
                pass
        self.note_stacks()
        raise Failure(f"still running after {deadline.gone():.0f} s; the console ends with:\n{self.console[-1500:]}")

    def powered_off(self, seconds):
        status = self.wait(seconds)
        check(status == 0, f"exit status {status} instead of 0; ringfort said:\n{self.errors[-1500:]}\n"
                           f"the console ends with:\n{self.console[-1500:]}")

    def kill(self):
        """SIGKILL, as a crash of the host's process."""
        self.process.send_signal(signal.SIGKILL)
        check(self.wait(10) == -signal.SIGKILL, "the process did not die of SIGKILL")

    def stats(self):
        return json.loads(self.stats_file.read_text())


def busybox(folder, *args, kernel="cloud", command="", i386=False, cmdline="", **options):
    """A machine with one of Debian's kernels and the busybox initramfs, which runs a shell command. cmdline: more of the kernel's."""
    images = script("kernel", kernel)
    initrd = script("initramfs", "--kernel", kernel, *(["--i386"] if i386 else []))
    check('"' not in command, "the command cannot hold double quotes")
    return Machine(folder, "--kernel", images / "vmlinuz", "--initrd", initrd,
                   "--cmdline", f'console=ttyS0 {cmdline} rf.cmd="{command}"', *args, **options)


class Server:
    """The Debian server: a private disk in a folder, and the machines that it is booted in."""

    def __init__(self, folder):
        if os.geteuid() != 0 and not list(cache().glob("server-*")):
            raise Skipped("making the server image needs root")
        image = script("server-image")
        self.folder = Path(folder)
        self.disk = self.folder / "disk.img"
        script("seed", str(self.folder / "seed"), "testserver")
        for name in ("vmlinuz", "initrd.img"):
            shutil.copy(image / name, self.folder / name)
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", image / "disk.img", self.disk], check=True)
        self.port = free_port()
        self._write_ssh_config()

    def _write_ssh_config(self):
        subprocess.run(["bash", "-c", '. "$0/scripts/lib.sh"; ssh_config "$1" "$2"', ROOT, self.folder / "seed",
                        str(self.port)], check=True)

    def boot(self, name):
        return Machine(self.folder, "--kernel", self.folder / "vmlinuz", "--initrd", self.folder / "initrd.img",
                       "--cmdline", "root=/dev/vda ro console=ttyS0", "--disk", f"path={self.disk}",
                       "--disk", f"path={self.folder}/seed/seed.img,readonly=on",
                       "--net", f"user,hostfwd=tcp:127.0.0.1:{self.port}-:22", memory="1G", name=name)

    @property
    def password(self):
        return (self.folder / "seed/password").read_text().strip()

    def _command(self, program, *args):
        return [program, "-F", str(self.folder / "seed/ssh_config"), "-o", "BatchMode=yes", *map(str, args)]

    def popen(self, command, **options):
        return subprocess.Popen(self._command("ssh", "ringfort", command), text=True, preexec_fn=die_with_parent,
                                **options)

    def ssh(self, command, seconds, status=0):
        """Runs a command in the guest; gives its output, checks its status."""
        return self._run(self._command("ssh", "ringfort", command), command, seconds, status)

    def copy(self, source, target, seconds, *options):
        """scp; ringfort:PATH names a file in the guest."""
        return self._run(self._command("scp", "-q", *options, source, target), f"scp {source} {target}", seconds, 0)

    @staticmethod
    def _run(argv, what, seconds, status):
        try:
            done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True, errors="replace", timeout=seconds * patience(), check=False)
        except subprocess.TimeoutExpired as e:
            said = e.stdout.decode(errors="replace") if isinstance(e.stdout, bytes) else e.stdout or ""
            raise Failure(f"{what!r} in the guest did not end within {seconds} s; it said:\n{said[-1500:]}") from None
        check(status is None or done.returncode == status,
              f"{what!r} in the guest ended with status {done.returncode}; it said:\n{done.stdout[-1500:]}")
        return done.stdout


def cache():
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringfort"
    return Path(os.environ.get("RINGFORT_CACHE") or default)


def log(text):
    print(f"  {text}", file=sys.stderr, flush=True)
