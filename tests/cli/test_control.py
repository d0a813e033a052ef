#!/usr/bin/env python3
"""Machines that run detached, and every verb about them; and what a client of the control socket can and cannot do.

Takes the program's path from $RINGFORT. The guest is a few bytes: it prints "R>" at its start, echoes what it gets on the
serial port, sleeps in between, powers off when its power button is pressed, and does as told by "!" (crash), "@" (reset), "#" (print lines
without end) and "~" (no longer look at the button).
"""
import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import pty
import re
import select
import signal
import socket
import stat
import struct
import subprocess
import tempfile
import threading
import time
import unittest

RINGFORT = os.environ["RINGFORT"]
ROOT = pathlib.Path(__file__).resolve().parents[2]
BOUND = 60                      # seconds, for whatever should happen soon

GUEST = """
    .code32
    .long 0x1badb002, 2, -(0x1badb002 + 2)      # Multiboot 1, specification 0.6.96 section 3.1
    .globl _start
_start:
    mov $stack, %esp
    lgdt gdtr
    ljmp $8, $1f
1:  mov $16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $tick, %eax                 # the gate of vector 0x40
    mov %ax, idt + 0x200
    movw $8, idt + 0x202
    movw $0x8e00, idt + 0x204
    shr $16, %eax
    mov %ax, idt + 0x206
    lidt idtr
    movl $0x1ff, 0xfee000f0         # the local APIC's timer, every 2 ms
    movl $0xb, 0xfee003e0
    movl $0x20040, 0xfee00320
    movl $2000000, 0xfee00380
    sti
    mov $0x3f8, %dx
    mov $'R', %al
    outb %al, %dx
    mov $'>', %al
    outb %al, %dx
    mov $1, %bl                     # look at the button
idle:
    hlt
again:
    mov $0x604, %dx
    inl %dx, %eax
    test %bl, %al
    jnz off
    mov $0x3fd, %dx
    inb %dx, %al
    test $1, %al
    jz idle
    mov $0x3f8, %dx
    inb %dx, %al
    cmp $'!', %al
    je crash
    cmp $'@', %al
    je reset
    cmp $'#', %al
    je flood
    outb %al, %dx
    cmp $'~', %al
    jne again
    xor %bl, %bl
    jmp again
off:
    mov $0x600, %dx
    mov $0x34, %al
    outb %al, %dx
    hlt
crash:
    push $0
    push $0
    mov %esp, %eax
    lidt (%eax)
    int3
reset:
    mov $0xcf9, %dx
    mov $6, %al
    outb %al, %dx
    hlt
flood:
    mov $'0', %bl
1:  call put
    inc %bl
    cmp $'0' + 63, %bl
    jne 1b
    mov $10, %bl
    call put
    jmp flood
put:
    mov $0x3fd, %dx
1:  inb %dx, %al
    test $0x20, %al
    jz 1b
    mov $0x3f8, %dx
    mov %bl, %al
    outb %al, %dx
    ret
tick:
    movl $0, 0xfee000b0
    iret
gdt:
    .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr:
    .word 23
    .long gdt
idtr:
    .word 0x207
    .long idt
    .balign 8
idt:
    .skip 0x208
    .skip 4096
stack:
"""


def build_guest(folder):
    """An ELF file for the loader, by the assembler and linker that building needs anyway."""
    source, image = folder / "guest.s", folder / "guest"
    source.write_text(GUEST)
    subprocess.run(["as", "--32", "-o", folder / "guest.o", source], check=True, timeout=BOUND)
    subprocess.run(["ld", "--no-warn-rwx-segments", "-m", "elf_i386", "-N", "-Ttext=0x100000", "-o", image, folder / "guest.o"], check=True,
                   timeout=BOUND)
    return image


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path, timeout=BOUND):
        super().__init__("ringfort", timeout=timeout)
        self.path = str(path)

    def connect(self):
        self.sock = connect(self.path, self.timeout)


def connect(path, timeout=BOUND):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(timeout)
    s.connect(str(path))
    return s


def eventually(what, seconds=BOUND):
    """Waits until what() is true, and gives that."""
    end = time.monotonic() + seconds
    while not (found := what()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.02)
    return found


class Machines(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory(prefix="rf-")
        cls.addClassCleanup(folder.cleanup)
        cls.top = pathlib.Path(folder.name)
        cls.guest = build_guest(cls.top)

    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=self.top))
        self.runtime, self.state = self.folder / "run", self.folder / "state"
        self.runtime.mkdir()
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(self.runtime), "XDG_STATE_HOME": str(self.state)}
        self.addCleanup(self.kill_all)

    def kill_all(self):
        """What a failed test left running."""
        for lock in self.runtime.glob("ringfort/*.lock"):
            with contextlib.suppress(ValueError, ProcessLookupError, FileNotFoundError):
                pid = int(lock.read_text())
                if "ringfort" in pathlib.Path(f"/proc/{pid}/cmdline").read_text():
                    os.kill(pid, signal.SIGKILL)

    def ringfort(self, *args, **more):
        more = {"stdin": subprocess.DEVNULL, "timeout": BOUND, **more}
        return subprocess.run([RINGFORT, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=self.env,
                              errors="replace", **more)

    def ok(self, *args, **more):
        r = self.ringfort(*args, **more)
        self.assertEqual((r.returncode, r.stderr), (0, ""), args)
        return r.stdout

    def json(self, *args):
        return json.loads(self.ok(*args, "-o", "json"))

    def refused(self, args, part, status=2):
        r = self.ringfort(*args)
        self.assertEqual(r.returncode, status, f"{args}: {r.stdout}{r.stderr}")
        self.assertEqual(r.stdout, "", args)
        self.assertRegex(r.stderr, r"\Aringfort: [^\n]*\n\Z", args)
        self.assertIn(part, r.stderr, args)

    def start(self, name, *args):
        self.assertEqual(self.ok("run", "--detach", "--name", name, "--engine", "interp", "--memory", "16M", "--kernel",
                                 self.guest, *args), f"{name}\n")
        eventually(lambda: "R>" in self.ok("logs", name))
        return name

    def socket(self, name):
        return self.runtime / "ringfort" / f"{name}.sock"

    def request(self, name, method, path, body=None, headers={}):
        """(status, answer): JSON where it is."""
        c = UnixConnection(self.socket(name))
        with contextlib.closing(c):
            c.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), headers)
            r = c.getresponse()
            data = r.read()
            return r.status, json.loads(data) if r.headers["Content-Type"] == "application/json" else data

    def type(self, name, text):
        self.assertEqual(self.request(name, "POST", "/v1/console/input", {"text": text})[0], 200)

    def instructions(self, name):
        return sum(v["instructions"] for v in self.request(name, "GET", "/v1/stats")[1]["vcpus"])

    def moves(self, name):
        """The guest gets on."""
        before = self.instructions(name)
        eventually(lambda: self.instructions(name) > before)

    @contextlib.contextmanager
    def events(self, name, path="/v1/events"):
        """Calls of the result give the next event; None at the end."""
        c = UnixConnection(self.socket(name))
        with contextlib.closing(c):
            c.request("GET", path)
            r = c.getresponse()
            self.assertEqual((r.status, r.headers["Content-Type"]), (200, "application/x-ndjson"))

            def following():
                line = r.readline()
                return json.loads(line) if line else None
            yield following


class Life(Machines):
    def test_from_start_to_stop(self):
        self.start("web")
        (listed,) = self.json("ls")
        self.assertEqual((listed["name"], listed["state"], listed["cpus"], listed["memory_bytes"]),
                         ("web", "running", 1, 16 << 20))
        self.assertRegex(self.ok("ls"), r"(?m)^NAME .*\nweb +running +\w+ +1 +16 MiB +\d+s +\d+$")
        mode = self.socket("web").stat().st_mode
        self.assertTrue(stat.S_ISSOCK(mode))
        self.assertEqual(stat.S_IMODE(mode), 0o600)
        self.assertEqual(stat.S_IMODE(self.socket("web").parent.stat().st_mode), 0o700)

        info = self.json("info", "w")
        self.assertEqual((info["name"], info["state"], info["held_by"]), ("web", "running", []))
        self.assertEqual(info["config"]["memory"], "16M")
        self.assertEqual(info["pid"], listed["pid"])
        self.assertGreater(info["stats"]["vcpus"][0]["port_exits"], 0)
        self.assertRegex(self.ok("info", "web"), r"(?m)^state +running, for \d+s$")

        self.moves("web")
        self.assertEqual(self.ok("pause", "web"), "web: paused\n")
        self.assertEqual(self.json("pause", "web"), {"name": "web", "state": "paused"})
        still = self.json("info", "web")
        self.assertEqual((still["state"], still["held_by"]), ("paused", ["user"]))
        for _ in range(5):
            time.sleep(0.02)
            self.assertEqual(self.json("info", "web")["guest_seconds"], still["guest_seconds"])
        self.assertEqual(self.instructions("web"), still["stats"]["vcpus"][0]["instructions"])
        self.refused(["stop", "web"], "is paused", status=1)
        self.assertEqual(self.ok("resume", "web"), "web: running\n")
        self.assertEqual(self.ok("resume", "web"), "web: running\n")
        self.moves("web")

        self.assertEqual(self.ok("reset", "web"), "web: running\n")
        eventually(lambda: self.ok("logs", "web") == "R>R>")
        self.assertEqual(self.ok("stop", "web"), "web: powered off\n")
        self.assertEqual(self.json("ls"), [])
        self.assertEqual(list((self.runtime / "ringfort").iterdir()), [])
        # What it said stays.
        self.assertEqual(self.ok("logs", "web"), "R>R>")
        self.assertRegex(self.ok("logs", "--messages", "web"),
                         r"(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ringfort: web: ended with status 0$")
        self.refused(["info", "web"], "none runs")

    def test_stop_that_is_not_heard(self):
        self.start("deaf")
        self.type("deaf", "~")
        eventually(lambda: "~" in self.ok("logs", "deaf"))
        began = time.monotonic()
        self.assertEqual(self.json("stop", "deaf", "--timeout", "1"),
                         {"name": "deaf", "state": "ended", "cause": "user", "status": 1})
        self.assertGreater(time.monotonic() - began, 0.9)
        self.start("deaf")
        self.ok("pause", "deaf")
        self.assertEqual(self.ok("stop", "deaf", "--force"), "deaf: cut off\n")
        self.assertIn("ended with status 1", self.ok("logs", "--messages", "deaf"))

    def test_start_that_fails(self):
        """Errors of a detached start are seen where the command was given."""
        run = ["run", "--detach", "--name", "x"]
        self.refused([*run, "--kernel", "none"], "none")
        self.refused([*run, "--kernel", __file__], "test_control.py")
        self.refused([*run, "--kernel", self.guest, "--disk", "path=none.img"], "none.img")
        self.refused(["run", "--detach", "--kernel", self.guest, "--name", "a/b"], "did you mean --name a-b?")
        self.refused(["run", "--detach", "--kernel", self.guest, "--name", "-"], "did you mean --name server1?")
        self.assertEqual(self.json("ls"), [])
        self.start("x")
        self.refused([*run, "--kernel", self.guest], "a machine named x runs already", status=3)
        self.refused(["run", "--name", "x", "--kernel", self.guest], "give another --name", status=3)
        self.assertEqual(len(self.json("ls")), 1)
        self.ok("stop", "x", "--force")

    def test_killed(self):
        """What a killed machine leaves is no machine, and the name can be used at once."""
        self.start("gone")
        pid = self.json("ls")[0]["pid"]
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not pathlib.Path(f"/proc/{pid}/root").exists())
        self.assertTrue(self.socket("gone").exists())
        self.refused(["pause", "gone"], "none runs")
        self.assertEqual(self.ok("logs", "gone"), "R>")
        self.assertFalse(self.socket("gone").exists())
        self.start("gone")
        self.assertTrue((self.state / "ringfort/gone.console.old").exists())
        self.ok("stop", "gone")

    def test_foreground(self):
        """The verbs work for a machine that runs on a terminal's pipes as well."""
        p = subprocess.Popen([RINGFORT, "run", "--name", "front", "--memory", "16M", "--kernel", self.guest], env=self.env,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        with p:
            self.assertEqual(p.stdout.read(2), b"R>")
            self.assertEqual(self.ok("logs", "front"), "R>")
            p.stdin.write(b"a")
            p.stdin.flush()
            self.assertEqual(p.stdout.read(1), b"a")
            self.type("front", "b")
            self.assertEqual(p.stdout.read(1), b"b")
            self.assertEqual(self.json("logs", "front"), {"name": "front", "console": "R>ab"})
            self.refused(["logs", "--messages", "front"], "foreground", status=1)
            self.assertEqual(self.ok("stop", "front"), "front: powered off\n")
            self.assertEqual(p.wait(BOUND), 0)

    def test_without_a_console(self):
        self.ok("run", "--detach", "--name", "mute", "--memory", "16M", "--kernel", self.guest, "--console", "none")
        for args in (["console", "mute"], ["logs", "mute"]):
            self.refused(args, "has no console", status=1)
        self.ok("stop", "mute")

    def test_frozen_process(self):
        """A process that does not answer is shown as such, and does not hold up the list of the others."""
        self.start("ice")
        self.start("fine")
        pid = next(m["pid"] for m in self.json("ls") if m["name"] == "ice")
        os.kill(pid, signal.SIGSTOP)
        try:
            states = {m["name"]: m["state"] for m in self.json("ls")}
            self.assertEqual(states, {"ice": "unresponsive", "fine": "running"})
            self.assertRegex(self.ok("ls"), r"(?m)^ice +unresponsive ")
        finally:
            os.kill(pid, signal.SIGCONT)
        for name in ("ice", "fine"):
            self.ok("stop", name)


class Names(Machines):
    def test_prefixes(self):
        for name in ("web1", "web2", "db"):
            self.start(name)
        self.assertEqual(self.ok("pause", "d"), "db: paused\n")
        self.ok("resume", "db")
        for verb in (["info"], ["console"], ["pause"], ["resume"], ["stop"], ["reset"], ["logs"]):
            self.refused([*verb, "web"], "may mean web1, web2")
            self.refused([*verb, "wbe1"], "did you mean web1?")
            self.refused([*verb, "nothing-like-it"], "'ringfort ls' shows")
            self.refused([*verb, ""], "no machine is called ''")
            self.refused([*verb, "../web1"], "no machine is called")
            self.refused(verb, f"ringfort {verb[0]} NAME")
            self.refused([*verb, "db", "--xyzzy"], "--xyzzy")
            self.refused([*verb, "db", "web1"], "web1")
            self.refused([*verb, "db", "-o", "yaml"], "-o json")
        self.refused(["stop", "db", "--focre"], "did you mean --force?")
        self.refused(["stop", "db", "--timeout", "x"], "--timeout")
        self.refused(["stop", "db", "--timeout"], "--timeout SECONDS")
        self.refused(["ls", "db"], "db")
        self.assertEqual(sorted(m["name"] for m in self.json("ls")), ["db", "web1", "web2"])
        for name in ("web1", "web2", "db"):
            self.ok("stop", name, "--force")


class Terminal:
    """A command on a pseudo-terminal of its own."""

    def __init__(self, env, *args):
        self.master, slave = pty.openpty()
        import fcntl
        import termios
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen([RINGFORT, *map(str, args)], stdin=slave, stdout=slave, stderr=slave, env=env,
                                        start_new_session=True)
        self.text = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def expect(self, pattern):
        end = time.monotonic() + BOUND
        while not (found := re.search(pattern, self.text, re.S)):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.master], [], [], left)[0]:
                raise AssertionError(f"{pattern!r} not in {self.text!r}")
            self.text += os.read(self.master, 65536).decode(errors="replace")
        return found

    def type(self, data):
        os.write(self.master, data)

    def settings_are_back(self):
        import termios
        return termios.tcgetattr(self.slave) == self.before


class Console(Machines):
    def test_attach_and_leave(self):
        self.start("c")
        self.type("c", "old\x1b[6nline\n")
        eventually(lambda: "line" in self.ok("logs", "c"))
        with Terminal(self.env, "console", "c") as t, Terminal(self.env, "console", "c", "--history", "0") as u:
            # What was printed before, but for the question that this terminal would answer.
            t.expect(r"attached to c; Ctrl-\] leaves.*R>oldline")
            u.expect("attached to c")
            t.type(b"one\x03")
            t.expect("one\x03")
            u.expect("one\x03")
            u.type(b"two\x1b[6n")
            t.expect(r"two\x1b\[6n")
            self.assertNotIn("old", u.text)
            t.type(b"x\x1d")
            t.expect("left c")
            self.assertEqual(t.process.wait(BOUND), 0)
            self.assertTrue(t.settings_are_back())
            u.expect("x")
            u.type(b"still")
            u.expect("still")
            self.ok("stop", "c")
            u.expect("the machine has ended: c")
            self.assertEqual(u.process.wait(BOUND), 0)
            self.assertTrue(u.settings_are_back())

    def test_from_a_script(self):
        self.start("c")
        with subprocess.Popen([RINGFORT, "console", "c", "--history", "1"], env=self.env, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
            self.assertEqual(p.stdout.read(2), b"R>")
            p.stdin.write(b"a\x1db")             # Ctrl-] is a byte like others where there is no terminal
            p.stdin.close()
            self.assertEqual(p.stdout.read(3), b"a\x1db")
            self.ok("stop", "c")
            self.assertEqual((p.stdout.read(), p.stderr.read(), p.wait(BOUND)), (b"", b"", 0))

    def test_terminal_is_restored_by_signals(self):
        self.start("c")
        with Terminal(self.env, "console", "c") as t:
            t.expect("R>")
            self.assertFalse(t.settings_are_back())
            t.process.terminate()
            self.assertEqual(t.process.wait(BOUND), -signal.SIGTERM)
            self.assertTrue(t.settings_are_back())
        self.ok("stop", "c")

    def test_long_output(self):
        """More than the machine remembers is in the files; lines can be counted from the end."""
        self.start("c")
        with connect(self.socket("c")) as s:
            # Attached, and never reads: the guest is not held up by that.
            s.sendall(b"GET /v1/console?history=0 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
                      b"Upgrade: ringfort-console\r\n\r\n")
            self.assertTrue(s.recv(12).startswith(b"HTTP/1.1 101"))
            self.type("c", "#")
            file = self.state / "ringfort/c.console"
            eventually(lambda: file.stat().st_size > 3 << 20)
            self.ok("pause", "c")
            text = self.ok("logs", "c")
            self.assertGreater(len(text), 3 << 20)
            line = "".join(map(chr, range(0x30, 0x30 + 63))) + "\n"
            self.assertTrue(text.startswith("R>" + line * 1000))
            self.assertEqual(self.ok("logs", "c", "--lines", "3").count("\n"), text[-150:].count("\n") and
                             (3 if text.endswith("\n") else 2))
            status, log = self.request("c", "GET", "/v1/console/log")
            self.assertEqual((status, len(log)), (200, 1 << 20))
            self.assertTrue(text.encode().endswith(log[-100000:]))
            # The slow reader gets the newest of it, and then what comes.
            s.settimeout(BOUND)
            got = b""
            while not got.endswith(log[-1000:]):
                data = s.recv(1 << 16)
                self.assertTrue(data)
                got += data
            self.assertLess(len(got), 2 << 20)
        self.ok("stop", "c", "--force")


class Events(Machines):
    def test_stream(self):
        self.start("e")
        with self.events("e") as following:
            hello = following()
            self.assertEqual((hello["event"], hello["name"], hello["state"]), ("hello", "e", "running"))
            self.ok("pause", "e")
            self.ok("pause", "e")
            event = following()
            self.assertEqual((event["event"], event["state"], event["held_by"]), ("state", "paused", ["user"]))
            self.assertEqual(event["seq"], hello["next"])
            self.assertLess(abs(event["time"] - time.time()), BOUND)
            self.ok("resume", "e")
            self.assertEqual(following()["state"], "running")
            self.type("e", "@")
            self.assertEqual(following()["event"], "reset")
            eventually(lambda: self.ok("logs", "e").endswith("R>"))
            self.type("e", "!")
            self.assertEqual([following()["event"], following()["event"]], ["crash", "reset"])
            with self.events("e", f"/v1/events?since={hello['next']}") as again:
                self.assertEqual([again()["event"] for _ in range(4)], ["hello", "state", "state", "reset"])
            eventually(lambda: self.ok("logs", "e").endswith("R>"))
            self.ok("stop", "e")
            stopping, ended = following(), following()
            self.assertEqual((stopping["event"], stopping["timeout"]), ("stopping", 60))
            self.assertEqual((ended["event"], ended["cause"], ended["status"]), ("ended", "poweroff", 0))
            self.assertIsNone(following())

    def test_crash_that_ends(self):
        self.start("e", "--on-crash", "exit")
        with self.events("e") as following:
            following()
            self.type("e", "!")
            self.assertEqual(following()["event"], "crash")
            ended = following()
            self.assertEqual((ended["event"], ended["cause"], ended["status"]), ("ended", "crash", 4))
            self.assertIsNone(following())


class Protocol(Machines):
    def test_what_there_is(self):
        """The program's table and docs/openapi.yaml say the same."""
        self.start("p")
        status, index = self.request("p", "GET", "/v1")
        self.assertEqual(status, 200)
        routes = {(r["method"], r["path"]) for r in index["routes"]}
        described, path, arguments = set(), None, {}
        for line in (ROOT / "docs/openapi.yaml").read_text().partition("\ncomponents:")[0].splitlines():
            if m := re.match(r"  (/\S*):$", line):
                path = m[1]
            elif m := re.match(r"    (get|put|post|delete|patch):$", line):
                described.add((m[1].upper(), path))
                here = arguments.setdefault((m[1].upper(), path), set())
            elif m := re.match(r"        - name: (\w+)$", line) or re.match(r"                (\w+):$", line):
                here.add(m[1])
        self.assertEqual(routes, described)
        for r in index["routes"]:
            listed = set((r.get("arguments") or "").split())
            self.assertLessEqual(listed, arguments[r["method"], r["path"]], r)
            # Each is there: it is not 404 or 405, whatever else is wrong.
            if not r["path"].endswith("}") and r["path"] not in ("/v1/stop", "/v1/events"):
                status, answer = self.request("p", r["method"], r["path"] + "?nonsense=1" if r["method"] == "GET"
                                              else r["path"], None if r["method"] == "GET" else {"nonsense": 1})
                self.assertEqual(status, 400, r)
                self.assertIn("nonsense", answer["error"])
        self.ok("stop", "p")

    def test_bad_requests(self):
        self.start("p")
        for method, path, body, status, part in (
            ("GET", "/", None, 404, "GET /v1"),
            ("GET", "/v1/../v1/info", None, 404, ""),
            ("GET", "/v1/info%00", None, 404, ""),
            ("PUT", "/v1/info", {}, 405, "another method"),
            ("POST", "/v1/pause", b"{", 400, "not JSON"),
            ("POST", "/v1/pause", b"[]", 400, "must be a JSON object"),
            ("POST", "/v1/pause", b"\xff", 400, "not JSON"),
            ("POST", "/v1/pause", b"[" * 60000, 400, "not JSON"),
            ("POST", "/v1/pause", b'{"a": 1, "a": 2}', 400, "not JSON"),
            ("POST", "/v1/stop", {"forse": True}, 400, 'did you mean "force"?'),
            ("POST", "/v1/stop", {"timeout": -1}, 400, '"timeout" must be a number'),
            ("POST", "/v1/stop", {"timeout": 10 ** 30}, 400, ""),
            ("POST", "/v1/stop", {"force": "perhaps"}, 400, "true or false"),
            ("POST", "/v1/console/input", {}, 400, "missing"),
            ("POST", "/v1/console/input", {"text": 7}, 400, "must be a string"),
            ("POST", "/v1/console/input", b" " * 70000, 413, "65536"),
            ("GET", "/v1/console", None, 426, "Upgrade"),
            ("GET", "/v1/console/log?lines=x", None, 400, "lines"),
            ("GET", "/v1/jobs/1", None, 404, "no job 1"),
            ("DELETE", "/v1/jobs/99999999999999999999", None, 404, "no job"),
            ("GET", "/v1/jobs/a%2fb", None, 404, ""),
        ):
            got, answer = self.request("p", method, path, body)
            self.assertEqual(got, status, (method, path, answer))
            self.assertIn(part, answer["error"], (method, path))
        self.assertEqual(self.request("p", "GET", "/v1/jobs"), (200, {"jobs": []}))
        self.moves("p")
        self.ok("stop", "p")

    def raw(self, name, data):
        """What comes back until the connection ends."""
        with connect(self.socket(name)) as s:
            got = b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                s.sendall(data)
            with contextlib.suppress(ConnectionResetError):
                while more := s.recv(65536):
                    got += more
            return got

    def test_not_http(self):
        self.start("p")
        requests = (b"\0" * 100, b"hello\r\n\r\n", b"GET\r\n\r\n", b"GET /v1/info SPDY/9\r\n\r\n",
                     b"GET /v1/info HTTP/1.1\r\n\r\n",                  # no Host
                     b"GET /" + b"a" * 100000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
                     b"GET /v1/info HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100000 + b"\r\n\r\n",
                     b"GET /v1/info HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20000 + b"\r\n",
                     b"POST /v1/pause HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
                     b"POST /v1/pause HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
                     b"POST /v1/pause HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
                     b"POST /v1/pause HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"4000\r\n" +
                     b" " * 0x4000 + b"\r\n" + (b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 9 + b"0\r\n\r\n")
        # At once: some are waited for until their time is over.
        with concurrent.futures.ThreadPoolExecutor(len(requests)) as pool:
            for data, answer in zip(requests, pool.map(lambda data: self.raw("p", data), requests)):
                self.assertRegex(answer, rb"\A(HTTP/1\.[01] [45]\d\d |\Z)", data[:80])
        self.assertEqual(self.json("info", "p")["state"], "running")
        self.ok("stop", "p")

    def test_slow_and_many_clients(self):
        """Clients that send nothing, or byte after byte, are cut off; meanwhile the machine runs on."""
        self.start("p")
        began = time.monotonic()
        silent = [self.connected("p") for _ in range(64)]
        for s in silent[1::2]:
            with contextlib.suppress(BrokenPipeError):
                s.sendall(b"GET /v1/in")
        console = self.state / "ringfort/p.console"
        cpu = pathlib.Path(f"/proc/{(self.runtime / 'ringfort/p.lock').read_text().strip()}/stat")
        before = cpu.read_text()

        def trickle():
            with contextlib.suppress(OSError):
                while True:
                    silent[1].sendall(b"f")
                    time.sleep(0.2)
        t = threading.Thread(target=trickle)
        t.start()
        # All connections are taken; this one waits for its turn and gets it.
        status, answer = self.request("p", "GET", "/v1/info")
        self.assertEqual((status, answer["state"]), (200, "running"))
        self.assertGreater(time.monotonic() - began, 8)
        self.assertLess(time.monotonic() - began, 40)
        t.join(BOUND)
        self.assertFalse(t.is_alive())
        self.assertNotEqual(before, cpu.read_text())
        for s in silent:
            with contextlib.closing(s), contextlib.suppress(ConnectionResetError):
                self.assertEqual(s.recv(1), b"")
        self.assertEqual(console.read_text(), "R>")
        self.ok("stop", "p")

    def connected(self, name):
        """A connection, whether or not it is served."""
        s = socket.socket(socket.AF_UNIX)
        s.settimeout(BOUND)

        def attempt():
            with contextlib.suppress(BlockingIOError):      # the backlog is full
                s.connect(str(self.socket(name)))
                return True
        eventually(attempt)
        return s

    def test_followers_are_counted(self):
        self.start("p")
        with contextlib.ExitStack() as stack:
            for _ in range(32):
                stack.enter_context(self.events("p"))
            self.assertEqual(self.request("p", "GET", "/v1/events")[0], 503)
            self.assertEqual(self.request("p", "GET", "/v1/info")[0], 200)
        # Those that have gone are noticed.
        eventually(lambda: self.request_status("p", "/v1/events") == 200)
        self.ok("stop", "p")

    def request_status(self, name, path):
        c = UnixConnection(self.socket(name))
        with contextlib.closing(c):
            c.request("GET", path)
            return c.getresponse().status

    def test_another_user(self):
        if os.geteuid() != 0:
            self.skipTest("only root can be somebody else")
        self.start("p")
        # Let somebody else get at the socket, as a careless umask or chmod would.
        for path in (self.top, self.folder, self.runtime, self.runtime / "ringfort"):
            os.chmod(path, 0o755)
        os.chmod(self.socket("p"), 0o666)
        script = ("import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
                  "s.sendall(b'GET /v1/info HTTP/1.0\\r\\n\\r\\n'); print(len(s.recv(100)))")
        r = subprocess.run(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "python3", "-c", script,
                            str(self.socket("p"))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=BOUND)
        self.assertNotIn("HTTP", r.stdout)
        self.assertTrue(r.stdout.strip() == "0" or "Broken" in r.stderr or "reset" in r.stderr, r)
        # And a folder that others can look into is no longer trusted.
        self.refused(["info", "p"], "mode 0700", status=3)
        os.chmod(self.runtime / "ringfort", 0o700)
        self.assertIn("another user", self.ok("logs", "--messages", "p"))
        self.ok("stop", "p")


class Top(Machines):
    def test_samples(self):
        self.start("busy")
        self.start("still")
        self.ok("pause", "still")
        rows = {m["name"]: m for m in self.json("top")}
        self.assertGreater(rows["busy"]["cpu_percent"], 0)
        self.assertGreater(rows["busy"]["million_instructions_per_second"], 0)
        self.assertEqual(rows["still"]["million_instructions_per_second"], 0)
        self.assertEqual(rows["still"]["state"], "paused")
        self.assertRegex(self.ok("top"), r"(?m)^NAME .*SENT/s\nbusy +running .*\nstill +paused .*\n\Z")
        with Terminal(self.env, "top") as t:
            t.expect("busy +running.*still +paused.*busy +running")
            self.assertLessEqual(max(map(len, re.sub(r"\x1b\[\w*", "", t.text).split("\r\n"))), 100)
            t.type(b"q")
            self.assertEqual(t.process.wait(BOUND), 0)
            self.assertTrue(t.settings_are_back())
        for name in ("busy", "still"):
            self.ok("stop", name, "--force")
        self.assertIn("no machine runs", self.ok("top"))


if __name__ == "__main__":
    unittest.main(verbosity=2)
