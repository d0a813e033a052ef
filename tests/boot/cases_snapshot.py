"""Snapshots and changes of the engine under a Linux that checks its memory, its arithmetic and its disk all the time."""

import json
import os
import re
import shutil
import struct
import subprocess
import time
from pathlib import Path

import machine
from cases import case
from machine import Machine, Skipped, check, ringfort, script

# Two of these run at once. Each round: a copy of 2 MiB of random bytes has their sum, floating-point arithmetic gives what it
# gave at first, and what the last two rounds wrote to the disk comes back from there. "BAD" is what must never be seen.
WORKLOAD = (
    "cd /tmp; sum() { set -- $(md5sum <$1); echo $1; }; "
    "put() { echo $2 | dd of=/dev/vda bs=512 seek=$(($1 * 4000 + $2 % 200 * 9)) count=1 conv=sync,fsync,notrunc 2>/dev/null; }; "
    "get() { dd if=/dev/vda bs=512 skip=$(($1 * 4000 + $2 % 200 * 9)) count=1 2>/dev/null | head -n 1; }; "
    "echo -e 'BEGIN { for (i = 0; i < 3000; i++) x += (i * i + 0.5) / (i + 1.25); print x }' >p; "
    "w() { dd if=/dev/urandom of=a$1 bs=1M count=2 2>/dev/null; s=$(sum a$1); f=$(awk -f p); n=1; put $1 $n; "
    "while :; do n=$((n + 1)); cp a$1 b$1; [ $(sum b$1) = $s ] || echo BAD memory $n; "
    "[ $(awk -f p) = $f ] || echo BAD arithmetic $n; put $1 $n; echo 3 >/proc/sys/vm/drop_caches; "
    "[ $(get $1 $n) = $n ] || echo BAD disk $n; [ $(get $1 $((n - 1))) = $((n - 1)) ] || echo BAD former $n; "
    "echo worker $1 round $n; done; }; w 0 & w 1"
)


class Host:
    """Machines and snapshots of a test, in folders of its own."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.env = {**os.environ, "XDG_RUNTIME_DIR": str(self.folder), "XDG_DATA_HOME": str(self.folder / "data")}

    def boot(self, name, *args):
        images = script("kernel", "cloud")
        initrd = script("initramfs", "--kernel", "cloud")
        disk = self.folder / "disk.img"
        with open(disk, "wb") as f:
            f.truncate(16 << 20)
        return Machine(self.folder, "--kernel", images / "vmlinuz", "--initrd", initrd, "--cpus", 2, "--disk", f"path={disk}",
                       "--cmdline", f'console=ttyS0 rf.cmd="{WORKLOAD}"', *args, memory="256M", name=name)

    def restore(self, snapshot, name, *args):
        return Machine(self.folder, command=[ringfort(), "snapshot", "restore", snapshot, "--name", name, *map(str, args)],
                       name=name)

    def run(self, *args, status=0, seconds=120):
        """A ringfort command; gives its JSON, or with a status what it says."""
        try:
            done = subprocess.run([ringfort(), *args, *([] if status else ["-o", "json"])], env=self.env, text=True,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  timeout=seconds * machine.patience(), check=False)
        except subprocess.TimeoutExpired:
            raise machine.Failure(f"ringfort {' '.join(args)} did not end within {seconds} s") from None
        check(done.returncode == status, f"ringfort {' '.join(args)} ended with status {done.returncode}: {done.stderr}")
        return done.stderr if status else json.loads(done.stdout)

    def snapshot(self, name):
        return self.folder / "data/ringfort/snapshots" / name


def good(m):
    check(not re.search(r"^BAD", m.console, re.M), f"the guest found damage:\n{m.console[-2000:]}")
    check("Call Trace" not in m.console, f"the guest's kernel complains:\n{m.console[-3000:]}")


def rounds(m, count=2, seconds=120):
    """Both workers finish some rounds more."""
    since = len(m.console)
    for worker in (0, 1):
        at = since
        for _ in range(count):
            at = m.expect(rf"^worker {worker} round \d+\s*$", seconds, at).end()
    good(m)


def round_of(text, worker):
    last = 0
    for line in text.splitlines():
        words = line.split()
        if words[:3] == ["worker", str(worker), "round"] and len(words) == 4 and words[3].isdigit():
            last = int(words[3])
    return last


def sections(data):
    """The sections at the top of a state file, as bytes by name."""
    check(data[:16] == b"ringfort machine", "the state file has another beginning")
    found, at, data = {}, 0, data[32:]
    while at < len(data):
        kind, length = data[at], data[at + 1]
        name = data[at + 2:at + 2 + length].decode()
        at += 2 + length + (4 if kind == ord("S") else 0)
        size = struct.unpack_from("<I", data, at)[0]
        found[name] = data[at + 4:at + 4 + size]
        at += 4 + size
    return found


def damaged(host, name):
    """A machine whose compressed memory is damaged ends, and says why."""
    shutil.copytree(host.snapshot(name), host.snapshot("bad"))
    with open(host.snapshot("bad") / "memory.zst", "r+b") as f:
        f.seek(os.fstat(f.fileno()).st_size // 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 4]))
    said = host.run("snapshot", "restore", "bad", "--name", "bad", "--console", "none", status=5)
    check(said.count("\n") == 1 and "bad/memory.zst: it is damaged" in said, f"a damaged one's machine says: {said}")
    host.run("snapshot", "rm", "bad")


@case(400)
def snapshot_restore_switch(folder):
    """Saved, killed, restored and switched, again and again: the guest finds nothing amiss."""
    if machine.ENGINE == "interp":
        raise Skipped("it runs on both engines in turns, so once is enough")
    host = Host(folder)
    with host.boot("first") as m:
        m.expect(r"^worker 1 round 2\s*$", 200)
        rounds(m, 1)
        # Compressed: what is restored from it runs while its memory is unpacked.
        told = host.run("snapshot", "save", "first", "one", "--compress")
        machine.log(f"saved: pause {told['pause_ms']:.1f} ms, {told['total_ms']:.0f} ms in all")
        # Far more than it takes (bench/snapshot measures that), far less than a pause that grows with memory.
        check(told["pause_ms"] < 1000, f"the guest stood still for {told['pause_ms']} ms")
        for engine in ("interp", "translate") * 3:
            told = host.run("engine", "first", engine)
            check(told["engine"] == engine and told["pause_ms"] < 1000, f"it says {told}")
        rounds(m, 1)
        check(host.run("snapshot", "save", "first", "one", status=1).count("\n") == 1, "an existing name is not refused in one line")
        m.kill()
    damaged(host, "one")
    with host.restore("one", "second") as m:
        rounds(m, 1)
        host.run("snapshot", "save", "second", "two")
        host.run("engine", "second", "interp" if machine.ENGINE == "translate" else "translate")
        rounds(m, 1)
        reached = [round_of(m.console, w) for w in (0, 1)]
        # Killed in the middle of a save: there is nothing of it, and the older ones are whole.
        with subprocess.Popen([ringfort(), "snapshot", "save", "second", "killed"], env=host.env, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as save:
            deadline = time.monotonic() + 60 * machine.patience()
            while not list(host.snapshot("x").parent.glob(".new-killed*/memory")):
                check(time.monotonic() < deadline and save.poll() is None, "the save does not begin")
            m.kill()
            check(save.wait(60) != 0, "a save that was killed ended well")
        check([s["name"] for s in host.run("snapshot", "ls")] == ["one", "two"], "a killed save left something in the list")
    # A snapshot of what was never let go is the same machine, byte by byte.
    with host.restore("two", "third", "--paused") as m:
        deadline = time.monotonic() + 30 * machine.patience()
        while not any(x["name"] == "third" and x["state"] == "paused" for x in host.run("ls")):
            check(time.monotonic() < deadline, "the restored machine is not listed as paused")
            time.sleep(0.05)
        host.run("snapshot", "save", "third", "three")
        a, b = (host.snapshot(name) for name in ("two", "three"))
        check((a / "memory").read_bytes() == (b / "memory").read_bytes(), "a restored memory is saved otherwise")
        first, second = (sections((x / "state").read_bytes()) for x in (a, b))
        for name in ("memory", "clock", "cpus", "devices"):
            check(first[name] == second[name], f"section {name} of a restored machine is saved otherwise")
        # It does not need what it came from.
        host.run("snapshot", "rm", "one")
        host.run("snapshot", "rm", "two")
        host.run("resume", "third")
        rounds(m, 1)
        for w in (0, 1):
            check(round_of(m.console, w) <= reached[w] + 50, "the rounds went on from elsewhere")
    check([s["name"] for s in host.run("snapshot", "ls")] == ["three"], "the list of snapshots is not as it should be")
