"""The virtio devices: that they work, and that a guest that breaks every rule hurts itself alone."""

import random
import socket
import struct
import unittest

from devtest import *
from virtio import *

RAM_END = 64 << 20
SECTOR = 512
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2


class Blk(Case):
    sectors = 2048

    def setUp(self):
        self.addCleanup(lambda: None)
        super().setUp()
        self.m.close()
        self.disk = self.path("disk")
        self.content = random.Random(5).randbytes(self.sectors * SECTOR)
        with open(self.disk, "wb") as f:
            f.write(self.content)
        self.options = ("--disk", self.disk)
        self.m = self.machine(*self.options)
        self.d = Device(self.m, 1)
        self.q, = self.d.start(features=2**64 - 1)
        self.header = self.d.alloc(16)
        self.status = self.d.alloc(1)
        self.data = self.d.alloc(0x20000, 4096)

    def request(self, kind, sector, *data):
        self.m.write(self.header, struct.pack("<IIQ", kind, 0, sector))
        self.m.write(self.status, b"\xff")
        written = self.q.run((self.header, 16, 0), *data, (self.status, 1, WRITE))
        return self.m.read(self.status, 1)[0], written

    def test_configuration(self):
        self.assertEqual(self.d.type, 2)
        self.assertEqual(self.d.config(0, 8), self.sectors)

    def test_read_and_write(self):
        for sector, count in ((0, 1), (7, 8), (2047, 1), (100, 200)):
            status, written = self.request(IN, sector, (self.data, count * SECTOR, WRITE))
            self.assertEqual((status, written), (OK, count * SECTOR + 1))
            self.assertEqual(self.m.read(self.data, count * SECTOR),
                             self.content[sector * SECTOR:(sector + count) * SECTOR])
        new = random.Random(6).randbytes(3 * SECTOR)
        self.m.write(self.data, new)
        self.assertEqual(self.request(OUT, 20, (self.data, SECTOR, 0),
                                      (self.data + SECTOR, 2 * SECTOR, 0))[0], OK)
        self.assertEqual(self.request(FLUSH, 0)[0], OK)
        with open(self.disk, "rb") as f:
            self.assertEqual(f.read(), self.content[:20 * SECTOR] + new + self.content[23 * SECTOR:])

    def test_split_at_odd_places(self):
        parts = [1, 511, 3, 1000, 1557]
        at = self.data
        segments = []
        for n in parts:
            segments.append((at, n, WRITE))
            at += n + 5
        self.assertEqual(self.request(IN, 9, *segments)[0], OK)
        got = b"".join(self.m.read(a, n) for a, n, _ in segments)
        self.assertEqual(got, self.content[9 * SECTOR:9 * SECTOR + len(got)])

    def test_outside_the_disk(self):
        for kind, flags in ((IN, WRITE), (OUT, 0)):
            for sector, length in ((2048, 512), (2047, 1024), (2**63, 512), (2**64 - 1, 512),
                                   (2**55 - 1, 512)):
                self.assertEqual(self.request(kind, sector, (self.data, length, flags))[0], IOERR)
        for kind in (DISCARD, WRITE_ZEROES):
            for sector, count in ((2047, 2), (2**64 - 1, 1), (2**63, 2**32 - 1), (0, 2**32 - 1)):
                self.m.write(self.data, struct.pack("<QII", sector, count, 0))
                self.assertNotEqual(self.request(kind, 0, (self.data, 16, 0))[0], OK)
        with open(self.disk, "rb") as f:
            self.assertEqual(f.read(), self.content)

    def test_not_whole_sectors(self):
        self.assertEqual(self.request(IN, 0, (self.data, 100, WRITE))[0], IOERR)
        self.assertEqual(self.request(OUT, 0, (self.data, 513, 0))[0], IOERR)

    def test_unknown_requests(self):
        for kind in (3, 99, 2**32 - 1):
            self.assertEqual(self.request(kind, 0, (self.data, 512, WRITE))[0], UNSUPP)

    def test_zeroes_and_discard(self):
        self.m.write(self.data, struct.pack("<QII", 3, 2, 0))
        self.assertEqual(self.request(WRITE_ZEROES, 0, (self.data, 16, 0))[0], OK)
        self.assertEqual(self.request(IN, 3, (self.data, 1024, WRITE))[0], OK)
        self.assertEqual(self.m.read(self.data, 1024), bytes(1024))
        self.m.write(self.data, struct.pack("<QII", 3, 2, 0))
        self.assertIn(self.request(DISCARD, 0, (self.data, 16, 0))[0], (OK, UNSUPP))

    def test_serial_number(self):
        status, _ = self.request(GET_ID, 0, (self.data, 20, WRITE))
        self.assertEqual((status, self.m.read(self.data, 20)), (OK, b"harness".ljust(20, b"\0")))

    def test_many_at_once(self):
        """As many requests as descriptors allow, made available together."""
        self.q, = self.d.start(size=64)
        heads = {}
        for i in range(16):
            self.m.write(self.header + 0, struct.pack("<IIQ", IN, 0, 0))
            header, status = self.d.alloc(16), self.d.alloc(1)
            self.m.write(header, struct.pack("<IIQ", IN, 0, 10 * i))
            heads[self.q.add((header, 16, 0), (self.data + 4096 * i, 4096, WRITE), (status, 1, WRITE))] = i
        self.q.kick()
        for _ in range(16):
            head, length = self.q.wait_used()
            i = heads.pop(head)
            self.assertEqual(length, 4097)
            self.assertEqual(self.m.read(self.data + 4096 * i, 4096), self.content[5120 * i:5120 * i + 4096])

    def test_read_only(self):
        m = self.machine("--readonly-disk", self.disk_copy())
        self.m, self.d = m, Device(m, 1)
        self.assertTrue(self.d.features() >> 5 & 1)
        self.q, = self.d.start(features=2**64 - 1)
        self.assertEqual(self.request(OUT, 0, (self.data, 512, 0))[0], IOERR)
        self.assertEqual(self.request(IN, 0, (self.data, 512, WRITE))[0], OK)

    def disk_copy(self):
        name = self.path("copy")
        with open(name, "wb") as f:
            f.write(self.content)
        return name

    def test_round_trip_and_going_on(self):
        self.assertEqual(self.request(IN, 1, (self.data, 512, WRITE))[0], OK)
        other = self.check_round_trip("--disk", self.disk_copy())
        self.m, self.d.m, self.q.m = other, other, other
        self.assertEqual(self.request(IN, 5, (self.data, 512, WRITE))[0], OK)
        self.assertEqual(other.read(self.data, 512), self.content[5 * 512:6 * 512])


class Net(Case):
    options = ("--net",)

    def setUp(self):
        super().setUp()
        self.d = Device(self.m, 1)
        self.rx, self.tx = self.d.start(2)
        self.out = self.d.alloc(4096)

    def send(self, frame):
        self.m.write(self.out, bytes(12) + frame)
        self.tx.run((self.out, 12 + len(frame), 0))

    def post(self, count=8, size=2048):
        for _ in range(count):
            at = self.d.alloc(size)
            self.buffers = getattr(self, "buffers", {})
            self.buffers[self.rx.add((at, size, WRITE))] = at
        self.rx.kick()

    def receive(self):
        head, length = self.rx.wait_used()
        return self.m.read(self.buffers[head], length)

    def test_echo(self):
        self.assertEqual(self.d.type, 1)
        self.post()
        for n in (60, 64, 1000, 1514):
            frame = random.Random(n).randbytes(n)
            self.send(frame)
            got = self.receive()
            self.assertEqual(got[12:12 + n], frame)

    def test_frames_wait_for_buffers(self):
        frame = random.Random(1).randbytes(100)
        self.send(frame)
        self.post(1)
        self.assertEqual(self.receive()[12:112], frame)

    def test_absurd_frames(self):
        """Too short for a header, empty, longer than any frame: dropped, and the next one passes."""
        self.post(8)
        for length in (1, 11, 12, 13):
            self.tx.run((self.out, length, 0))
        self.tx.run(*[(0x200000, 0x10000, 0)] * 8)
        frame = random.Random(2).randbytes(90)
        self.send(frame)
        for _ in range(8):
            if self.receive()[12:102] == frame:
                return
        self.fail("the good frame did not come back")

    def test_headers_that_lie(self):
        """Checksum and segmentation fields that point beyond the frame, without having been negotiated or not."""
        rng = random.Random(9)
        self.rx, self.tx = self.d.start(2, features=2**64 - 1)
        for _ in range(200):
            size = rng.choice((14, 60, 200, 1514))
            header = struct.pack("<BBHHHHH", rng.choice((0, 1, 2, 255)), rng.choice((0, 1, 3, 4, 0x81, 255)),
                                 *(rng.choice((0, 1, size, 0xFFFF, rng.randrange(65536))) for _ in range(5)))
            self.m.write(self.out, header + rng.randbytes(size))
            self.tx.run((self.out, 12 + size, 0))
            self.assertFalse(self.d.status & FAILED)

    def test_round_trip(self):
        self.post(2)
        self.send(bytes(60))
        self.receive()
        self.check_round_trip()


class Console(Case):
    def setUp(self):
        super().setUp()
        self.m.close()
        self.options = ("--virtio-console", "unix:" + self.path("line"))
        self.m = self.machine(*self.options)
        self.m.ask("ping")
        self.line = socket.socket(socket.AF_UNIX)
        self.addCleanup(self.line.close)
        self.line.settimeout(20)
        self.line.connect(self.path("line"))
        self.d = Device(self.m, 1)
        self.rx, self.tx = self.d.start(2)
        self.buffer = self.d.alloc(4096)

    def test_output(self):
        self.m.write(self.buffer, b"hello")
        self.tx.run((self.buffer, 2, 0), (self.buffer + 2, 3, 0))
        got = b""
        self.line.setblocking(False)
        for _ in range(200000):
            self.m.ask("ping")
            try:
                got += self.line.recv(100)
            except BlockingIOError:
                continue
            if got == b"hello":
                return
        self.fail(f"got {got}")

    def test_input(self):
        self.line.sendall(b"some input")
        self.rx.add((self.buffer, 4, WRITE))
        self.rx.add((self.buffer + 100, 50, WRITE))
        self.rx.kick()
        got = b""
        while len(got) < 10:
            head, length = self.rx.wait_used()
            got += self.m.read(self.buffer + 100 * head, length)
        self.assertEqual(got, b"some input")


class Rng(Case):
    options = ("--rng",)

    def test_random(self):
        d = Device(self.m, 1)
        q, = d.start()
        at = d.alloc(4096)
        self.assertEqual(q.run((at, 1000, WRITE), (at + 2000, 24, WRITE)), 1024)
        data = self.m.read(at, 1000)
        self.assertGreater(len(set(data)), 200)
        self.assertEqual(self.m.read(at + 1000, 1000), bytes(1000))

    def test_dma_needs_bus_mastering(self):
        d = Device(self.m, 1)
        q, = d.start()
        at = d.alloc(64)
        self.m.config_write(1, 4, 2, 2)
        q.add((at, 64, WRITE))
        q.kick()
        for _ in range(50):
            self.m.ask("ping")
        self.assertEqual((q.used_idx(), self.m.read(at, 64)), (0, bytes(64)))
        self.m.config_write(1, 4, 6, 2)
        q.kick()
        q.wait_used()


class Transport(Case):
    options = ("--rng", "--net")

    def setUp(self):
        super().setUp()
        self.d = Device(self.m, 2)

    def test_features_need_version_1(self):
        d = self.d
        d.status = 0
        d.status = ACKNOWLEDGE | DRIVER
        self.assertTrue(d.features() & F_VERSION_1)
        d.common(GFSELECT, 0), d.common(GF, d.features() & 0xFFFFFFFF)
        d.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        self.assertFalse(d.status & FEATURES_OK)

    def test_features_that_are_not_offered(self):
        d = self.d
        offered = d.features()
        for bit in range(64):
            if offered >> bit & 1:
                continue
            d.status = 0
            d.status = ACKNOWLEDGE | DRIVER
            for half in (0, 1):
                d.common(GFSELECT, half)
                d.common(GF, (F_VERSION_1 | 1 << bit) >> (32 * half) & 0xFFFFFFFF)
            d.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
            self.assertFalse(d.status & FEATURES_OK, bit)

    def test_round_trip_in_the_midst_of_negotiation(self):
        d = self.d
        d.status = 0
        d.status = ACKNOWLEDGE | DRIVER
        d.common(GFSELECT, 1), d.common(GF, 0xFFFFFFFF)
        self.check_round_trip()

    def test_loading_over_a_raised_line(self):
        d = Device(self.m, 1)
        fresh = self.m.save()
        q, = d.start()
        q.run((d.alloc(64), 64, WRITE))
        self.assertEqual(self.m.gsi(17), 1)
        raised = self.m.save()
        self.m.load_state(fresh)
        self.assertEqual(self.m.save(), fresh)
        self.assertEqual(self.m.gsi(17), 0)
        self.m.load_state(raised)
        self.assertEqual(self.m.gsi(17), 1)
        self.m.load_state(raised)
        self.assertEqual(self.m.load(d.where[ISR][0], 1), 1)
        self.assertEqual(self.m.gsi(17), 0)

    def test_reset_reads_zero(self):
        self.d.start(2)
        self.assertEqual(self.d.status, 15)
        self.d.status = 0
        self.assertEqual(self.d.status, 0)
        self.d.common(QSELECT, 0, 2)
        self.assertEqual(self.d.common(QENABLE, size=2), 0)

    def test_queues_that_are_not_there(self):
        d = self.d
        d.negotiate()
        for n in (3, 100, 0xFFFF):
            d.common(QSELECT, n, 2)
            self.assertEqual(d.common(QSIZE, size=2), 0)
            d.common(QENABLE, 1, 2)
            d.common(QDESC, 2**64 - 1, 8)
        d.go()
        for n in (5, 0xFFFF):
            self.m.store(d.where[NOTIFY][0], n, 2)
        self.assertFalse(d.status & NEEDS_RESET)

    def test_vectors_that_are_not_there(self):
        d = self.d
        for register in (MSIX, QMSIX):
            d.common(QSELECT, 0, 2)
            for vector in (d.vectors, 0x7FF, 0xFFFE):
                d.common(register, vector, 2)
                self.assertEqual(d.common(register, size=2), NO_VECTOR)
            d.common(register, d.vectors - 1, 2)
            self.assertEqual(d.common(register, size=2), d.vectors - 1)

    def test_configuration_access_capability(self):
        m, d = self.m, self.d
        at = d.pci_cfg
        m.config_write(2, at + 4, 0, 1)
        m.config_write(2, at + 8, STATUS)
        m.config_write(2, at + 12, 1)
        d.start(2)
        self.assertEqual(m.config_read(2, at + 16, 1), 15)
        m.config_write(2, at + 16, 0, 1)
        self.assertEqual(d.status, 0)
        for bar in (0, 1, 5, 6, 255):
            for offset in (0, 1, 0x1000, 0x7FFFFFFF, 0xFFFFFFFC, 0xFFFFFFFF):
                for length in (0, 1, 2, 3, 4, 5, 8, 2**32 - 1):
                    m.config_write(2, at + 4, bar, 1)
                    m.config_write(2, at + 8, offset)
                    m.config_write(2, at + 12, length)
                    for part, size in ((0, 4), (1, 2), (3, 1), (2, 4)):
                        m.config_read(2, at + 16 + part, size)
                        m.config_write(2, at + 16 + part, 0xFFFFFFFF, size)

    def test_every_register_at_every_width(self):
        rng = random.Random(4)
        for base, length in self.d.where.values():
            for offset in range(-8, min(length, 0x100) + 8):
                for size in (1, 2, 4, 8):
                    self.m.load(base + offset, size)
                    self.m.store(base + offset, rng.choice((0, 1, 0xFFFF, rng.getrandbits(64))), size)
        self.d.start(2)


class Hostile(Case):
    """Each kind of device gets rings that cannot be; it may want a reset, and works after it."""

    def setUp(self):
        super().setUp()
        self.m.close()
        disk = self.path("disk")
        with open(disk, "wb") as f:
            f.truncate(1 << 20)
        self.options = ("--disk", disk, "--net", "--virtio-console", "none", "--rng")
        self.m = self.machine(*self.options)

    def devices(self):
        for slot in (1, 2, 3, 4):
            for index in range(1 if slot in (1, 4) else 2):
                d = Device(self.m, slot)
                queues = d.start(1 if slot in (1, 4) else 2, features=2**64 - 1)
                d.other = queues[1 - index] if len(queues) > 1 else None
                yield d, queues[index]

    def settle(self, d, q):
        """Until the device has looked at what was notified: a queue is processed in one turn of the loop."""
        for _ in range(20):
            self.m.ask("ping")

    def check(self, broken, expect_reset=None):
        for d, q in self.devices():
            broken(d, q)
            q.kick()
            if d.type == 1 and q.index == 0:    # a receive queue is looked at when there is a frame
                d.other.add((RINGS + 0x3F000, 100, 0))
                d.other.kick()
            self.settle(d, q)
            if d.type == 3 and q.index == 0:    # on this line nothing ever comes
                continue
            if expect_reset is not None:
                self.assertEqual(bool(d.status & NEEDS_RESET), expect_reset, f"device type {d.type}")
            if d.type == 4:                     # and all is well after a reset
                q, = d.start()
                self.assertEqual(q.run((d.alloc(64), 64, WRITE)), 64)

    def test_chain_that_loops(self):
        def broken(d, q):
            q.put_desc(0, RINGS + 0x30000, 16, NEXT, 1)
            q.put_desc(1, RINGS + 0x30000, 16, NEXT, 0)
            q.put_avail(0)
        self.check(broken, True)

    def test_chain_onto_itself(self):
        def broken(d, q):
            q.put_desc(0, RINGS + 0x30000, 16, NEXT | WRITE, 0)
            q.put_avail(0)
        self.check(broken, True)

    def test_head_out_of_range(self):
        for head in (16, 0x7FFF, 0xFFFF):
            self.check(lambda d, q: q.put_avail(head), True)

    def test_next_out_of_range(self):
        def broken(d, q):
            q.put_desc(0, RINGS + 0x30000, 16, NEXT, 16)
            q.put_avail(0)
        self.check(broken, True)

    def test_available_index_that_jumps(self):
        self.check(lambda d, q: self.m.write(q.avail + 2, struct.pack("<H", 17)), True)
        self.check(lambda d, q: self.m.write(q.avail + 2, struct.pack("<H", 0x8000)), True)

    def test_addresses_outside_ram(self):
        for address, length in ((RAM_END, 16), (RAM_END - 8, 16), (2**64 - 8, 16), (2**64 - 1, 1),
                                (0xFEE00000, 16), (0, 2**32 - 1), (2**63, 2**32 - 1)):
            def broken(d, q):
                q.put_desc(0, address, length, WRITE if d.type == 4 else 0)
                q.put_avail(0)
            self.check(broken, True)

    def test_huge_lengths_inside_ram(self):
        def broken(d, q):
            for n in range(16):
                q.put_desc(n, 0x1000000, 0x2000000, (WRITE if n else 0) | (NEXT if n < 15 else 0), n + 1)
            q.put_avail(0)
        self.check(broken)

    def test_empty_descriptors(self):
        def broken(d, q):
            q.put_desc(0, RINGS, 0, NEXT, 1)
            q.put_desc(1, 0, 0, WRITE)
            q.put_avail(0)
        self.check(broken)

    def test_readable_after_writable(self):
        def broken(d, q):
            q.put_desc(0, RINGS + 0x30000, 16, NEXT | WRITE, 1)
            q.put_desc(1, RINGS + 0x30100, 16)
            q.put_avail(0)
        self.check(broken, True)

    def test_indirect_tables_that_cannot_be(self):
        table = RINGS + 0x38000
        cases = (
            (table, 0), (table, 15), (table, 17), (RAM_END - 16, 32), (2**64 - 16, 32), (table, 2**32 - 16),
        )
        for address, length in cases:
            def broken(d, q):
                q.put_desc(0, address, length, INDIRECT)
                q.put_avail(0)
            self.check(broken, True)

        def nested(d, q):
            q.put_desc(0, table, 16, INDIRECT, table=table)
            q.put_desc(0, table, 16, INDIRECT)
            q.put_avail(0)
        self.check(nested, True)

        def next_and_indirect(d, q):
            q.put_desc(0, table, 16, INDIRECT | NEXT, 1)
            q.put_avail(0)
        self.check(next_and_indirect, True)

        def next_outside(d, q):
            q.put_desc(0, RINGS + 0x30000, 16, NEXT, 3, table=table)
            q.put_desc(0, table, 32, INDIRECT)
            q.put_avail(0)
        self.check(next_outside, True)

    def test_rings_outside_ram(self):
        for desc, avail, used in ((RAM_END, 0, 0), (0, RAM_END - 2, 0), (0, 0, RAM_END - 4),
                                  (2**64 - 16, 2**64 - 2, 2**64 - 4), (1, 1, 1), (0xE0000000, 0, 0)):
            for slot in (1, 2, 3, 4):
                d = Device(self.m, slot)
                d.negotiate()
                d.common(QSELECT, 0, 2)
                d.common(QDESC, desc or RINGS, 8)
                d.common(QAVAIL, avail or RINGS + 0x1000, 8)
                d.common(QUSED, used or RINGS + 0x2000, 8)
                d.common(QENABLE, 1, 2)
                d.go()
                self.m.store(d.where[NOTIFY][0], 0, 2)
                self.settle(d, None)

    def test_rings_over_each_other(self):
        def broken(d, q):
            d.negotiate()
            d.common(QSELECT, 0, 2)
            for register in (QDESC, QAVAIL, QUSED):
                d.common(register, RINGS, 8)
            d.common(QENABLE, 1, 2)
            self.m.write(RINGS, b"\x01\x00\x01\x00" * 64)
            d.go()
        self.check(broken)

    def test_sizes_that_cannot_be(self):
        for slot in (1, 2, 3, 4):
            d = Device(self.m, slot)
            for size in (0, 3, 0x8000, 0xFFFF):
                d.negotiate()
                d.common(QSELECT, 0, 2)
                d.common(QSIZE, size, 2)
                for register in (QDESC, QAVAIL, QUSED):
                    d.common(register, RINGS, 8)
                d.common(QENABLE, 1, 2)
                d.go()
                self.m.store(d.where[NOTIFY][0], 0, 2)
                self.settle(d, None)

    def test_reset_with_work_under_way(self):
        d = Device(self.m, 1)
        for _ in range(50):
            q, = d.start()
            header = d.alloc(16)
            self.m.write(header, struct.pack("<IIQ", 0, 0, 0))
            for n in range(5):
                q.add((header, 16, 0), (RINGS + 0x30000, 4096, WRITE), (RINGS + 0x32000, 1, WRITE))
            q.kick()
            d.status = 0
            self.assertEqual(d.status, 0)
            d.next_ram = RINGS
        self.m.ask("reset")


if __name__ == "__main__":
    unittest.main()
