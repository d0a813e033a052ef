#!/usr/bin/env python3
"""What bench/vs-qemu makes of raw figures: medians, means, which bounds are met, which outputs are wrong."""
import copy
import pathlib
import subprocess
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import report  # noqa: E402


def samples(*cpu, digest="d"):
    return [{"status": 0, "cpu": c, "wall": 2 * c, "digest": digest, "output": digest} for c in cpu]


RAW = {
    "host": {"cpu": "a processor", "processors": 2, "load_before": 0, "load_after": 0}, "guest_kernel": "6", "qemu": "QEMU",
    "revision": "r", "runs": 3, "quick": False,
    "workloads": [{"name": "a", "kind": "compute"}, {"name": "b", "kind": "vector"}, {"name": "boot", "kind": "system"}],
    "engines": {
        "native": {"kind": "native", "beyond_ram": [], "samples": {"a": samples(1, 1, 9), "b": samples(2)}},
        "qemu": {"kind": "qemu", "beyond_ram": [], "samples": {"a": samples(16, 16, 16), "b": samples(10), "boot": samples(40)}},
        "translate": {"kind": "ringfort", "beyond_ram": [100 << 20, 150 << 20],
                      "samples": {"a": samples(2, 1, 4), "b": samples(2.5), "boot": samples(5)}},
    },
}


class Figures(unittest.TestCase):
    def summary(self, change=None):
        raw = copy.deepcopy(RAW)
        if change:
            change(raw["engines"]["translate"])
        return report.Summary(raw, "cpu")

    def met(self, summary):
        return [met for met, _ in summary.bounds("translate")]

    def test_means(self):
        s = self.summary()
        self.assertEqual(s.median("translate", "a"), 2)
        self.assertEqual(s.median("translate", "a", "wall"), 4)
        mean, rows = s.mean("qemu", "translate")
        self.assertAlmostEqual(mean, (8 * 4 * 8) ** (1 / 3))
        self.assertEqual(rows, 3)
        self.assertAlmostEqual(s.mean("translate", "native", ["vector"])[0], 1.25)
        self.assertEqual(s.mean("translate", "native", ["system"]), (None, 0))

    def test_bounds(self):
        self.assertEqual(self.met(self.summary()), [True] * 5)
        for change, missed in (
                (lambda e: e["samples"].update(boot=samples(35)), [0, 1]),
                (lambda e: e["samples"].update(b=samples(3.1)), [3]),
                (lambda e: e["samples"].update(a=samples(3.1)), [2]),
                (lambda e: e["samples"].update(a=samples(8), b=samples(8)), [0, 2, 3]),
                (lambda e: e["beyond_ram"].append(193 << 20), [4])):
            met = self.met(self.summary(change))
            self.assertEqual([i for i, m in enumerate(met) if not m], missed)

    def test_wrong(self):
        self.assertEqual(list(self.summary().wrong()), [])
        wrong = list(self.summary(lambda e: e["samples"].update(b=samples(1, digest="x"))).wrong())
        self.assertEqual([(e, row) for e, row, _ in wrong], [("translate", "b")])
        failed = self.summary(lambda e: e["samples"].update(b=[{"status": -1, "why": "it hangs"}]))
        self.assertEqual(list(failed.wrong()), [("translate", "b", "it hangs")])
        self.assertEqual(failed.mean("qemu", "translate")[1], 2)
        self.assertTrue(any("failed" in line for line in failed.table()))

    def test_alone(self):
        """One engine has times, and a bound on its memory."""
        raw = copy.deepcopy(RAW)
        raw["engines"] = {"translate": raw["engines"]["translate"]}
        s = report.Summary(raw, "cpu")
        self.assertEqual(self.met(s), [True])
        self.assertIn("| a | compute | 2.000 |", list(s.table()))

    def test_table(self):
        lines = list(self.summary().table())
        self.assertEqual(len({line.count("|") for line in lines}), 1)
        self.assertIn("| a | compute | 1.000 | 16.000 | 2.000 | 8.00 | 2.00 |", lines)

    def test_usage(self):
        for args, text in ((["--only", "nosuch"], "no workload is called nosuch"), (["--engines", "kvm2"], "no engine is called kvm2"),
                           (["--variant", "x"], "--variant x")):
            done = subprocess.run([sys.executable, ROOT / "bench/vs-qemu", *args], stderr=subprocess.PIPE, text=True, check=False)
            self.assertEqual(done.returncode, 2)
            self.assertIn(text, done.stderr)


if __name__ == "__main__":
    unittest.main()
