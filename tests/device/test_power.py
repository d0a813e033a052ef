"""Power off, resets, the power button, the PM timer, and the two devices for test programs."""

import unittest

from devtest import *


class Power(Case):
    def test_power_off(self):
        m = self.m
        m.port_out(0x600, 5 << 2)                           # without SLP_EN
        m.port_out(0x600, 3 << 2 | 1 << 5)                  # another type
        self.assertEqual(m.event(), ["none"])
        m.port_out(0x600, 0x34)
        self.assertEqual(m.event(), ["poweroff", "0x0"])
        self.assertEqual(m.port_in(0x600), 0)
        self.assertEqual(m.port_in(0x601), 0)

    def test_resets(self):
        m = self.m
        m.port_out(0x602, 1)
        m.port_out(0x64, 0xD1)
        m.port_out(0xCF9, 2)
        self.assertEqual(m.event(), ["none"])
        m.port_out(0x602, 0x42)
        self.assertEqual(m.event(), ["reset", "0x0"])
        m.port_out(0x64, 0xFE)
        self.assertEqual(m.event(), ["reset", "0x0"])
        m.port_out(0xCF9, 6)
        self.assertEqual(m.event(), ["reset", "0x0"])
        self.assertEqual(m.port_in(0xCF9), 6)
        m.port_out(0xCF9, 6)                                # no change from 0 to 1
        self.assertEqual(m.event(), ["none"])
        m.port_out(0xCF8, 0x80000600, 4)                    # an address, not a reset
        self.assertEqual(m.event(), ["none"])
        self.assertEqual(m.port_in(0x64), 0xFF)

    def test_button(self):
        m = self.m
        m.enable_lapics()
        m.route(GSI_GED, 0x39, LEVEL)
        self.assertEqual(m.port_in(0x604, 4), 0)
        m.ask("power_button")
        m.ask("power_button")
        self.assertEqual(m.ack(), 0x39)
        self.assertEqual(m.port_in(0x604, 4), 1)
        self.assertEqual(m.gsi(GSI_GED), 0)
        self.assertEqual(m.port_in(0x604, 4), 0)
        m.eoi()
        self.assertEqual(m.take(), [])
        m.ask("power_button")
        self.assertEqual(m.ack(), 0x39)

    def test_reset_takes_the_button_back(self):
        m = self.m
        m.ask("power_button")
        m.ask("reset")
        self.assertEqual(m.gsi(GSI_GED), 0)
        self.assertEqual(m.port_in(0x604), 0)

    def test_pm_timer(self):
        m = self.m
        self.assertEqual(m.port_in(0x608, 4), 0)
        m.step(10**9)
        self.assertEqual(m.port_in(0x608, 4), 3579545)
        self.assertEqual(m.port_in(0x60A, 2), 3579545 >> 16)
        m.step(3600 * 10**9)
        self.assertEqual(m.port_in(0x608, 4), 3579545 * 3601 % 2**32)

    def test_odd_accesses(self):
        m = self.m
        m.port_out(0x5FF, 0x3400, 2)                        # crosses into the block
        self.assertEqual(m.event(), ["poweroff", "0x0"])
        m.port_out(0x603, 0xFFFFFFFF, 4)
        m.port_out(0x60F, 0xFFFFFFFF, 4)
        for port in range(0x5FD, 0x612):
            for size in (1, 2, 4):
                m.port_in(port, size)
        self.assertEqual(m.event(), ["none"])

    def test_round_trip(self):
        m = self.m
        m.ask("power_button")
        m.port_out(0xCF9, 2)
        m.port_out(0xCF8, 0x80000804, 4)
        m.step(77)
        other = self.check_round_trip()
        self.assertEqual(other.gsi(GSI_GED), 1)
        self.assertEqual(other.port_in(0x604, 4), 1)
        self.assertEqual(other.gsi(GSI_GED), 0)
        self.assertEqual(other.port_in(0xCF9), 2)


class TestDevices(Case):
    def test_debug_exit(self):
        m = self.m
        m.port_out(0x501, 0x10)
        self.assertEqual(m.event(), ["exit", "0x21"])
        m.port_out(0x502, 0)
        self.assertEqual(m.event(), ["exit", "0x1"])
        m.port_out(0x501, 0x7F, 2)
        self.assertEqual(m.event(), ["exit", "0xff"])
        m.port_out(0x501, 0xFFFFFFFF, 4)
        self.assertEqual(m.port_in(0x501), 0)

    def test_register(self):
        m = self.m
        m.port_out(0xE0, 0x12345678, 4)
        self.assertEqual(m.port_in(0xE8, 4), 0x12345678)
        m.port_out(0xE9, 0xAA)
        self.assertEqual(m.port_in(0xE0, 4), 0x1234AA78)
        self.assertEqual(m.port_in(0xE2, 2), 0x1234)

    def test_irq_lines(self):
        m = self.m
        for gsi in range(24):
            m.port_out(0x2000 + gsi, 1)
            self.assertEqual(m.gsi(gsi), 1)
            m.port_out(0x2000 + gsi, 0)
            self.assertEqual(m.gsi(gsi), 0)
        m.port_out(0x2017, 0xFFFF, 2)
        m.port_out(0x2018, 1)
        self.assertEqual(m.gsi(23), 1)

    def test_memory(self):
        m = self.m
        m.store(0xFF00FFF8, 0x1122334455667788, 8)
        self.assertEqual(m.load(0xFF00FFF9, 4), 0x44556677)
        self.assertEqual(m.load(0xFF00FFFE, 4), 0xFFFF1122)
        m.store(0xFF00FFFE, 0xFFFFFFFF, 8)
        self.assertEqual(m.load(0xFF010000, 4), 0xFFFFFFFF)

    def test_flush(self):
        m = self.m
        for address in (0x1000, 0x3FFFFFF, 0x4000000, 0xFFFFFFFF):
            m.port_out(0xE4, address, 4)
        self.assertEqual(m.read(0x1000, 16), bytes(16))

    def test_round_trip(self):
        m = self.m
        m.port_out(0xE0, 0xCAFE, 4)
        m.port_out(0x2007, 1)
        m.store(0xFF000100, 0x55AA)
        other = self.check_round_trip()
        self.assertEqual(other.gsi(7), 1)
        other.port_out(0x2007, 0)
        self.assertEqual(other.gsi(7), 0)


if __name__ == "__main__":
    unittest.main()
