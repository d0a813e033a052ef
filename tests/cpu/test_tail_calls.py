#!/usr/bin/env python3
"""The interpreter's handlers go on to the next one by a tail call: a guest's loop must not grow the host's stack.

    test_tail_calls.py LIBRARY      the engine's static library, built with optimization

GCC gives up tail calls without a word, such as where a local variable's address has escaped. What is looked for is an indirect call in the
interpreter's files other than those that are meant. Exit status 77: nothing to look at.
"""

import re
import subprocess
import sys

# These call what is no handler, or are where all begins.
MEANT = {"block_kill", "unlink_from_page", "interp_run", "step", "op_semantics", "op_semantics_end"}


def main():
    try:
        text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", sys.argv[1]], stdout=subprocess.PIPE, text=True, check=True).stdout
    except OSError as e:
        print(f"skipped: objdump: {e.strerror}")
        return 77
    bad, seen, interpreter, function = set(), 0, False, ""
    for line in text.splitlines():
        if match := re.match(r"(\S+):\s+file format", line):
            interpreter = "interp_" in match[1]
        elif match := re.match(r"[0-9a-f]+ <([^>]+)>:$", line):
            function = match[1].split(".")[0]
            seen += interpreter
        elif interpreter and re.search(r"\tcall\s+\*", line) and function not in MEANT:
            bad.add(function)
    if seen < 100:
        print(f"skipped: only {seen} functions of the interpreter in {sys.argv[1]}")
        return 77
    for name in sorted(bad):
        print(f"{name} calls what should be a tail call")
    return bool(bad)


sys.exit(main())
