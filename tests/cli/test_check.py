#!/usr/bin/env python3
"""What scripts/check.py does with tests that pass, fail and hang."""
import contextlib
import io
import os
import pathlib
import re
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import check  # noqa: E402
import stacks  # noqa: E402

# Waits in a function of that name, and has started a process that left the session and tells its number.
HANGS = """
import subprocess, time
child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
print("child", child.pid, flush=True)
def hang_here():
    time.sleep(1000)
hang_here()
"""


class Runner(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.logs = check.LOGS
        self.root = check.ROOT
        check.LOGS = check.ROOT = pathlib.Path(self.folder.name)
        self.addCleanup(lambda: (setattr(check, "LOGS", self.logs), setattr(check, "ROOT", self.root)))

    def run_one(self, text, seconds=30, reports=False, name="unit/one"):
        """The tally, the log's text, and what was printed."""
        tally = check.Tally()
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            check.run_test(check.Test(name, [sys.executable, "-c", text], seconds, reports=reports), tally)
            check.repeat_logs(tally.failures)
        return tally, (check.LOGS / (name.replace("/", "-") + ".log")).read_text(), said.getvalue()

    def counts(self, tally):
        return tally.passed, tally.failed, tally.skipped

    def test_status_counts(self):
        for status, counts in ((0, (1, 0, 0)), (1, (0, 1, 0)), (check.MESON_SKIPPED, (0, 0, 1))):
            tally, _, _ = self.run_one(f"import sys; print('why'); sys.exit({status})")
            self.assertEqual(self.counts(tally), counts)

    def test_parts_count_each(self):
        tally, _, said = self.run_one("print('PASS a/x: 1 s\\nFAIL b: no\\nSKIP c: none'); raise SystemExit(1)", reports=True)
        self.assertEqual(self.counts(tally), (1, 1, 1))
        self.assertIn("PASS unit/a/x: 1 s", said)
        self.assertIn("FAIL unit/b: no", said)

    def test_no_parts_are_a_failure(self):
        for status in (0, 1):
            tally, _, _ = self.run_one(f"raise SystemExit({status})", reports=True)
            self.assertEqual(self.counts(tally), (0, 1, 0))

    def test_the_end_of_a_failed_log_is_repeated(self):
        _, _, said = self.run_one("print('\\n'.join(f'line {i}.' for i in range(100))); raise SystemExit(3)")
        self.assertIn("line 99.", said)
        self.assertIn(f"line {100 - check.REPEATED_LINES}.", said)
        self.assertNotIn(f"line {99 - check.REPEATED_LINES}.", said)

    def test_a_hang_leaves_stacks_and_no_processes(self):
        tally, log, said = self.run_one(HANGS, seconds=1)
        self.assertEqual(self.counts(tally), (0, 1, 0))
        self.assertRegex(said, r"not done after \d s")
        self.assertRegex(said, r"(?m)^  \| (#|Thread)")
        child = int(re.search(r"(?m)^child (\d+)$", log).group(1))
        self.assertRegex(log, rf"process {child}: sleep 1000")
        self.assertRegex(log, r"(?m)^(#|Thread)")
        self.assertIn("hang_here", log)         # by Python's own fault handler
        with contextlib.suppress(FileNotFoundError):
            state = pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            self.assertEqual(state, "Z")

    def test_stacks_without_a_debugger(self):
        self.assertIn(f"Thread {os.getpid()} ", stacks.by_kernel(os.getpid()))


if __name__ == "__main__":
    unittest.main()
