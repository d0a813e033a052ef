"""The 16550A UART, with a Unix socket as the other end of its line."""

import socket
import unittest

from devtest import *

BASE = 0x3F8
DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 1, 2, 2, 3, 4, 5, 6, 7
THRE_TEMT, DR, OE = 0x60, 1, 2


class Serial(Case):
    def setUp(self):
        super().setUp()
        self.m.close()
        self.m, self.line = self.connect("line")

    def connect(self, name):
        m = self.machine("--console", "unix:" + self.path(name))
        m.ask("ping")                                       # it listens by now
        line = socket.socket(socket.AF_UNIX)
        self.addCleanup(line.close)
        line.settimeout(20)
        line.connect(self.path(name))
        return m, line

    def reg(self, n, value=None):
        if value is None:
            return self.m.port_in(BASE + n)
        return self.m.port_out(BASE + n, value)

    def wait(self, what, condition):
        self.m.poll(condition, what)

    def receive(self, count):
        data = b""
        while len(data) < count:
            self.m.ask("ping")
            self.line.setblocking(False)
            try:
                data += self.line.recv(count - len(data))
            except BlockingIOError:
                self.tries = getattr(self, "tries", 0) + 1
                self.assertLess(self.tries, 200000)
        return data

    def test_after_reset(self):
        self.assertEqual([self.reg(n) for n in range(1, 8)], [0, 1, 0, 0, THRE_TEMT, 0xB0, 0])

    def test_output(self):
        for byte in b"Hello\n":
            self.reg(DATA, byte)
            self.assertEqual(self.reg(LSR), THRE_TEMT)
        self.assertEqual(self.receive(6), b"Hello\n")

    def test_scratch_and_divisor(self):
        self.reg(SCR, 0xA5)
        self.assertEqual(self.reg(SCR), 0xA5)
        self.reg(LCR, 0x83)
        self.reg(DATA, 0x34), self.reg(IER, 0x12)
        self.assertEqual((self.reg(DATA), self.reg(IER)), (0x34, 0x12))
        self.assertEqual(self.m.port_in(BASE, 2), 0x1234)
        self.reg(LCR, 0x03)
        self.assertEqual(self.reg(IER), 0)
        self.reg(IER, 0xFF)
        self.assertEqual(self.reg(IER), 0x0F)

    def test_is_a_16550a(self):
        self.reg(FCR, 0x01)
        self.assertEqual(self.reg(IIR) >> 6, 3)
        self.reg(FCR, 0xE7)
        self.assertEqual(self.reg(IIR) & 0x20, 0)           # not a 16750
        self.reg(FCR, 0)
        self.assertEqual(self.reg(IIR) >> 6, 0)

    def test_thr_empty_interrupt(self):
        m = self.m
        m.enable_lapics()
        m.route(GSI_SERIAL, 0x34)
        self.reg(IER, 2)
        self.assertEqual(m.take(), [0x34])
        self.assertEqual(self.reg(IIR), 2)
        self.assertEqual(self.reg(IIR), 1)                  # reading it took it away
        self.assertEqual(m.gsi(GSI_SERIAL), 0)
        self.reg(DATA, 0x41)
        self.assertEqual(m.take(), [0x34])
        self.reg(DATA, 0x42)                                # not acknowledged: a new edge all the same
        self.assertEqual(m.take(), [0x34])
        self.reg(IER, 0)
        self.assertEqual(m.gsi(GSI_SERIAL), 0)
        self.assertEqual(self.reg(IIR), 1)
        self.reg(IER, 2)                                    # as a driver probes for it
        self.assertEqual(self.reg(IIR), 2)

    def test_input_and_trigger(self):
        m = self.m
        self.reg(FCR, 0x81)                                 # trigger at 8
        self.reg(IER, 1)
        self.line.sendall(b"abc")
        self.wait("input", lambda: self.reg(LSR) & DR)
        self.assertEqual(self.reg(IIR), 0xCC)               # below the trigger: timeout
        self.assertEqual(m.gsi(GSI_SERIAL), 1)
        self.assertEqual([self.reg(DATA) for _ in range(3)], list(b"abc"))
        self.assertEqual(self.reg(IIR), 0xC1)
        self.assertEqual(m.gsi(GSI_SERIAL), 0)
        self.line.sendall(b"0123456789")
        self.wait("8 bytes", lambda: self.reg(IIR) == 0xC4)

    def test_more_input_than_the_fifo_holds_waits(self):
        data = bytes(range(1, 256)) * 4
        self.reg(FCR, 0xC7)
        self.line.sendall(data)
        got = []
        for _ in range(200000):
            status = self.reg(LSR)
            self.assertEqual(status & OE, 0)
            if status & DR:
                got.append(self.reg(DATA))
            if len(got) == len(data):
                break
        self.assertEqual(bytes(got), data)

    def test_without_fifo_one_byte_at_a_time(self):
        self.line.sendall(b"xyz")
        for byte in b"xyz":
            self.wait("a byte", lambda: self.reg(LSR) & DR)
            self.assertEqual(self.reg(DATA), byte)
        self.assertEqual(self.reg(LSR) & DR, 0)

    def test_loopback(self):
        m = self.m
        self.reg(MCR, 0x1A)
        self.assertEqual(self.reg(MSR) & 0xF0, 0x90)
        self.reg(DATA, 0x55)
        self.assertEqual(self.reg(LSR), THRE_TEMT | DR)
        self.assertEqual(self.reg(DATA), 0x55)
        self.reg(DATA, 1), self.reg(DATA, 2)                # without FIFO the second runs the first over
        self.assertEqual(self.reg(LSR) & OE, OE)
        self.assertEqual(self.reg(LSR) & OE, 0)
        self.assertEqual(self.reg(DATA), 2)
        self.reg(FCR, 1)
        self.reg(IER, 4)
        for n in range(17):
            self.reg(DATA, n)
        self.assertEqual(self.reg(IIR), 0xC6)
        self.assertEqual(m.gsi(GSI_SERIAL), 1)
        self.reg(LSR)
        self.assertEqual(m.gsi(GSI_SERIAL), 0)
        self.assertEqual([self.reg(DATA) for _ in range(16)], list(range(16)))
        self.reg(MCR, 0)
        self.reg(DATA, 0x21)
        self.assertEqual(self.receive(1), b"!")             # nothing of the loop went out

    def test_modem_interrupt(self):
        m = self.m
        self.reg(IER, 8)
        self.reg(MCR, 0x10)
        self.assertEqual(self.reg(IIR), 0)
        self.assertEqual(m.gsi(GSI_SERIAL), 1)
        self.assertEqual(self.reg(MSR), 0x0B)
        self.assertEqual(m.gsi(GSI_SERIAL), 0)
        self.reg(MCR, 0x14)                                 # OUT1 is the ring line
        self.assertEqual(self.reg(MSR), 0x40)
        self.reg(MCR, 0x10)
        self.assertEqual(self.reg(MSR), 0x04)

    def test_switching_fifos_empties_them(self):
        self.reg(FCR, 1)
        self.line.sendall(b"abc")
        self.wait("input", lambda: self.reg(LSR) & DR)
        self.reg(FCR, 0)
        self.assertEqual(self.reg(LSR) & DR, 0)

    def test_odd_accesses(self):
        m = self.m
        m.port_out(BASE + 7, 0x11223344, 4)                 # crosses the end
        self.assertEqual(self.reg(SCR), 0x44)
        m.port_in(BASE + 6, 4)
        m.port_in(BASE, 4)
        m.port_out(BASE + 4, 0x11AA, 2)
        self.assertEqual(self.reg(MCR), 0x0A)

    def test_round_trip(self):
        m = self.m
        self.reg(FCR, 0xC1)
        self.reg(IER, 3)
        self.reg(SCR, 0x77)
        self.reg(LCR, 0x1B)
        self.reg(MCR, 0x0B)
        self.line.sendall(b"saved")
        self.wait("input", lambda: self.reg(LSR) & DR)
        other = self.check_round_trip()
        data = bytes(other.port_in(BASE) for _ in range(5))
        self.assertEqual(data, b"saved")
        self.assertEqual(other.port_in(BASE + IIR), 0xC2)
        self.assertEqual(other.gsi(GSI_SERIAL), 0)

    def test_bad_state_is_refused(self):
        """Each field that the device checks: a queue longer than the FIFO."""
        state = bytes.fromhex(self.m.save()[2:])
        at = state.index(b"\x08rx_count") + 9
        length = int.from_bytes(state[at:at + 4], "little")
        bad = state[:at + 4] + (17).to_bytes(length, "little") + state[at + 4 + length:]
        with self.assertRaises(Refused):
            self.m.load_state("0x" + bad.hex())
        self.assertEqual(self.reg(LSR), THRE_TEMT)


if __name__ == "__main__":
    unittest.main()
