"""A virtio-pci driver for tests (virtio 1.2 §4.1 and §2.7): small, and able to do everything wrong."""

import struct

from devtest import RINGS

COMMON, NOTIFY, ISR, DEVICE, PCI_CFG = 1, 2, 3, 4, 5
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
NEXT, WRITE, INDIRECT = 1, 2, 4
F_INDIRECT, F_EVENT_IDX, F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
NO_VECTOR = 0xFFFF

# Offsets in the common configuration.
DFSELECT, DF, GFSELECT, GF, MSIX, NUMQ, STATUS, CFGGEN = 0, 4, 8, 12, 16, 18, 20, 21
QSELECT, QSIZE, QMSIX, QENABLE, QNOTIFY, QDESC, QAVAIL, QUSED = 22, 24, 26, 28, 30, 32, 40, 48


class Queue:
    """A split virtqueue in guest memory. Nothing keeps a test from writing to it directly."""

    def __init__(self, device, index, size, vector, at):
        self.device, self.m, self.index, self.size = device, device.m, index, size
        self.desc = at
        self.avail = at + 16 * size
        self.used = (self.avail + 6 + 2 * size + 3) & ~3
        self.end = (self.used + 6 + 8 * size + 15) & ~15
        self.next_desc = self.avail_idx = self.seen = 0
        self.m.ask(f"memset {at:#x} {self.end - at} 0")
        d = device
        d.common(QSELECT, index, 2)
        d.common(QSIZE, size, 2)
        d.common(QMSIX, vector, 2)
        d.common(QDESC, self.desc, 8)
        d.common(QAVAIL, self.avail, 8)
        d.common(QUSED, self.used, 8)
        d.common(QENABLE, 1, 2)
        self.notify_at = d.where[NOTIFY][0] + d.common(QNOTIFY, size=2) * d.notify_multiplier

    def put_desc(self, n, address, length, flags=0, following=0, table=None):
        table = self.desc if table is None else table
        self.m.write(table + 16 * n, struct.pack("<QIHH", address & (2**64 - 1), length, flags, following))

    def put_avail(self, head):
        self.m.write(self.avail + 4 + 2 * (self.avail_idx % self.size), struct.pack("<H", head))
        self.avail_idx = (self.avail_idx + 1) % 65536
        self.m.write(self.avail + 2, struct.pack("<H", self.avail_idx))

    def add(self, *segments):
        """Makes segments (address, length, flags) one chain and available. Returns its head."""
        head = self.next_desc
        for i, (address, length, flags) in enumerate(segments):
            n = (head + i) % self.size
            last = i == len(segments) - 1
            self.put_desc(n, address, length, flags | (0 if last else NEXT), (n + 1) % self.size)
        self.next_desc = (head + len(segments)) % self.size
        self.put_avail(head)
        return head

    def kick(self):
        self.m.store(self.notify_at, self.index, 2)

    def used_idx(self):
        return struct.unpack("<H", self.m.read(self.used + 2, 2))[0]

    def wait_used(self):
        """The next chain that comes back: (head, written)."""
        self.m.poll(lambda: self.used_idx() != self.seen, "a used buffer")
        head, length = struct.unpack("<II", self.m.read(self.used + 4 + 8 * (self.seen % self.size), 8))
        self.seen = (self.seen + 1) % 65536
        return head, length

    def run(self, *segments):
        head = self.add(*segments)
        self.kick()
        used, length = self.wait_used()
        if used != head:
            raise AssertionError(f"chain {head} went in, {used} came out")
        return length


class Device:
    """The virtio function at a slot; type is the virtio device type that is expected there."""

    def __init__(self, m, slot, ram=RINGS):
        self.m, self.slot, self.next_ram = m, slot, ram
        self.where, self.caps, self.notify_multiplier = {}, {}, 0
        at = m.config_read(slot, 0x34, 1)
        while at:
            self.caps.setdefault(m.config_read(slot, at, 1), []).append(at)
            at = m.config_read(slot, at + 1, 1)
        for at in self.caps.get(0x09, []):
            kind, bar = m.config_read(slot, at + 3, 1), m.config_read(slot, at + 4, 1)
            if kind == PCI_CFG:
                self.pci_cfg = at
                continue
            offset, length = m.config_read(slot, at + 8), m.config_read(slot, at + 12)
            self.where[kind] = (self.bar(bar) + offset, length)
            if kind == NOTIFY:
                self.notify_multiplier = m.config_read(slot, at + 16)
        self.msix_cap = self.caps[0x11][0]
        table, pba = m.config_read(slot, self.msix_cap + 4), m.config_read(slot, self.msix_cap + 8)
        self.msix_table = self.bar(table & 7) + (table & ~7)
        self.msix_pba = self.bar(pba & 7) + (pba & ~7)
        self.vectors = (m.config_read(slot, self.msix_cap + 2, 2) & 0x7FF) + 1

    @property
    def type(self):
        return self.m.config_read(self.slot, 2, 2) - 0x1040

    def bar(self, n):
        low = self.m.config_read(self.slot, 0x10 + 4 * n)
        high = self.m.config_read(self.slot, 0x14 + 4 * n) if low & 6 == 4 else 0
        return low & ~15 | high << 32

    def common(self, offset, value=None, size=4):
        at = self.where[COMMON][0] + offset
        if value is None:
            return self.m.load(at, size)
        return self.m.store(at, value, size)

    def config(self, offset, size=4):
        return self.m.load(self.where[DEVICE][0] + offset, size)

    @property
    def status(self):
        return self.common(STATUS, size=1)

    @status.setter
    def status(self, value):
        self.common(STATUS, value, 1)

    def features(self):
        value = 0
        for half in (0, 1):
            self.common(DFSELECT, half)
            value |= self.common(DF) << (32 * half)
        return value

    def negotiate(self, wanted=0):
        """Reset, and up to FEATURES_OK with those of the wanted features that are offered."""
        self.status = 0
        self.status = ACKNOWLEDGE
        self.status = ACKNOWLEDGE | DRIVER
        chosen = self.features() & (wanted | F_VERSION_1)
        for half in (0, 1):
            self.common(GFSELECT, half)
            self.common(GF, chosen >> (32 * half) & 0xFFFFFFFF)
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        if not self.status & FEATURES_OK:
            raise AssertionError("the device does not accept its own features")
        return chosen

    def alloc(self, length, align=16):
        at = (self.next_ram + align - 1) & ~(align - 1)
        self.next_ram = at + length
        return at

    def queue(self, index, size=16, vector=NO_VECTOR):
        q = Queue(self, index, size, vector, self.alloc(0))
        self.next_ram = q.end
        return q

    def go(self):
        self.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK

    def start(self, queues=1, size=16, features=F_INDIRECT):
        self.negotiate(features)
        qs = [self.queue(n, size) for n in range(queues)]
        self.go()
        return qs

    def enable_msix(self, vectors=None, base=0x50, cpu=0):
        for n in range(self.vectors if vectors is None else vectors):
            self.set_vector(n, base + n, cpu)
        self.m.config_write(self.slot, self.msix_cap + 2, 0x8000, 2)

    def set_vector(self, n, vector, cpu=0, masked=0):
        self.m.store(self.msix_table + 16 * n, 0xFEE00000 | cpu << 12)
        self.m.store(self.msix_table + 16 * n + 4, 0)
        self.m.store(self.msix_table + 16 * n + 8, vector)
        self.m.store(self.msix_table + 16 * n + 12, masked)
