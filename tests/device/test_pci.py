"""PCI: both ways into configuration space, BARs, MSI-X and INTx, with virtio functions to try them on."""

import random
import unittest

from devtest import *
from virtio import *

ECAM = 0xE0000000
COMMAND, STATUS_WORD, BAR0, LINE, PIN = 4, 6, 0x10, 0x3C, 0x3D
IO, MEMORY, MASTER, INTX_OFF = 1, 2, 4, 0x400


class Config(Case):
    options = ("--rng",)

    def type1(self, slot, offset, size, value=None):
        self.m.port_out(0xCF8, 0x80000000 | slot << 11 | offset & 0xFC, 4)
        if value is None:
            return self.m.port_in(0xCFC + (offset & 3), size)
        return self.m.port_out(0xCFC + (offset & 3), value, size)

    def test_host_bridge(self):
        m = self.m
        self.assertEqual(m.config_read(0, 0), 0x00081B36)
        self.assertEqual(m.config_read(0, 8) >> 8, 0x060000)
        self.assertEqual(m.config_read(0, PIN, 1), 0)
        self.assertEqual(m.load(ECAM), 0x00081B36)

    def test_both_ways_see_the_same(self):
        m = self.m
        for slot in (0, 1, 2, 31):
            for offset in range(0, 256, 4):
                self.assertEqual(self.type1(slot, offset, 4), m.load(ECAM | slot << 15 | offset))
        for size in (1, 2, 4):
            for offset in range(0, 16):
                if (offset & 3) + size <= 4:
                    self.assertEqual(self.type1(1, offset, size),
                                     m.load(ECAM | 1 << 15 | offset, size))
        self.type1(1, LINE, 1, 0x5A)
        self.assertEqual(m.load(ECAM | 1 << 15 | LINE, 1), 0x5A)
        m.store(ECAM | 1 << 15 | LINE, 0xA5, 1)
        self.assertEqual(self.type1(1, LINE, 1), 0xA5)

    def test_nobody_there(self):
        m = self.m
        for address in (2 << 15, 1 << 15 | 1 << 12, 1 << 20, 0xFF << 20 | 1 << 15):
            self.assertEqual(m.load(ECAM | address), 0xFFFFFFFF)
            self.assertEqual(m.load(ECAM | address | 1, 1), 0xFF)
            m.store(ECAM | address, 0)
        m.port_out(0xCF8, 0x80010800, 4)                    # bus 1
        self.assertEqual(m.port_in(0xCFC, 4), 0xFFFFFFFF)

    def test_address_register(self):
        m = self.m
        m.port_out(0xCF8, 0xFFFFFFFF, 4)
        self.assertEqual(m.port_in(0xCF8, 4), 0x80FFFFFC)
        m.port_out(0xCF8, 0x80000800, 4)
        for port, value, size in ((0xCFB, 1, 1), (0xCF8, 0, 1), (0xCF8, 0, 2), (0xCFA, 0, 2),
                                  (0xCF7, 0, 4), (0xCFB, 0, 2), (0xCFA, 0, 4)):
            m.port_out(port, value, size)
            self.assertEqual(m.port_in(0xCF8, 4), 0x80000800)
        m.port_out(0xCF8, 0x00000800, 4)                    # not enabled
        self.assertEqual(m.port_in(0xCFC, 4), 0xFFFFFFFF)
        m.port_out(0xCFC, 0, 4)

    def test_end_of_configuration_space(self):
        m = self.m
        end = ECAM | 1 << 15 | 0x1000
        self.assertEqual(m.load(end - 4), 0)
        self.assertEqual(m.load(end - 2), 0xFFFF0000)       # beyond is another function
        self.assertEqual(m.load(end - 1, 8), 0xFFFFFFFFFFFFFF00)
        m.store(end - 3, 0xFFFFFFFF)
        m.store(end - 7, 0xFFFFFFFFFFFFFFFF, 8)
        self.assertEqual(m.load(end - 8, 8), 0)
        self.assertEqual(m.load(ECAM + 0xFFFFFFF, 8), 0xFFFFFFFFFFFFFFFF)

    def test_odd_accesses_read_the_same_bytes(self):
        m = self.m
        whole = [m.load(ECAM | 1 << 15 | n, 1) for n in range(0x50)]
        for size in (2, 4, 8):
            for offset in range(0x40):
                want = int.from_bytes(bytes(whole[offset:offset + size]), "little")
                self.assertEqual(m.load(ECAM | 1 << 15 | offset, size), want)

    def test_read_only_fields(self):
        m = self.m
        keep = [m.config_read(1, n) for n in (0, 8, 0x2C, 0x30, 0x34)]
        for n in (0, 8, 0x28, 0x2C, 0x30, 0x34):
            m.config_write(1, n, 0xFFFFFFFF)
        self.assertEqual([m.config_read(1, n) for n in (0, 8, 0x2C, 0x30, 0x34)], keep)
        m.config_write(1, COMMAND, 0xFFFF, 2)
        self.assertEqual(m.config_read(1, COMMAND, 2) & ~0x547, 0)
        before = m.config_read(1, STATUS_WORD, 2)
        m.config_write(1, STATUS_WORD, 0xFFFF, 2)
        self.assertEqual(m.config_read(1, STATUS_WORD, 2), before)

    def test_capabilities_end(self):
        d = Device(self.m, 1)
        self.assertLessEqual({COMMON, NOTIFY, ISR}, set(d.where))
        self.assertEqual(d.type, 4)
        express, = d.caps[0x10]
        self.assertEqual(self.m.config_read(1, express + 2, 2), 0x92)   # integrated endpoint, version 2
        self.m.config_write(1, express + 4, 0xFFFFFFFF)                 # capabilities are read-only
        self.assertEqual(self.m.config_read(1, express + 4), 0x8000)


class Bars(Case):
    options = ("--rng", "--rng")

    def setUp(self):
        super().setUp()
        m = self.m
        self.index = next(n for n in range(6) if m.config_read(1, BAR0 + 4 * n))
        self.reg = BAR0 + 4 * self.index
        self.at = [None, self.base(1), self.base(2)]

    def base(self, slot):
        return self.m.config_read(slot, self.reg) & ~15 | self.m.config_read(slot, self.reg + 4) << 32

    def move(self, slot, to):
        self.m.config_write(slot, self.reg, to & 0xFFFFFFFF)
        self.m.config_write(slot, self.reg + 4, to >> 32)

    def there(self, at):
        """Something answers at the BAR's address: the common configuration has queues."""
        return self.m.load(at + NUMQ, 2) == 1

    def test_assigned_in_the_window(self):
        self.assertGreaterEqual(self.at[1], 0x4000000000)
        self.assertNotEqual(self.at[1], self.at[2])
        self.assertEqual(self.m.config_read(1, COMMAND, 2) & 7, MEMORY | MASTER)
        self.assertTrue(self.there(self.at[1]) and self.there(self.at[2]))

    def test_sizing(self):
        m = self.m
        m.config_write(1, COMMAND, 0, 2)
        self.assertFalse(self.there(self.at[1]))
        low = m.config_read(1, self.reg)
        m.config_write(1, self.reg, 0xFFFFFFFF)
        m.config_write(1, self.reg + 4, 0xFFFFFFFF)
        mask = m.config_read(1, self.reg) & ~15 | m.config_read(1, self.reg + 4) << 32
        size = 2**64 - mask
        self.assertEqual(size & (size - 1), 0)
        self.assertGreaterEqual(size, 0x1000)
        self.assertEqual(m.config_read(1, self.reg) & 15, low & 15)
        self.move(1, self.at[1])
        m.config_write(1, COMMAND, MEMORY, 2)
        self.assertTrue(self.there(self.at[1]))

    def test_moving(self):
        for to in (0xC0000000, 0xD0000000, 0x7000000000, 0xFFFFF000000):
            old = self.base(1)
            self.move(1, to)
            self.assertTrue(self.there(to))
            self.assertFalse(self.there(old))

    def test_places_that_are_none(self):
        m = self.m
        for to in (0, 1 << 52, (1 << 64) - (1 << 20), 0xFEC00000, ECAM, ECAM - 0x1000, 0xFF000000):
            self.move(1, to)
            self.assertFalse(m.load(to + NUMQ, 2) == 1, hex(to))
        self.assertEqual(m.load(ECAM), 0x00081B36)
        m.store(IOAPIC, 1)
        self.assertEqual(m.load(IOAPIC + 0x10), 0x170020)
        self.move(1, 0xC0000000)
        self.assertTrue(self.there(0xC0000000))

    def test_overlap(self):
        m = self.m
        self.move(1, self.at[2])                            # the one that was there stays
        m.store(self.at[2] + MSIX, 0, 2)
        self.assertEqual(m.load(self.at[2] + MSIX, 2), 0)
        self.assertFalse(self.there(self.at[1]))
        self.move(2, 0xC0000000)                            # gone: the loser gets the place
        self.assertTrue(self.there(self.at[2]))
        self.assertTrue(self.there(0xC0000000))
        m.config_write(2, COMMAND, 0, 2)
        self.assertFalse(self.there(0xC0000000))

    def test_ram_comes_first(self):
        self.move(1, 0x100000)
        self.assertEqual(self.m.read(0x100000, 64), bytes(64))

    def test_many_moves(self):
        rng = random.Random(3)
        places = [0, ECAM, 0xFEC00000, 0xC0000000, 0xC0001000, 0x4000000000, 1 << 40, (1 << 52) - 4096,
                  (1 << 64) - 4096]
        for _ in range(2000):
            slot = rng.choice((1, 2))
            kind = rng.randrange(4)
            if kind == 0:
                self.m.config_write(slot, COMMAND, rng.randrange(8), rng.choice((1, 2)))
            elif kind == 1:
                self.move(slot, rng.choice(places))
            else:
                self.m.config_write(slot, self.reg + rng.randrange(8), rng.getrandbits(8), 1)
        for slot in (1, 2):
            self.m.config_write(slot, COMMAND, 0, 2)
        self.move(1, 0xC0000000), self.move(2, 0xC8000000)
        for slot in (1, 2):
            self.m.config_write(slot, COMMAND, MEMORY, 2)
        self.assertTrue(self.there(0xC0000000) and self.there(0xC8000000))

    def test_reset_and_assignment(self):
        m = self.m
        m.ask("reset")
        self.assertEqual(self.base(1), 0)
        self.assertEqual(m.config_read(1, COMMAND, 2), 0)
        self.assertFalse(self.there(self.at[1]))
        m.ask("assign_bars")
        self.assertEqual([None, self.base(1), self.base(2)], self.at)
        self.assertTrue(self.there(self.at[1]))

    def test_round_trip(self):
        m = self.m
        self.move(1, self.at[2])                            # lost to function 2
        m.config_write(2, LINE, 0x77, 1)
        m.port_out(0xCF8, 0x80001234, 4)
        other = self.check_round_trip()
        self.assertEqual(other.load(self.at[2] + NUMQ, 2), 1)
        self.assertEqual(other.load(self.at[1] + NUMQ, 2), 0xFFFF)
        self.move(2, 0xC0000000)
        self.check_round_trip()


class Interrupts(Case):
    options = ("--rng",)

    def setUp(self):
        super().setUp()
        m = self.m
        m.enable_lapics()
        self.d = Device(m, 1)
        self.buffer = self.d.alloc(64)

    def start(self, vector=NO_VECTOR):
        self.d.negotiate()
        self.q = self.d.queue(0, vector=vector)
        self.d.go()

    def work(self):
        self.q.run((self.buffer, 64, WRITE))

    def test_table(self):
        m, d = self.m, self.d
        for n in range(d.vectors):
            self.assertEqual([m.load(d.msix_table + 16 * n + 4 * i) for i in range(4)], [0, 0, 0, 1])
        m.store(d.msix_table, 0x11223344FEE01007, 8)
        m.store(d.msix_table + 8, 0xFFFFFFFF00000055, 8)
        self.assertEqual(m.load(d.msix_table, 8), 0x11223344FEE01004)
        self.assertEqual(m.load(d.msix_table + 8, 8), 0x0000000100000055)
        self.assertEqual(m.load(d.msix_table + 9, 1), 0)
        m.store(d.msix_table + 8, 0x66, 1)                  # too narrow: nothing
        self.assertEqual(m.load(d.msix_table + 8), 0x55)
        m.store(d.msix_table + 16 * d.vectors, 0xFFFFFFFF)
        m.store(d.msix_table + 16 * d.vectors - 4, 0xFFFFFFFFFFFFFFFF, 8)
        m.store(d.msix_pba, 0xFFFFFFFFFFFFFFFF, 8)
        self.assertEqual(m.load(d.msix_pba, 8), 0)

    def test_sending(self):
        m, d = self.m, self.d
        d.enable_msix(base=0x50, cpu=1)
        self.start(vector=1)
        self.work()
        self.assertEqual(m.irqs(), ["msi:0xfee01000:0x51"])
        self.assertEqual(m.take(1), [0x51])
        self.assertEqual(m.config_read(1, STATUS_WORD, 2) & 8, 0)

    def test_masks_make_it_pending(self):
        m, d = self.m, self.d
        d.enable_msix()
        self.start(vector=1)
        masks = [
            (lambda: d.set_vector(1, 0x51, masked=1), lambda: d.set_vector(1, 0x51)),
            (lambda: m.config_write(1, d.msix_cap + 2, 0xC000, 2),
             lambda: m.config_write(1, d.msix_cap + 2, 0x8000, 2)),
        ]
        for mask, unmask in masks:
            mask()
            self.work()
            self.assertEqual(m.load(d.msix_pba, 8), 2)
            self.assertEqual(m.load(d.msix_pba + 0, 1), 2)
            self.assertEqual(m.take(), [])
            unmask()
            self.assertEqual(m.take(), [0x51])
            self.assertEqual(m.load(d.msix_pba, 8), 0)

    def test_no_vector(self):
        m, d = self.m, self.d
        d.enable_msix()
        self.start(vector=NO_VECTOR)
        self.work()
        self.assertEqual(m.irqs(), [])
        self.assertEqual(m.take(), [])

    def test_intx(self):
        m, d = self.m, self.d
        m.route(17, 0x71, LEVEL)                            # slot 1, INTA
        self.assertEqual(m.config_read(1, LINE, 2), 0x0111)
        self.start()
        self.work()
        self.assertEqual(m.gsi(17), 1)
        self.assertEqual(m.config_read(1, STATUS_WORD, 2) & 8, 8)
        self.assertEqual(m.ack(), 0x71)
        m.config_write(1, COMMAND, MEMORY | MASTER | INTX_OFF, 2)
        self.assertEqual(m.gsi(17), 0)
        self.assertEqual(m.config_read(1, STATUS_WORD, 2) & 8, 8)
        m.config_write(1, COMMAND, MEMORY | MASTER, 2)
        self.assertEqual(m.gsi(17), 1)
        self.assertEqual(m.load(d.where[ISR][0], 1), 1)
        self.assertEqual(m.gsi(17), 0)
        m.eoi()
        self.assertEqual(m.take(), [])

    def test_reset_lowers_the_line(self):
        self.start()
        self.work()
        self.assertEqual(self.m.gsi(17), 1)
        self.m.ask("reset")
        self.assertEqual(self.m.gsi(17), 0)

    def test_round_trip(self):
        m, d = self.m, self.d
        d.enable_msix()
        d.set_vector(1, 0x51, masked=1)
        self.start(vector=1)
        self.work()
        other = self.check_round_trip()
        self.assertEqual(other.load(d.msix_pba, 8), 2)
        other.store(d.msix_table + 16 + 12, 0)
        self.assertEqual(other.take(), [0x51])

    def test_round_trip_of_a_raised_line(self):
        self.start()
        self.work()
        other = self.check_round_trip()
        self.assertEqual(other.gsi(17), 1)
        self.assertEqual(other.load(self.d.where[ISR][0], 1), 1)
        self.assertEqual(other.gsi(17), 0)


class Slots(Case):
    options = ("--rng", "--rng", "--rng", "--rng", "--rng")

    def test_swizzle(self):
        self.assertEqual([self.m.config_read(slot, LINE, 1) for slot in range(1, 6)], [17, 18, 19, 16, 17])


if __name__ == "__main__":
    unittest.main()
