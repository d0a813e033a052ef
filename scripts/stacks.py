"""Where the threads of processes are: for a test that hangs where nobody can attach to it afterwards.

    python3 scripts/stacks.py PID...

By gdb or eu-stack where there is one that may look, else what /proc tells of each thread. Only reads; each process stands still
for a moment. Python's own stack comes by itself when a test of scripts/check.py is ended by SIGABRT.
"""

import contextlib
import shutil
import subprocess
import sys
from pathlib import Path

LONGEST = 60        # seconds for one process


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return "(gone)"


def marked(name, value):
    """Processes with this in the environment that they were started with, except this one's."""
    entry = f"{name}={value}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return sorted(found)


def by_debugger(pid):
    """The text of a debugger, or None when there is none that can."""
    commands = [["gdb", "-nx", "-batch", "-p", str(pid), "-iex", "set debuginfod enabled off", "-ex", "set pagination off",
                 "-ex", "thread apply all backtrace 40"],
                ["eu-stack", "-p", str(pid)]]
    for command in commands:
        if not shutil.which(command[0]):
            continue
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                  text=True, errors="replace", timeout=LONGEST, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        frames = [line for line in done.stdout.splitlines() if line.startswith(("#", "Thread", "TID"))]
        if any(line.startswith("#") for line in frames):
            return "\n".join(frames)
    return None


def by_kernel(pid):
    """What each thread is called, where it waits in the kernel and for what."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*"), key=lambda t: int(t.name)):
        said = {}
        for name in ("comm", "wchan", "syscall", "stack", "status"):
            try:
                said[name] = (task / name).read_text(errors="replace").strip()
            except OSError as e:
                said[name] = f"({e.strerror})"
        state = next((line for line in said["status"].splitlines() if line.startswith("State:")), "State: ?")
        lines.append(f"Thread {task.name} \"{said['comm']}\" {state.replace(chr(9), ' ')}, wchan {said['wchan']}, syscall {said['syscall']}")
        lines += [f"    {line}" for line in said["stack"].splitlines()]
    return "\n".join(lines)


def stacks(pid):
    return f"==== process {pid}: {command_line(pid)[:300]}\n{by_debugger(pid) or by_kernel(pid)}\n"


if __name__ == "__main__":
    if len(sys.argv) < 2 or not all(a.isdigit() for a in sys.argv[1:]):
        sys.exit(__doc__)
    for number in sys.argv[1:]:
        print(stacks(int(number)), flush=True)
