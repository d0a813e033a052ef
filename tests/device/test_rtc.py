"""The CMOS clock. The manual clock begins on 2020-01-01 at 00:00:00 UTC, a Wednesday."""

import calendar
import random
import time
import unittest

from devtest import *

SECOND = 10**9
A, B, C, D, CENTURY = 0x0A, 0x0B, 0x0C, 0x0D, 0x32
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 4, 2
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10


class Rtc(Case):
    def reg(self, n, value=None, m=None):
        m = m or self.m
        m.port_out(0x70, n)
        if value is None:
            return m.port_in(0x71)
        return m.port_out(0x71, value)

    def date(self, m=None):
        """Second, minute, hour, weekday, day, month, year, century as the registers have them."""
        return [self.reg(n, m=m) for n in (0, 2, 4, 6, 7, 8, 9, CENTURY)]

    def test_the_time(self):
        self.assertEqual(self.date(), [0, 0, 0, 4, 1, 1, 0x20, 0x20])
        self.m.step(SECOND * (45 * 86400 + 13 * 3600 + 59 * 60 + 58))
        self.assertEqual(self.date(), [0x58, 0x59, 0x13, 7, 0x15, 2, 0x20, 0x20])
        self.m.step(2 * SECOND)
        self.assertEqual(self.date()[:3], [0, 0, 0x14])
        self.assertEqual(self.reg(D), 0x80)
        self.assertEqual(self.reg(A), 0x26)
        self.assertEqual(self.reg(B), 0x02)

    def test_formats(self):
        self.m.step(SECOND * (23 * 3600 + 58 * 60 + 31))
        self.reg(B, BINARY | H24)
        self.assertEqual(self.date()[:3], [31, 58, 23])
        self.reg(B, BINARY)
        self.assertEqual(self.reg(4), 0x80 | 11)
        self.reg(B, 0)
        self.assertEqual(self.reg(4), 0x91)
        self.m.step(SECOND * 3600)
        self.assertEqual(self.reg(4), 0x12)                 # midnight

    def test_setting_the_date(self):
        self.reg(B, SET | H24)
        for n, value in zip((0, 2, 4, 7, 8, 9, CENTURY), (0x30, 0x59, 0x23, 0x31, 0x12, 0x99, 0x19)):
            self.reg(n, value)
        self.m.step(100 * SECOND)
        self.assertEqual(self.date(), [0x30, 0x59, 0x23, 6, 0x31, 0x12, 0x99, 0x19])
        self.reg(B, H24)
        self.m.step(30 * SECOND - 1)
        self.assertEqual(self.reg(9), 0x99)
        self.m.step(1)
        self.assertEqual(self.date(), [0, 0, 0, 7, 1, 1, 0, 0x20])
        self.reg(2, 0x15)                                   # also without SET
        self.assertEqual(self.date()[:3], [0, 0x15, 0])
        self.m.ask("reset")
        self.assertEqual(self.date()[:3], [0, 0x15, 0])     # there is a battery

    def test_dates_without_sense(self):
        """No value a guest writes, in whatever format, does more than give a strange date."""
        rng = random.Random(1)
        for _ in range(300):
            self.reg(rng.choice((A, B, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, CENTURY)), rng.randrange(256))
            self.m.step(rng.choice((1, SECOND // 3, SECOND, 86400 * SECOND)))
            self.date()
            self.reg(C)

    def test_update_in_progress(self):
        self.assertEqual(self.reg(A) & 0x80, 0)
        self.m.step(SECOND - 244000)
        self.assertEqual(self.reg(A) & 0x80, 0x80)
        self.m.step(244000)
        self.assertEqual(self.reg(A) & 0x80, 0)
        self.m.step(SECOND - 1000)
        self.reg(B, SET | H24)
        self.assertEqual(self.reg(A) & 0x80, 0)

    def test_update_interrupt(self):
        m = self.m
        self.reg(A, 0x20)                                   # no periodic flag among the others
        self.reg(B, UIE | H24)
        m.step(SECOND - 1)
        self.assertEqual(m.gsi(GSI_RTC), 0)
        m.step(1)
        self.assertEqual(m.gsi(GSI_RTC), 1)
        self.assertEqual(self.reg(C), IRQF | UF)
        self.assertEqual(m.gsi(GSI_RTC), 0)
        self.assertEqual(self.reg(C), 0)
        m.step(SECOND)
        self.assertEqual(self.reg(C), IRQF | UF)
        self.reg(B, SET | UIE | H24)                        # SET takes UIE away
        self.assertEqual(self.reg(B), SET | H24)
        m.step(5 * SECOND)
        self.assertEqual(self.reg(C), 0)

    def test_flags_without_interrupt(self):
        m = self.m
        m.step(SECOND)
        self.assertEqual(m.gsi(GSI_RTC), 0)
        self.assertEqual(self.reg(C) & UF, UF)
        self.reg(B, UIE | H24)
        m.step(SECOND)
        self.assertEqual(m.gsi(GSI_RTC), 1)
        self.reg(B, H24)                                    # the line follows the enable
        self.assertEqual(m.gsi(GSI_RTC), 0)
        self.reg(B, UIE | H24)
        self.assertEqual(m.gsi(GSI_RTC), 1)

    def test_alarm(self):
        m = self.m
        self.reg(1, 0x10), self.reg(3, 0x30), self.reg(5, 0x01)
        self.reg(B, AIE | H24)
        m.step(SECOND * (5400 + 9))
        self.assertEqual(m.gsi(GSI_RTC), 0)
        m.step(SECOND)
        self.assertEqual(m.gsi(GSI_RTC), 1)
        self.assertEqual(self.reg(C) & (IRQF | AF), IRQF | AF)
        m.step(SECOND * 86399)
        self.assertEqual(m.gsi(GSI_RTC), 0)
        m.step(SECOND)
        self.assertEqual(m.gsi(GSI_RTC), 1)

    def test_alarm_with_do_not_care(self):
        m = self.m
        self.reg(1, 0x00), self.reg(3, 0xFF), self.reg(5, 0xC0)     # each minute
        self.reg(B, AIE | H24)
        for _ in range(3):
            m.step(59 * SECOND)
            self.assertEqual(m.gsi(GSI_RTC), 0)
            m.step(SECOND)
            self.assertEqual(m.gsi(GSI_RTC), 1)
            self.reg(C)
        self.reg(5, 0x25)                                           # an hour that never comes
        m.step(3 * 86400 * SECOND)
        self.assertEqual(m.gsi(GSI_RTC), 0)

    def test_alarms_against_the_calendar(self):
        """The next alarm is where counting seconds one by one finds it."""
        rng = random.Random(7)
        now = calendar.timegm((2020, 1, 1, 0, 0, 0))
        self.reg(B, AIE | H24 | BINARY)
        for _ in range(40):
            want = [rng.choice((rng.randrange(n), 0xFF)) for n in (60, 60, 24)]
            for n, value in zip((1, 3, 5), want):
                self.reg(n, value)
            self.reg(C)
            at = now + 1
            while any(w != 0xFF and w != v for w, v in zip(want, reversed(time.gmtime(at)[3:6]))):
                at += 1
            self.m.step((at - now) * SECOND - 1)
            self.assertEqual(self.m.gsi(GSI_RTC), 0, want)
            self.m.step(1)
            self.assertEqual(self.m.gsi(GSI_RTC), 1, want)
            now = at

    def test_periodic_interrupt(self):
        m = self.m
        for rate, period in ((15, 16384), (6, 32), (3, 4), (1, 128), (2, 256)):
            self.reg(A, 0x20 | rate)
            self.reg(B, PIE | H24)
            self.reg(C)
            m.irqs()
            count = 0
            for _ in range(64):
                m.step(period * SECOND // 32768 // 2 + 1)
                if m.gsi(GSI_RTC):
                    count += 1
                    self.assertEqual(self.reg(C) & (IRQF | PF), IRQF | PF)
            self.assertIn(count, (31, 32, 33), rate)
        self.reg(A, 0x20)
        m.step(SECOND)
        self.reg(C)
        m.step(SECOND)
        self.assertEqual(self.reg(C) & PF, 0)

    def test_memory(self):
        for n in range(0x0E, 0x80):
            if n != CENTURY:
                self.reg(n, n ^ 0x5A)
        self.m.ask("reset")
        for n in range(0x0E, 0x80):
            if n != CENTURY:
                self.assertEqual(self.reg(n), n ^ 0x5A)
        self.assertEqual(self.reg(0x80 | 0x20), 0x20 ^ 0x5A)    # bit 7 is the NMI mask

    def test_odd_accesses(self):
        m = self.m
        m.port_out(0x70, 0x3344, 2)
        self.assertEqual(m.port_in(0x70, 2), 0x33FF)
        m.port_in(0x71, 4)
        m.port_out(0x71, 0x12345678, 4)

    def test_round_trip(self):
        m = self.m
        self.reg(0x40, 0x99)
        self.reg(9, 0x35)
        self.reg(1, 0x05), self.reg(3, 0xFF), self.reg(5, 0xFF)
        self.reg(A, 0x26)
        self.reg(B, PIE | AIE | UIE | H24)
        m.step(SECOND + 333)
        other = self.check_round_trip()
        for each in (m, other):
            self.assertEqual(each.gsi(GSI_RTC), 1)
            self.assertEqual(self.reg(C, m=each), IRQF | UF | PF)
            each.step(4 * SECOND)
            self.assertEqual(self.reg(C, m=each), IRQF | UF | PF | AF)
            self.assertEqual(self.date(each), [5, 0, 0, 2, 1, 1, 0x35, 0x20])
        self.assertEqual(m.save(), other.save())
        self.reg(B, SET | H24)
        self.reg(2, 0x99)
        self.check_round_trip()


if __name__ == "__main__":
    unittest.main()
