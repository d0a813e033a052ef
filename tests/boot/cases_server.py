"""The Debian server: boots to its login prompt, is used over ssh, survives the death of its VMM."""

import hashlib
import os
import re
import subprocess
import time

import machine
from cases import case
from machine import Failure, Server, check, log

COPY_BYTES = 100 * 1000 * 1000
LOGIN_SECONDS = 120


def digest(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            h.update(chunk)
    return h.hexdigest()


@case(1200, alone=True, parts=True)
def server(report, folder):
    s = Server(folder)
    with s.boot("server") as m:
        def login():
            m.expect(r"login: ", LOGIN_SECONDS)
            log(f"login prompt after {m.seconds():.1f} s")

        def console():
            # Boot messages may come after the prompt, so the prompt is asked for anew.
            at = len(m.console)
            m.type("root\n")
            m.expect(r"Password: ", 90, at)
            m.type(s.password + "\n")
            m.expect(r"root@testserver:~# ", 120, at)
            m.type("echo $((6 * 7))-$(tty)\n")
            m.expect(r"42-/dev/ttyS0\s", 60, at)
            m.type("exit\n")

        def system():
            state = s.ssh("systemctl is-system-running --wait", 240, status=None).strip()
            check(state == "running", f"the system is {state!r}:\n" +
                  s.ssh("systemctl --failed --no-legend --plain; journalctl -b -p err --no-pager", 120))
            check(s.ssh("hostname; uname -m", 60).split() == ["testserver", "x86_64"], "another host answered")
            bad = re.findall(r"^.*(?:BUG:|WARNING: CPU|rcu:.*stall|soft lockup|Call Trace).*$",
                             s.ssh("dmesg", 60), re.M)
            check(not bad, "the guest's kernel complained:\n" + "\n".join(bad))

        def copy():
            source, back = folder / "out.bin", folder / "in.bin"
            with open(source, "wb") as f:
                for _ in range(COPY_BYTES // 1000000):
                    f.write(os.urandom(1000000))
            start = time.monotonic()
            s.copy(source, "ringfort:/root/copy.bin", 300)
            log(f"100 MB in: {time.monotonic() - start:.1f} s")
            got = s.ssh("sha256sum /root/copy.bin", 120).split()[0]
            check(got == digest(source), "what was copied in differs")
            start = time.monotonic()
            s.copy("ringfort:/root/copy.bin", back, 300)
            log(f"100 MB out: {time.monotonic() - start:.1f} s")
            check(digest(back) == digest(source), "what was copied out differs")
            s.ssh("rm /root/copy.bin", 60)

        def fio():
            out = s.ssh("fio --name=verify --filename=/root/fio.bin --size=64M --rw=randwrite --bs=4k-64k "
                        "--ioengine=libaio --iodepth=8 --direct=1 --fsync=64 --verify=crc32c --verify_fatal=1 "
                        "--do_verify=1 && rm /root/fio.bin", 300)
            check(re.search(r"err= 0", out) and "READ:" in out, f"fio did not write and verify:\n{out}")

        def power_off():
            s.ssh("systemctl poweroff", 60, status=None)
            m.powered_off(120)
            fsck = subprocess.run(["e2fsck", "-fn", s.disk], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  check=False)
            check(fsck.returncode == 0, f"the disk is not clean after power off:\n{fsck.stdout}")

        if report.part("server-login-prompt", login):
            report.part("server-console-login", console)
            if report.part("server-system-running", system):
                report.part("server-copy-100MB", copy)
                report.part("server-fio-verify", fio)
                report.part("server-power-off", power_off)


# Appends blocks that can be checked from their number alone, each made durable before its number is told.
# Between them it makes and renames files, so that the journal has work.
WRITER = r'''
import os
def block(i):
    return (b"%016d" % i) * 256
def durable(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
os.makedirs("/root/crash", exist_ok=True)
f = os.open("/root/crash/blocks", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
durable("/root/crash")
i = 0
while True:
    os.write(f, block(i))
    os.fsync(f)
    name = "/root/crash/file-%d" % (i % 50)
    with open(name + ".new", "wb") as g:
        g.write(block(i)[:100])
        g.flush()
        os.fsync(g.fileno())
    os.rename(name + ".new", name)
    durable("/root/crash")
    print(i, flush=True)
    i += 1
'''

READER = r'''
import os, sys
acknowledged = int(sys.argv[1])
data = open("/root/crash/blocks", "rb").read()
for i in range(acknowledged + 1):
    if data[i * 4096:(i + 1) * 4096] != (b"%016d" % i) * 256:
        sys.exit("block %d, whose fsync returned, is not there" % i)
for i in range(max(0, acknowledged - 49), acknowledged + 1):
    n = int(open("/root/crash/file-%d" % (i % 50), "rb").read()[:16])
    if n < i:
        sys.exit("file-%d holds %d, not at least %d" % (i % 50, n, i))
print("all", acknowledged + 1, "there")
'''


@case(900)
def server_killed(folder):
    """The VMM gets SIGKILL while the guest writes; the next boot has every byte whose fsync returned."""
    s = Server(folder)
    for name, text in (("writer.py", WRITER), ("reader.py", READER)):
        (folder / name).write_text(text)
    with s.boot("first") as m:
        m.expect(r"login: ", 300)
        s.copy(folder / "writer.py", "ringfort:writer.py", 120)
        s.copy(folder / "reader.py", "ringfort:reader.py", 120)
        s.ssh("sync", 60)
        writer = s.popen("python3 writer.py", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                         stderr=subprocess.DEVNULL)
        acknowledged = -1
        for line in writer.stdout:
            acknowledged = int(line)
            if acknowledged >= 200:
                break
        if acknowledged < 200:
            raise Failure(f"the writer in the guest ended after {acknowledged + 1} blocks")
        m.kill()
        # What had been told before the end counts too.
        for line in writer.stdout:
            if line.endswith("\n"):
                acknowledged = int(line)
        writer.wait(60)
    log(f"killed after {acknowledged + 1} blocks")
    with s.boot("second") as m:
        m.expect(r"recovering journal|recovery complete", 300)
        m.expect(r"login: ", 300)
        out = s.ssh(f"python3 reader.py {acknowledged}", 120, status=None)
        check(f"all {acknowledged + 1} there" in out, f"after the crash: {out}")
        s.ssh("systemctl poweroff", 60, status=None)
        m.powered_off(120)
    fsck = subprocess.run(["e2fsck", "-fn", s.disk], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    check(fsck.returncode == 0, f"the disk is not clean:\n{fsck.stdout}")
