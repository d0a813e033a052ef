"""Client of the device test protocol (docs/device-tests.md), and what the tests share.

Each test starts its own machine (DEVICE_HARNESS names the program) and talks to it over a pipe.
Nothing sleeps: a device that works in its own time is waited for by wait_irq or by poll().
"""

import os
import subprocess
import tempfile
import unittest

IOAPIC = 0xFEC00000
RINGS, RINGS_SIZE = 0x100000, 0x40000       # where the tests keep virtqueues and buffers
GSI_SERIAL, GSI_RTC, GSI_GED = 4, 8, 9
LEVEL, MASKED, LOGICAL, REMOTE_IRR = 1 << 15, 1 << 16, 1 << 11, 1 << 14


class Refused(Exception):
    """The machine answered ERR."""


class Machine:
    def __init__(self, *options, cpus=2):
        self.process = subprocess.Popen(
            [os.environ["DEVICE_HARNESS"], "--cpus", str(cpus), *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self):
        """Ends the machine; its exit status tells of sanitizer reports and crashes."""
        if self.process.poll() is None:
            self.process.stdin.close()
        self.process.stdout.close()
        status = self.process.wait(timeout=30)
        if status:
            raise AssertionError(f"the machine ended with status {status}")

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
        else:
            self.process.kill()
            self.process.wait()

    def ask(self, line):
        """One request; returns the words after OK."""
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().decode()
        if not answer.endswith("\n"):
            raise AssertionError(f"the machine ended at: {line[:200]} (status {self.process.wait()})")
        words = answer.split()
        if words[0] == "ERR":
            raise Refused(answer[4:].strip())
        return words[1:]

    def batch(self, lines):
        """Many short requests at once, whatever the answers are."""
        self.process.stdin.write("".join(line + "\n" for line in lines).encode())
        self.process.stdin.flush()
        for line in lines:
            if not self.process.stdout.readline().endswith(b"\n"):
                raise AssertionError(f"the machine ended at or after: {line} (status {self.process.wait()})")

    def number(self, line):
        return int(self.ask(line)[0], 0)

    # Ports, MMIO and RAM as a vCPU sees them; size in bytes.
    def port_in(self, port, size=1):
        return self.number(f"in{ {1: 'b', 2: 'w', 4: 'l'}[size]} {port:#x}")

    def port_out(self, port, value, size=1):
        self.ask(f"out{ {1: 'b', 2: 'w', 4: 'l'}[size]} {port:#x} {value:#x}")

    def load(self, address, size=4):
        return self.number(f"read{ {1: 'b', 2: 'w', 4: 'l', 8: 'q'}[size]} {address:#x}")

    def store(self, address, value, size=4):
        self.ask(f"write{ {1: 'b', 2: 'w', 4: 'l', 8: 'q'}[size]} {address:#x} {value:#x}")

    def read(self, address, length):
        return bytes.fromhex(self.ask(f"read {address:#x} {length}")[0][2:])

    def write(self, address, data):
        self.ask(f"write {address:#x} 0x{bytes(data).hex()}")

    def config_read(self, slot, offset, size=4):
        return self.number(f"config_read{ {1: 'b', 2: 'w', 4: 'l', 8: 'q'}[size]} {slot} {offset:#x}")

    def config_write(self, slot, offset, value, size=4):
        self.ask(f"config_write{ {1: 'b', 2: 'w', 4: 'l', 8: 'q'}[size]} {slot} {offset:#x} {value:#x}")

    # Interrupts and the clock.
    def step(self, ns):
        return self.number(f"clock_step {ns}")

    def irqs(self):
        return self.ask("irqs")

    def wait_irq(self, ms=20000):
        """The interrupts since the last question; waits until there is one. [] when there was none in time."""
        return self.ask(f"wait_irq {ms}")

    def gsi(self, n):
        return self.number(f"gsi {n}")

    def lapic(self, cpu, offset, value=None):
        if value is None:
            return self.number(f"lapic_read {cpu} {offset:#x}")
        return self.ask(f"lapic_write {cpu} {offset:#x} {value:#x}")

    def rdmsr(self, cpu, msr):
        return self.number(f"rdmsr {cpu} {msr:#x}")

    def wrmsr(self, cpu, msr, value):
        self.ask(f"wrmsr {cpu} {msr:#x} {value:#x}")

    def pending(self, cpu=0):
        word = self.ask(f"pending {cpu}")[0]
        return None if word == "none" else int(word, 0)

    def ack(self, cpu=0):
        word = self.ask(f"ack {cpu}")[0]
        return None if word == "none" else int(word, 0)

    def eoi(self, cpu=0):
        self.lapic(cpu, 0xB0, 0)

    def take(self, cpu=0):
        """Takes and ends every interrupt that is there, in the order of delivery."""
        vectors = []
        while (vector := self.ack(cpu)) is not None:
            vectors.append(vector)
            self.eoi(cpu)
            if len(vectors) > 1000:
                raise AssertionError("interrupts without end")
        return vectors

    def signals(self, cpu):
        return dict(word.split(":", 1) for word in self.ask(f"signals {cpu}"))

    def enable_lapics(self, cpus=2):
        for cpu in range(cpus):
            self.lapic(cpu, 0xF0, 0x1FF)

    def ioapic(self, register, value=None):
        self.store(IOAPIC, register)
        if value is None:
            return self.load(IOAPIC + 0x10)
        return self.store(IOAPIC + 0x10, value)

    def route(self, gsi, vector, flags=0, dest=0):
        self.ioapic(0x11 + 2 * gsi, dest << 24)
        self.ioapic(0x10 + 2 * gsi, vector | flags)

    # Saved state.
    def save(self):
        return self.ask("save")[0]

    def load_state(self, state):
        self.ask(f"load {state}")

    def event(self):
        return self.ask("event")

    def poll(self, condition, what):
        """For what comes about in the machine's event loop: each request lets it go round once."""
        for _ in range(200000):
            value = condition()
            if value:
                return value
        raise AssertionError(f"this did not come about: {what}")


def state_fields(state, path=""):
    """Saved state (text or bytes) as {path of a field: bytes}, for messages about differences."""
    data = bytes.fromhex(state[2:]) if isinstance(state, str) else state
    fields, at = {}, 0
    while at < len(data):
        kind, length = data[at:at + 1], data[at + 1]
        name = path + "/" + data[at + 2:at + 2 + length].decode()
        at += 2 + length + (4 if kind == b"S" else 0)
        size = int.from_bytes(data[at:at + 4], "little")
        body = data[at + 4:at + 4 + size]
        fields.update(state_fields(body, name) if kind == b"S" else {name: body})
        at += 4 + size
    return fields


class Case(unittest.TestCase):
    """A machine per test, which must end cleanly; and a folder for files."""

    options = ()
    cpus = 2

    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="ringfort-device-")
        self.addCleanup(self.folder.cleanup)
        self.m = self.machine(*self.options)

    def machine(self, *options, cpus=None):
        m = Machine(*options, cpus=cpus or self.cpus)
        self.addCleanup(m.close)
        return m

    def path(self, name):
        return os.path.join(self.folder.name, name)

    def check_round_trip(self, *options):
        """Saved, loaded into a fresh machine and saved again gives the same bytes."""
        state = self.m.save()
        other = self.machine(*(options or self.options))
        self.assertNotEqual(other.save(), state, "the test must first change something")
        other.write(RINGS, self.m.read(RINGS, RINGS_SIZE))  # a state is of devices; the rings are in RAM
        other.load_state(state)
        again = other.save()
        if again != state:
            was, now = state_fields(state), state_fields(again)
            self.fail("saved, loaded and saved again differs in: " + ", ".join(
                f"{k}: {was.get(k, b'').hex()} now {now.get(k, b'').hex()}"
                for k in sorted(was | now) if was.get(k) != now.get(k)))
        return other
