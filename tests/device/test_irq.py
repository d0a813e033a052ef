"""Local APICs and IOAPIC, as the guest's registers show them."""

import unittest

from devtest import *

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR, ICR2 = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
LVT_TIMER, LVT_LINT1, LVT_ERROR, INIT_COUNT, COUNT, DIVIDE = 0x320, 0x360, 0x370, 0x380, 0x390, 0x3E0


class Registers(Case):
    def test_after_reset(self):
        m = self.m
        self.assertEqual(m.lapic(0, ID), 0)
        self.assertEqual(m.lapic(1, ID), 1 << 24)
        self.assertEqual(m.lapic(0, VERSION), 0x01050014)
        self.assertEqual(m.lapic(0, SVR), 0xFF)
        self.assertEqual(m.lapic(0, DFR), 0xFFFFFFFF)
        for lvt in range(0x320, 0x380, 0x10):
            self.assertEqual(m.lapic(0, lvt), 0x10000)
        self.assertEqual(m.rdmsr(0, 0x1B), 0xFEE00900)
        self.assertEqual(m.rdmsr(1, 0x1B), 0xFEE00800)
        self.assertEqual(m.ioapic(1), 0x00170020)
        for n in range(24):
            self.assertEqual(m.ioapic(0x10 + 2 * n), MASKED)

    def test_lvts_stay_masked_while_disabled(self):
        self.m.lapic(0, LVT_TIMER, 0x20030)
        self.assertEqual(self.m.lapic(0, LVT_TIMER), 0x30030)
        self.m.lapic(0, SVR, 0x1FF)
        self.m.lapic(0, LVT_TIMER, 0x20030)
        self.assertEqual(self.m.lapic(0, LVT_TIMER), 0x20030)
        self.m.lapic(0, SVR, 0xFF)
        self.assertEqual(self.m.lapic(0, LVT_TIMER), 0x30030)

    def test_illegal_register_is_an_error(self):
        m = self.m
        m.enable_lapics()
        m.lapic(0, LVT_ERROR, 0xFE)
        m.lapic(0, 0x40)
        self.assertEqual(m.pending(), 0xFE)
        m.lapic(0, ESR, 0)
        self.assertEqual(m.lapic(0, ESR), 0x80)
        m.lapic(0, ESR, 0)
        self.assertEqual(m.lapic(0, ESR), 0)

    def test_base_mode_changes(self):
        m = self.m
        for bad in (0xFEE00500, 0xFEE00D00 | 1 << 52, 0xFEE00901, 0xFEE00B00):
            with self.assertRaises(Refused):
                m.wrmsr(0, 0x1B, bad)
        m.wrmsr(0, 0x1B, 0xFEE00D00)
        self.assertEqual(m.lapic(0, VERSION), 0xFFFFFFFF)   # the page is gone
        with self.assertRaises(Refused):
            m.wrmsr(0, 0x1B, 0xFEE00900)
        m.wrmsr(0, 0x1B, 0xFEE00100)
        with self.assertRaises(Refused):
            m.wrmsr(0, 0x1B, 0xFEE00D00)
        m.wrmsr(0, 0x1B, 0xFEE00900)
        self.assertEqual(m.lapic(0, SVR), 0xFF)

    def test_x2apic_msrs(self):
        m = self.m
        with self.assertRaises(Refused):
            m.rdmsr(1, 0x802)
        m.wrmsr(1, 0x1B, 0xFEE00C00)
        self.assertEqual(m.rdmsr(1, 0x802), 1)
        self.assertEqual(m.rdmsr(1, 0x80D), 2)
        m.wrmsr(1, 0x80F, 0x1FF)
        for msr, value in ((0x802, 0), (0x803, 0), (0x80D, 0), (0x80B, 1), (0x828, 1), (0x808, 0x100),
                           (0x80F, 1 << 13), (0x832, 1 << 19), (0x839, 0), (0x83F, 0x100), (0x80E, 0),
                           (0x831, 0), (0x82F, 0), (0x840, 0), (0x8FF, 0), (0x830, 1 << 20),
                           (0x838, 1 << 32)):
            with self.assertRaises(Refused, msg=f"{msr:#x}"):
                m.wrmsr(1, msr, value)
        for msr in (0x80B, 0x80E, 0x83F, 0x831, 0x800, 0x8FF, 0x809):
            with self.assertRaises(Refused, msg=f"{msr:#x}"):
                m.rdmsr(1, msr)
        m.wrmsr(1, 0x83F, 0x45)
        self.assertEqual(m.ack(1), 0x45)
        m.wrmsr(1, 0x80B, 0)
        m.wrmsr(1, 0x830, 0x0000000000004046 | 1 << 32)     # to itself by id
        self.assertEqual(m.ack(1), 0x46)


class Priorities(Case):
    def setUp(self):
        super().setUp()
        self.m.enable_lapics()

    def msi(self, vector, dest=0):
        self.m.ask(f"msi {0xFEE00000 | dest << 12:#x} {vector:#x}")

    def test_order_and_nesting(self):
        m = self.m
        for vector in (0x31, 0x92, 0x51, 0x55):
            self.msi(vector)
        self.assertEqual(m.ack(), 0x92)
        self.assertIsNone(m.pending())          # 0x5x does not interrupt 0x92
        self.msi(0x9F)
        self.assertIsNone(m.pending())          # nor does its own class
        self.msi(0xA0)
        self.assertEqual(m.ack(), 0xA0)
        self.assertEqual(m.lapic(0, PPR), 0xA0)
        m.eoi()
        self.assertIsNone(m.pending())
        m.eoi()
        self.assertEqual(m.take(), [0x9F, 0x55, 0x51, 0x31])
        self.assertEqual(m.lapic(0, PPR), 0)

    def test_tpr_and_cr8(self):
        m = self.m
        m.lapic(0, TPR, 0x57)
        self.assertEqual(m.number("cr8 0"), 5)
        self.msi(0x5F)
        self.assertIsNone(m.pending())
        self.assertIsNone(m.ack())
        self.assertEqual(m.lapic(0, IRR + 0x20), 1 << 31)
        m.ask("cr8 0 4")
        self.assertEqual(m.lapic(0, TPR), 0x40)
        self.assertEqual(m.pending(), 0x5F)

    def test_one_signal_for_what_is_new(self):
        m = self.m
        m.signals(0)
        self.msi(0x40)
        self.msi(0x40)
        self.msi(0x30)
        self.assertEqual(m.signals(0)["intr"], "1")
        self.msi(0x50)
        self.assertEqual(m.signals(0)["intr"], "1")

    def test_disabled_apic_takes_no_interrupts_but_nmi(self):
        m = self.m
        m.lapic(1, SVR, 0xFF)
        self.msi(0x40, dest=1)
        self.assertIsNone(m.pending(1))
        m.ask(f"msi {0xFEE01000:#x} 0x400")
        self.assertEqual(m.signals(1)["nmi"], "1")
        m.wrmsr(1, 0x1B, 0xFEE00000)
        m.ask(f"msi {0xFEE01000:#x} 0x400")
        self.assertEqual(m.signals(1)["nmi"], "0")

    def test_illegal_vectors(self):
        m = self.m
        m.lapic(0, LVT_ERROR, 0xFE)
        self.msi(0x0F)
        self.assertEqual(m.take(), [0xFE])
        m.lapic(0, ESR, 0)
        self.assertEqual(m.lapic(0, ESR), 0x40)
        m.lapic(0, ICR, 0x40005)                # self, vector 5
        self.assertEqual(m.take(), [0xFE])
        m.lapic(0, ESR, 0)
        self.assertEqual(m.lapic(0, ESR), 0x20)

    def test_msi_elsewhere_is_dropped(self):
        self.m.ask("msi 0x1000 0x41")
        self.m.ask("msi 0x1fee00000 0x41")
        self.assertIsNone(self.m.pending())
        self.assertEqual(self.m.read(0x1000, 4), b"\0\0\0\0")


class Destinations(Case):
    cpus = 4

    def setUp(self):
        super().setUp()
        self.m.enable_lapics(4)

    def got(self):
        return [cpu for cpu in range(4) if self.m.take(cpu)]

    def send(self, icr, dest=0, cpu=0):
        self.m.lapic(cpu, ICR2, dest << 24)
        self.m.lapic(cpu, ICR, icr | 0x4000)
        return self.got()

    def test_physical(self):
        self.assertEqual(self.send(0x50, dest=2), [2])
        self.assertEqual(self.send(0x50, dest=9), [])
        self.assertEqual(self.send(0x50, dest=0xFF), [0, 1, 2, 3])

    def test_shorthands(self):
        self.assertEqual(self.send(0x40050, cpu=1), [1])
        self.assertEqual(self.send(0x80050, cpu=1), [0, 1, 2, 3])
        self.assertEqual(self.send(0xC0050, cpu=1), [0, 2, 3])

    def test_logical_flat(self):
        for cpu in range(4):
            self.m.lapic(cpu, LDR, 1 << (24 + cpu))
        self.assertEqual(self.send(0x850, dest=0b1010), [1, 3])
        self.assertEqual(self.send(0x850, dest=0x10), [])
        self.assertEqual(self.send(0x850, dest=0xFF), [0, 1, 2, 3])

    def test_logical_cluster(self):
        for cpu, ldr in enumerate((0x11, 0x12, 0x21, 0x22)):
            self.m.lapic(cpu, DFR, 0x0FFFFFFF)
            self.m.lapic(cpu, LDR, ldr << 24)
        self.assertEqual(self.send(0x850, dest=0x13), [0, 1])
        self.assertEqual(self.send(0x850, dest=0x22), [3])
        self.assertEqual(self.send(0x850, dest=0x31), [])

    def test_x2apic_logical_and_broadcast(self):
        m = self.m
        for cpu in range(4):
            m.wrmsr(cpu, 0x1B, 0xFEE00C00 | (cpu == 0) << 8)
        m.wrmsr(0, 0x830, 0x850 | 0b0110 << 32)
        self.assertEqual([m.pending(c) for c in range(4)], [None, 0x50, 0x50, None])
        for cpu in (1, 2):
            m.ack(cpu), m.wrmsr(cpu, 0x80B, 0)
        m.wrmsr(0, 0x830, 0x850 | 0x10001 << 32)            # another cluster
        m.wrmsr(0, 0x830, 0x50 | 0xFF << 32)                # in x2APIC mode 0xff is an id
        self.assertEqual([m.pending(c) for c in range(4)], [None] * 4)
        m.wrmsr(0, 0x830, 0x50 | 0xFFFFFFFF << 32)
        self.assertEqual([m.pending(c) for c in range(4)], [0x50] * 4)

    def test_lowest_priority(self):
        m = self.m
        for cpu in range(4):
            m.lapic(cpu, LDR, 1 << (24 + cpu))
            m.lapic(cpu, TPR, 0x30 if cpu != 2 else 0x10)
        for _ in range(3):
            self.assertEqual(self.send(0x950, dest=0xFF), [2])
        m.lapic(2, TPR, 0x30)
        took = set()
        for _ in range(8):
            got = self.send(0x950, dest=0x0F)
            self.assertEqual(len(got), 1)
            took.update(got)
        self.assertEqual(took, {0, 1, 2, 3})

    def test_nmi_init_sipi(self):
        m = self.m
        self.send(0x400, dest=1)
        self.send(0x500, dest=1)
        self.send(0x8500, dest=1)               # level de-assert: nothing
        m.lapic(0, ICR, 0x8500)
        self.send(0x69A, dest=1)
        self.assertEqual(m.signals(1), {"intr": "0", "nmi": "1", "smi": "0", "init": "2",
                                        "sipi": "1:0x9a"})
        self.assertEqual(m.signals(2)["init"], "0")

    def test_init_resets_the_apic(self):
        m = self.m
        m.lapic(1, TPR, 0x20)
        self.send(0x10, dest=1)
        m.ask("init 1")
        self.assertEqual(m.lapic(1, TPR), 0)
        self.assertEqual(m.lapic(1, SVR), 0xFF)
        self.assertEqual(m.lapic(1, ID), 1 << 24)
        m.wrmsr(2, 0x1B, 0xFEE00C00)
        m.ask("init 2")
        self.assertEqual(m.rdmsr(2, 0x802), 2)
        self.assertEqual(m.rdmsr(2, 0x80D), 4)

    def test_nmi_button(self):
        m = self.m
        m.ask("nmi")
        self.assertEqual(m.signals(0)["nmi"], "0")          # LINT1 is masked
        m.lapic(0, LVT_LINT1, 0x400)
        m.ask("nmi")
        self.assertEqual(m.signals(0)["nmi"], "1")
        self.assertEqual(m.signals(1)["nmi"], "0")


class Timer(Case):
    def setUp(self):
        super().setUp()
        self.m.enable_lapics()

    def test_one_shot(self):
        m = self.m
        m.lapic(0, DIVIDE, 0xB)                 # by one: one tick a nanosecond
        m.lapic(0, LVT_TIMER, 0x40)
        m.lapic(0, INIT_COUNT, 1000)
        self.assertEqual(m.lapic(0, COUNT), 1000)
        m.step(400)
        self.assertEqual(m.lapic(0, COUNT), 600)
        m.step(599)
        self.assertIsNone(m.pending())
        m.step(1)
        self.assertEqual(m.take(), [0x40])
        self.assertEqual(m.lapic(0, COUNT), 0)
        m.step(10000)
        self.assertEqual(m.take(), [])

    def test_dividers(self):
        m = self.m
        m.lapic(0, LVT_TIMER, 0x40)
        for code, divider in ((0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)):
            m.lapic(0, DIVIDE, code)
            m.lapic(0, INIT_COUNT, 100)
            m.step(50 * divider)
            self.assertEqual(m.lapic(0, COUNT), 50, code)
            m.step(50 * divider)
            self.assertEqual(m.take(), [0x40], code)

    def test_divider_changes_while_running(self):
        m = self.m
        m.lapic(0, DIVIDE, 0xB)
        m.lapic(0, LVT_TIMER, 0x40)
        m.lapic(0, INIT_COUNT, 1000)
        m.step(500)
        m.lapic(0, DIVIDE, 0)
        self.assertEqual(m.lapic(0, COUNT), 500)
        m.step(999)
        self.assertEqual(m.take(), [])
        m.step(1)
        self.assertEqual(m.take(), [0x40])

    def test_periodic(self):
        m = self.m
        m.lapic(0, DIVIDE, 0xB)
        m.lapic(0, LVT_TIMER, 0x20041)
        m.lapic(0, INIT_COUNT, 1000000)
        ticks = 0
        for _ in range(10):
            m.step(1000000)
            ticks += len(m.take())
        self.assertEqual(ticks, 10)
        m.step(250000)
        self.assertEqual(m.lapic(0, COUNT), 750000)
        m.lapic(0, INIT_COUNT, 0)
        m.step(10**9)
        self.assertEqual(m.take(), [])

    def test_periodic_without_end_does_not_stop_the_machine(self):
        m = self.m
        m.lapic(0, DIVIDE, 0xB)
        m.lapic(0, LVT_TIMER, 0x20041)
        m.lapic(0, INIT_COUNT, 1)
        m.step(10**9)
        self.assertEqual(m.take(), [0x41])

    def test_tsc_deadline(self):
        m = self.m
        m.wrmsr(0, 0x6E0, 5000)                 # not in this mode: nothing
        self.assertEqual(m.rdmsr(0, 0x6E0), 0)
        m.lapic(0, LVT_TIMER, 0x40042)
        m.lapic(0, INIT_COUNT, 10)              # the other way round: nothing either
        self.assertEqual(m.lapic(0, INIT_COUNT), 0)
        m.wrmsr(0, 0x6E0, 5000)
        self.assertEqual(m.rdmsr(0, 0x6E0), 5000)
        m.step(4999)
        self.assertIsNone(m.pending())
        m.step(1)
        self.assertEqual(m.take(), [0x42])
        self.assertEqual(m.rdmsr(0, 0x6E0), 0)
        m.wrmsr(0, 0x6E0, 1)                    # past: at once
        self.assertEqual(m.take(), [0x42])
        m.wrmsr(0, 0x6E0, 10000)
        m.wrmsr(0, 0x6E0, 0)
        m.step(10000)
        self.assertEqual(m.take(), [])
        m.wrmsr(0, 0x6E0, 2**64 - 1)
        m.step(10**9)
        self.assertEqual(m.take(), [])
        m.lapic(0, LVT_TIMER, 0x42)             # leaving the mode disarms
        self.assertEqual(m.rdmsr(0, 0x6E0), 0)

    def test_masked_timer_runs_silently(self):
        m = self.m
        m.lapic(0, DIVIDE, 0xB)
        m.lapic(0, LVT_TIMER, 0x10040)
        m.lapic(0, INIT_COUNT, 100)
        m.step(100)
        m.lapic(0, LVT_TIMER, 0x40)
        self.assertEqual(m.take(), [])


class Ioapic(Case):
    def setUp(self):
        super().setUp()
        self.m.enable_lapics()

    def line(self, gsi, level):
        self.m.port_out(0x2000 + gsi, level)

    def test_edge(self):
        m = self.m
        m.route(5, 0x60, dest=1)
        self.line(5, 1)
        self.assertEqual(m.take(1), [0x60])
        self.line(5, 1)
        self.assertEqual(m.take(1), [])
        self.line(5, 0), self.line(5, 1)
        self.assertEqual(m.take(1), [0x60])
        self.assertEqual(m.take(0), [])

    def test_masked_edge_is_lost(self):
        m = self.m
        m.route(5, 0x60, MASKED)
        self.line(5, 1)
        m.route(5, 0x60)
        self.assertEqual(m.take(), [])

    def test_level(self):
        m = self.m
        m.route(6, 0x61, LEVEL)
        self.line(6, 1)
        self.assertEqual(m.ioapic(0x10 + 12) & REMOTE_IRR, REMOTE_IRR)
        self.assertEqual(m.ack(), 0x61)
        self.assertEqual(m.lapic(0, TMR + 0x30), 2)
        self.assertIsNone(m.pending())
        m.eoi()                                 # still up: again
        self.assertEqual(m.ack(), 0x61)
        self.line(6, 0)
        m.eoi()
        self.assertIsNone(m.pending())
        self.assertEqual(m.ioapic(0x10 + 12) & REMOTE_IRR, 0)

    def test_level_masked_then_unmasked(self):
        m = self.m
        m.route(6, 0x61, LEVEL | MASKED)
        self.line(6, 1)
        self.assertIsNone(m.pending())
        m.route(6, 0x61, LEVEL)
        self.assertEqual(m.pending(), 0x61)

    def test_level_that_nobody_takes_is_tried_again(self):
        m = self.m
        m.route(6, 0x61, LEVEL, dest=77)
        self.line(6, 1)
        self.assertEqual(m.ioapic(0x10 + 12) & REMOTE_IRR, 0)
        m.route(6, 0x61, LEVEL, dest=1)
        self.assertEqual(m.pending(1), 0x61)

    def test_eoi_register_and_suppressed_broadcast(self):
        m = self.m
        m.lapic(0, SVR, 0x11FF)
        m.route(6, 0x61, LEVEL)
        self.line(6, 1)
        self.assertEqual(m.take(), [0x61])      # no end reaches the IOAPIC
        m.store(IOAPIC + 0x40, 0x62)
        self.assertIsNone(m.pending())
        m.store(IOAPIC + 0x40, 0x61)
        self.assertEqual(m.pending(), 0x61)

    def test_edge_mode_clears_remote_irr(self):
        m = self.m
        m.route(6, 0x61, LEVEL)
        self.line(6, 1)
        m.route(6, 0x61, MASKED)
        self.assertEqual(m.ioapic(0x10 + 12) & REMOTE_IRR, 0)

    def test_shared_input(self):
        m = self.m
        m.route(9, 0x62, LEVEL)
        self.line(9, 1)
        m.ask("power_button")
        self.line(9, 0)
        self.assertEqual(m.gsi(9), 1)           # the event device still holds it
        self.assertEqual(m.port_in(0x604, 4), 1)
        self.assertEqual(m.gsi(9), 0)

    def test_reserved_bits_and_registers(self):
        m = self.m
        m.ioapic(0x10, 0xFFFFFFFF)
        self.assertEqual(m.ioapic(0x10), 0x1AFFF)
        m.ioapic(1, 0xFFFFFFFF)
        self.assertEqual(m.ioapic(1), 0x170020)
        m.ioapic(0x40, 0xFFFFFFFF)
        m.ioapic(0xFF, 0xFFFFFFFF)
        self.assertEqual(m.ioapic(0xFF), 0)
        for offset in (0x04, 0x11, 0x13, 0xFFC):
            m.store(IOAPIC + offset, 0xFFFFFFFF)
            m.load(IOAPIC + offset)
        for mode in (2, 3, 4, 5, 6, 7):
            m.route(3, 0x70 | mode << 8)
            self.line(3, 1), self.line(3, 0)
        self.assertEqual(m.signals(0), {"intr": "0", "nmi": "1", "smi": "1", "init": "1",
                                        "sipi": "0:0x0"})


class State(Case):
    def test_round_trip(self):
        m = self.m
        m.enable_lapics()
        m.lapic(0, DIVIDE, 3)
        m.lapic(0, LVT_TIMER, 0x20040)
        m.lapic(0, INIT_COUNT, 100000)
        m.lapic(0, TPR, 0x32)
        m.lapic(0, LDR, 1 << 24)
        m.lapic(0, ICR2, 0x02000000)
        m.lapic(0, ICR, 0x4055)
        m.wrmsr(1, 0x1B, 0xFEE00C00)
        m.wrmsr(1, 0x832, 0x40051)
        m.wrmsr(1, 0x6E0, 700000)
        m.route(6, 0x61, LEVEL)
        m.route(5, 0x60)
        m.port_out(0x2006, 1)
        m.port_out(0x2005, 1)
        m.step(123456)
        self.assertEqual(m.ack(), 0x61)
        self.assertIsNone(m.pending())
        other = self.check_round_trip()
        for each in (m, other):
            each.port_out(0x2006, 0)
            each.eoi()
            self.assertEqual(each.take(), [0x60])
            each.step(1500000)
            self.assertEqual(each.take(), [0x40])
            self.assertEqual(each.ack(1), 0x51)
            each.port_out(0x2005, 0), each.port_out(0x2005, 1)
            self.assertEqual(each.take(), [0x60])
        self.assertEqual(m.save(), other.save())

    def test_loading_into_a_machine_in_use(self):
        """Wires and modes that the present machine has do not show in what is loaded."""
        m = self.m
        m.enable_lapics()
        fresh = m.save()
        for gsi in (3, 4, 9):
            m.port_out(0x2000 + gsi, 1)
        m.ask("power_button")
        m.lapic(0, DFR, 0)
        m.lapic(0, ICR, 0xFFF33000 | 0x4400 | 1 << 18)
        m.wrmsr(0, 0x1B, 0xFEE00D00)
        busy = m.save()
        m.load_state(fresh)
        self.assertEqual(m.save(), fresh)
        self.assertEqual([m.gsi(n) for n in (3, 4, 9)], [0, 0, 0])
        m.load_state(busy)
        self.assertEqual(m.save(), busy)
        self.assertEqual([m.gsi(n) for n in (3, 4, 9)], [1, 1, 1])

    def test_other_number_of_cpus_is_refused(self):
        state = self.m.save()
        with self.assertRaises(Refused):
            self.machine(cpus=3).load_state(state)


if __name__ == "__main__":
    unittest.main()
