"""Random accesses to every device, with what a hostile guest would think of first.

DEVICE_FUZZ_SECONDS bounds the time (default 10); DEVICE_FUZZ_SEED repeats one round, whose seed a
failure names. Meant above all for builds with sanitizers; without, a crash or a hang is what it finds.
"""

import os
import random
import signal
import struct
import tempfile
import time
import unittest

from devtest import *
from virtio import *

RAM_END = 64 << 20
EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000,
         0xFFFFFFFF, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
PORTS = [*range(0x3F7, 0x401), 0x70, 0x71, 0x71, *range(0x5FF, 0x611), 0x64, *range(0xCF7, 0xD01), *range(0xDF, 0xED),
         *range(0x1FFF, 0x2019), 0x501]
MODES = "bwl"


class Round:
    """One machine and the random choices of one seed."""

    def __init__(self, m, seed):
        self.m, self.rng = m, random.Random(seed)
        self.lines = []
        self.devices = []
        for slot in (1, 2, 3, 4, 5):
            d = Device(m, slot)
            d.rings = d.start(1 if d.type in (2, 4) else 2, features=self.rng.choice((0, F_INDIRECT, 2**64 - 1)))
            d.next_ram = RINGS
            self.devices.append(d)
        self.state = m.save()

    def value(self):
        kind = self.rng.randrange(4)
        if kind == 0:
            return self.rng.choice(EDGES)
        if kind == 1:
            return 1 << self.rng.randrange(64)
        return self.rng.getrandbits(self.rng.choice((4, 8, 16, 32, 64)))

    def address(self):
        kind = self.rng.randrange(6)
        if kind < 3:
            return RINGS + self.rng.randrange(RINGS_SIZE)
        if kind == 3:
            return RAM_END - self.rng.randrange(64)
        return self.value()

    def mmio(self):
        rng = self.rng
        kind = rng.randrange(8)
        if kind == 0:
            return IOAPIC + rng.choice((0, 0x10, 0x40, rng.randrange(0x1000)))
        if kind == 1:
            return 0xE0000000 + (rng.randrange(6) << 15) + rng.randrange(0x1000)
        if kind == 2:
            return 0xFF000000 + rng.randrange(0x10010)
        d = rng.choice(self.devices)
        base, length = rng.choice([*d.where.values(), (d.msix_table, 64), (d.msix_pba, 8)])
        return base + rng.randrange(-4, min(length, 64) + 4)

    # Each makes request lines.

    def ports(self):
        r, mode = self.rng, self.rng.choice(MODES)
        port = r.choice(PORTS)
        if r.randrange(2):
            return [f"in{mode} {port}"]
        return [f"out{mode} {port} {self.value()}"]

    def memory_mapped(self):
        mode = self.rng.choice("bwlq")
        if self.rng.randrange(2):
            return [f"read{mode} {self.mmio()}"]
        return [f"write{mode} {self.mmio()} {self.value()}"]

    def config(self):
        mode, slot = self.rng.choice("bwlq"), self.rng.randrange(7)
        offset = self.rng.choice((4, 5, 16, 20, 24, 32, self.rng.randrange(256), self.rng.randrange(4096)))
        if self.rng.randrange(2):
            return [f"config_read{mode} {slot} {offset}"]
        return [f"config_write{mode} {slot} {offset} {self.value()}"]

    def apics(self):
        r = self.rng
        cpu = r.randrange(3)
        return [r.choice((
            f"lapic_write {cpu} {r.randrange(64) * 16} {self.value() & 0xFFFFFFFF}",
            f"lapic_write {cpu} {r.randrange(4096)} {self.value()}",
            f"lapic_read {cpu} {r.randrange(4096)}",
            f"lapic_write {cpu} 0xf0 0x1ff",
            f"wrmsr {cpu} {0x800 + r.randrange(64)} {self.value()}",
            f"rdmsr {cpu} {0x800 + r.randrange(64)}",
            f"wrmsr {cpu} 0x1b {0xFEE00000 | r.randrange(16) << 8}",
            f"wrmsr {cpu} 0x6e0 {self.value()}",
            f"msi {0xFEE00000 | r.getrandbits(20)} {self.value()}",
            f"cr8 {cpu} {r.randrange(16)}", f"ack {cpu}", f"pending {cpu}", f"lapic_write {cpu} 0xb0 0",
            f"init {cpu}", "nmi", "power_button",
        ))]

    def rings(self):
        """A chain that is nearly right, made available."""
        r = self.rng
        d = r.choice(self.devices)
        q = r.choice(d.rings)
        lines = []
        for n in range(r.randrange(1, 6)):
            flags = r.choice((NEXT, NEXT, NEXT | WRITE, WRITE, 0, INDIRECT, r.getrandbits(16)))
            desc = struct.pack("<QIHH", self.address() & (2**64 - 1),
                               r.choice((1, 16, 16, 512, 4096, self.value() & 0xFFFFFFFF)), flags,
                               r.choice((n + 1, n + 1, n + 1, r.randrange(16), self.value() & 0xFFFF)))
            lines.append(f"write {q.desc + 16 * n} 0x{desc.hex()}")
        if d.type == 2:
            request = struct.pack("<IIQ", r.choice((0, 1, 4, 8, 11, 13, self.value() & 0xFFFFFFFF)), 0, self.value())
            lines.append(f"write {RINGS + r.randrange(RINGS_SIZE - 16)} 0x{request.hex()}")
        lines.append(f"writew {q.avail + 4 + 2 * (q.avail_idx % q.size)} {r.choice((0, 0, 0, r.randrange(20)))}")
        q.avail_idx = (q.avail_idx + r.choice((1, 1, 1, 1, 0, 2, 16, r.getrandbits(16)))) % 65536
        lines += [f"writew {q.avail + 2} {q.avail_idx}", f"writew {q.avail} {r.randrange(2)}",
                  f"writew {q.notify_at} {q.index}"]
        return lines

    def ring_memory(self):
        q = self.rng.choice(self.rng.choice(self.devices).rings)
        at = q.desc + self.rng.randrange(q.end - q.desc)
        return [f"write {at} 0x{self.rng.randbytes(self.rng.choice((1, 2, 4, 8))).hex()}"]

    def drivers(self):
        """Through the life of a device, mostly in order."""
        r = self.rng
        d = r.choice(self.devices)
        at = d.where[COMMON][0]
        lines = [f"config_writew {d.slot} 4 6"]
        if r.randrange(3):
            lines += [f"writeb {at + STATUS} {s}" for s in (0, 1, 3)]
            lines += [f"writel {at + GFSELECT} 0", f"writel {at + GF} {self.value() & 0xFFFFFFFF}",
                      f"writel {at + GFSELECT} 1", f"writel {at + GF} {r.choice((1, 1, self.value() & 0xFFFFFFFF))}",
                      f"writeb {at + STATUS} 11"]
        for q in d.rings:
            lines += [f"writew {at + QSELECT} {q.index}", f"writew {at + QSIZE} {r.choice((16, 16, 8, self.value() & 0xFFFF))}",
                      f"writew {at + QMSIX} {r.choice((0, 1, 0xFFFF))}",
                      f"writeq {at + QDESC} {r.choice((q.desc, q.desc, self.address()))}",
                      f"writeq {at + QAVAIL} {r.choice((q.avail, q.avail, self.address()))}",
                      f"writeq {at + QUSED} {r.choice((q.used, q.used, self.address()))}",
                      f"writew {at + QENABLE} 1"]
            if r.randrange(2):
                lines += [f"writew {q.avail + 2} 0"]
                q.avail_idx = 0
        return lines + [f"writeb {at + STATUS} {r.choice((15, 15, 15, self.value() & 0xFF))}"]

    def time(self):
        return [f"clock_step {self.rng.choice((1, 1000, 10**6, 10**8))}"]

    def life(self):
        return [self.rng.choice(("reset", "assign_bars", "pause", "resume", "irqs", "event", "signals 0", "ping"))]

    def run(self, requests):
        kinds = [self.ports, self.memory_mapped, self.config, self.apics, self.rings, self.rings, self.ring_memory,
                 self.drivers, self.time]
        done = 0
        while done < requests:
            batch = []
            while len(batch) < 100:
                batch += self.life() if self.rng.randrange(100) == 0 else self.rng.choice(kinds)()
            self.lines = batch
            self.m.batch(batch)
            done += len(batch)
            if self.rng.randrange(8) == 0:
                self.states()

    def states(self):
        """What was saved can be loaded and is the same then; with faults in it, it is taken or refused."""
        if self.rng.randrange(2):
            self.lines = ["pause", "save", "load", "save"]
            self.m.ask("pause")
            self.state = self.m.save()
            self.m.load_state(self.state)
            again = self.m.save()
            if again != self.state:
                was, now = state_fields(self.state), state_fields(again)
                raise AssertionError("saved, loaded, saved: other values of " + ", ".join(
                    f"{k}: {was.get(k, b'').hex()} now {now.get(k, b'').hex()}"
                    for k in sorted(was | now) if was.get(k) != now.get(k)))
            self.m.ask("resume")
        data = bytearray(bytes.fromhex(self.state[2:]))
        for _ in range(self.rng.choice((0, 1, 1, 2, 8))):
            data[self.rng.randrange(len(data))] = self.rng.getrandbits(8)
        if self.rng.randrange(8) == 0:
            del data[self.rng.randrange(len(data)):]
        self.lines = ["load"]
        try:
            self.m.ask("load 0x" + bytes(data).hex())
        except Refused:
            pass


class Fuzz(Case):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory(prefix="ringfort-device-")
        self.addCleanup(self.folder.cleanup)
        self.disk = self.path("disk")
        with open(self.disk, "wb") as f:
            f.truncate(1 << 20)

    def one(self, seed):
        with Machine("--disk", self.disk, "--net", "--virtio-console", "none", "--rng", "--net") as m:
            fuzz = Round(m, seed)
            signal.alarm(60)
            try:
                fuzz.run(4000)
                m.ask("ping")
            except BaseException:
                print(f"\nDEVICE_FUZZ_SEED={seed}; the last requests were:", *fuzz.lines[-40:], sep="\n  ")
                raise
            finally:
                signal.alarm(0)

    def test_rounds(self):
        if "DEVICE_FUZZ_SEED" in os.environ:
            self.one(int(os.environ["DEVICE_FUZZ_SEED"]))
            return
        end = time.monotonic() + float(os.environ.get("DEVICE_FUZZ_SECONDS", "10"))
        seed = random.SystemRandom().getrandbits(32)
        rounds = 0
        while time.monotonic() < end:
            self.one(seed + rounds)
            rounds += 1
        print(f"{rounds} rounds, seeds {seed} to {seed + rounds - 1}")


def alarm(*_):
    raise AssertionError("a round takes more than a minute: something hangs")


if __name__ == "__main__":
    signal.signal(signal.SIGALRM, alarm)
    unittest.main()
