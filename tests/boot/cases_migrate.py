"""Linux is moved about between processes and engines while it checks its memory, and either side or the link is killed.

bench/migrate-storm does the same for a thousand rounds.
"""

import os
import select
import shutil
import subprocess
import sys
import time

from cases import case
from machine import ENGINE, Skipped, check, log, patience
from migration import ENGINES, Journey
from relay import Place
from storm import DISK_MIB, WRITTEN_MIB, Storm, make_disk, of_memory_and_disk


def other(engine):
    return ENGINES[(ENGINES.index(engine) + 1) % len(ENGINES)]


# One of each kind; those at random come on top.
FAULTS = (
    ("pre-copy", "kill-target", Place(">", "pages", 20, "inside")),
    ("stop-and-copy", "cut", Place(">", "state", 1, "before")),
    ("commitment", "kill-source", Place("<", "prepared", 1, "before")),
    ("activation", "kill-source", Place(">", "commit", 1, "after")),
    ("activation", "cut-for-a-while", Place("<", "running", 1, "inside")),
    ("post-copy", "cut-for-a-while", Place(">", "pages", 5, "inside")),
    ("pre-copy", "kill-source", Place(">", "pages", 20, "after")),
)


def break_some(name, journey, faults, at_random):
    """These faults, and so many more that the time of day chooses."""
    for stage, fault, place in faults:
        log(f"{name}: {fault} at {place}: {journey.one(stage, fault, place)}")
    seed = int(time.time())
    log(f"{name}: {at_random} more by seed {seed}")
    journey.random.seed(seed)
    for _ in range(at_random):
        stage, fault, place = journey.choose(quick=True)
        log(f"{name}: {fault} at {place}: {journey.one(stage, fault, place)}")


@case(seconds=420, parts=True)
def migrate(report, folder):
    if ENGINE not in ENGINES:
        report.line("SKIP", "migrate", f"both engines of {', '.join(ENGINES)} take part already")
        return
    if ENGINE != "translate":
        # Both engines take part in each journey.
        report.line("SKIP", "migrate", "runs with the tests of the translator")
        return
    with of_memory_and_disk(folder, False, seed=1) as journey:
        def there_and_back():
            journey.begin(ENGINE)
            figures = journey.hop(other(ENGINE))
            # bench/migrate measures; this bound is for busy hosts.
            check(figures["rounds"] >= 1 and figures["bytes"] > 0 and not figures["post_copy"], f"bad figures: {figures}")
            check(figures["downtime_ms"] <= 1000 * patience(), f"the guest stood still for {figures['downtime_ms']} ms")
            figures = journey.hop(ENGINE, "--streams", "4", "--compress", "--post-copy", "never")
            check(figures["downtime_ms"] <= 1000 * patience(), f"the guest stood still for {figures['downtime_ms']} ms")

        def post_copy():
            figures = journey.hop(ENGINE, "--post-copy", "now")
            check(figures["post_copy"] and figures["pages_requested"] > 0, f"bad figures: {figures}")

        def refused():
            name, _ = journey.receive("interp", "--net", "user")
            done = journey.migrate(name, status=1)
            check("network cards" in done.stderr, f"the source says: {done.stderr}")
            journey.progress()

        def faults():
            break_some("migrate", journey, FAULTS, 8)

        if report.part("migrate/there-and-back", there_and_back):
            report.part("migrate/post-copy", post_copy)
            report.part("migrate/refused", refused)
            report.part("migrate/faults", faults)


def tail(path):
    with open(path, "rb") as f:
        f.seek(WRITTEN_MIB << 20)
        return f.read()


@case(seconds=420, parts=True)
def migrate_disks(report, folder):
    """A guest that checks what it writes to its disk, whose disk moves along, or is on a server."""
    if ENGINE != "translate":
        report.line("SKIP", "migrate-disks", "runs with the tests of the translator")
        return
    disk = folder / "disk.img"
    with of_memory_and_disk(folder, True, seed=1) as journey:
        def place(name):
            return folder / "data/ringfort/machines" / name / "disk0"

        def along():
            journey.begin(ENGINE)
            name = journey.current
            figures = journey.hop(ENGINE, "--with-disks")
            log(f"migrate-disks: {figures['disk_bytes']} bytes of disks, stood still for {figures['downtime_ms']} ms")
            check(figures["disk_bytes"] > 3 << 20, f"bad figures: {figures}")
            check(figures["downtime_ms"] <= 1000 * patience(), f"the guest stood still for {figures['downtime_ms']} ms")
            check(tail(place(journey.current)) == tail(disk), "what the guest left alone is not the same there")
            check(place(journey.current).stat().st_blocks * 512 < (WRITTEN_MIB + 8) << 20, "holes were filled")
            # Nothing of the machine is where it was, so this disk has no part in what follows.
            disk.write_bytes(b"")
            check(name not in journey.machines(), "the source is still there")
            journey.hop("interp", "--with-disks", "--streams", "4", "--compress")
            journey.hop(ENGINE, "--with-disks", "--post-copy", "now")
            os.makedirs(folder / "elsewhere")
            journey.hop(ENGINE, "--with-disks", target_flags=("--disks", f"{folder}/elsewhere"))
            check(list(folder.glob("elsewhere/*.disk0")), "the disk is not where it was to be put")

        def faults():
            break_some("migrate-disks", journey, (("pre-copy", "kill-target", Place(">", "disk", 20, "inside")), *FAULTS[2:5]), 4)

        def left_behind():
            """A target that is killed leaves nothing that looks like a disk, and the next one of the name clears it away."""
            place = folder / "killed"
            os.makedirs(place)
            def there():
                return sorted(f.name for f in place.iterdir())

            journey.one("pre-copy", "kill-target", Place(">", "disk", 20, "inside"), target_flags=("--disks", place))
            target = f"m{journey.count}"
            check(there() == [f"{target}.disk0.partial"], f"the killed target left {there()}")
            journey.hop(ENGINE, "--with-disks", target_flags=("--disks", place), name=target)
            check(there() == [f"{target}.disk0"], f"the next target left {there()}")
            # With a source that is gone as well, all of it is there; the name comes with the machine.
            journey.one("commitment", "kill-source", Place("<", "prepared", 1, "before"), target_flags=("--disks", place))
            check(f"m{journey.count}.disk0" in there() and not [n for n in there() if n.endswith("partial")], f"left: {there()}")
            # In a machine's own folder.
            journey.receive(ENGINE)
            target = f"m{journey.count}"
            mine = folder / "data/ringfort/machines" / target
            mine.mkdir(parents=True)
            (mine / "disk0.partial").write_bytes(b"half")
            journey.migrate(target, "--with-disks")
            journey.current = target
            journey.progress()
            check([f.name for f in mine.iterdir()] == ["disk0"], f"left: {list(mine.iterdir())}")
            check(not list(mine.parent.glob(f"{target}.until-*")), "half a disk is kept as a former machine's")

        if report.part("migrate-disks/along", along):
            report.part("migrate-disks/left-behind", left_behind)
            report.part("migrate-disks/faults", faults)

    def not_there():
        """What the target will need is looked for before anything is copied: both sides say what is wrong, and the source goes on."""
        here = folder / "shared"
        here.mkdir()
        shared, away = here / "shared.img", here / "away.img"
        make_disk(shared)
        with Storm(here, ("check",), workload=f"diskcheck {WRITTEN_MIB} 600 /dev/vda 0", extra=("--disk", f"path={shared}")) as journey:
            journey.begin(ENGINE)

            def refused(why, *prefix):
                name, _ = journey.receive(ENGINE, prefix=prefix)
                done = journey.migrate(name, status=1)
                for side, said in (("source", done.stderr), ("target", journey.said(name))):
                    lines = [s for s in said.splitlines() if "ended with status" not in s]
                    check(len(lines) == 1 and why in lines[0], f"the {side} does not say {why!r} in a line, but {said!r}")
                check("in stage reservation" in done.stderr, f"not before pre-copy: {done.stderr}")
                journey.goes_on()

            shared.rename(away)
            refused("No such file")
            shared.mkdir()
            refused("a directory is no disk")
            shared.rmdir()
            shared.write_bytes(b"\0" * (DISK_MIB << 19))
            refused("it is another one")
            shared.unlink()
            away.rename(shared)
            if os.geteuid() == 0:
                refused("Read-only file system", "unshare", "--mount", "sh", "-c",
                        f'mount --bind "{shared}" "{shared}" && mount -o remount,bind,ro "{shared}" && exec "$@"', "sh")
            else:
                log("migrate-disks: only root can have a disk that only the target cannot write")
            journey.hop(ENGINE)

    def on_a_server():
        """The disk stays; each side has a connection while the machine is its. The server is killed once, too."""
        if not shutil.which("nbdkit"):
            raise Skipped("there is no nbdkit on this host")
        make_disk(disk)
        here = folder / "nbd"
        here.mkdir()
        server = Nbdkit(folder, disk)
        uri = f"nbd+unix:///?socket={server.path}"
        with server, Storm(here, ("check",), workload=f"diskcheck {WRITTEN_MIB} 600 /dev/vda 0", extra=("--disk", uri)) as journey:
            journey.begin(ENGINE)
            journey.hop("interp")
            server.stop()
            time.sleep(0.5)
            server.start()
            deadline = time.monotonic() + 20 * patience()
            while "connected again" not in journey.messages(journey.current):
                check(time.monotonic() < deadline, "nothing is said of the broken connection")
                time.sleep(0.05)
            journey.goes_on()
            server.stop()
            name, _ = journey.receive(ENGINE)
            done = journey.migrate(name, status=1)
            said = journey.said(name)
            check("in stage reservation" in done.stderr and "No such file" in done.stderr and
                  "No such file" in said, f"the source says {done.stderr}, the target {said}")
            server.start()
            journey.goes_on()
            # Nothing to be copied: it is where it is.
            figures = journey.hop(ENGINE, "--with-disks", "--post-copy", "now")
            check(figures["disk_bytes"] == 0, f"bad figures: {figures}")
            for stage, fault, place in FAULTS[:5]:
                log(f"migrate-disks: on a server, {fault}: {journey.one(stage, fault, place)}")
            # What goes on from a snapshot has the disk as it was then, without the server.
            journey.go_on_from_snapshot()
            server.stop()
            journey.goes_on()

    report.part("migrate-disks/not-there", not_there)
    report.part("migrate-disks/on-a-server", on_a_server)


class Nbdkit:
    """An NBD server that takes one client at a time."""

    def __init__(self, folder, disk):
        self.path, self.disk, self.process = folder / "nbd.sock", disk, None

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        self.process = subprocess.Popen(["nbdkit", "-f", "--exit-with-parent", "-U", self.path, "--filter=limit", "file", self.disk,
                                         "limit=1"], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while not self.path.exists():
            check(time.monotonic() < deadline and self.process.poll() is None, "nbdkit does not start")
            time.sleep(0.01)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.path.unlink(missing_ok=True)


# In a network namespace: two hosts' interfaces, and what is seen on the second one.
NAMESPACE = """
ip netns add {n} &&
for i in 0 1; do ip -n {n} tuntap add tap$i mode tap && ip -n {n} link set tap$i up || exit 1; done
"""
LISTEN = """
import socket, sys
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind(("tap1", 3))
print("listening", flush=True)
while True:
    print(s.recv(2048).hex(), flush=True)
"""
GUEST_MAC, GUEST_ADDRESS = "52:54:00:0a:0b:0c", "10.213.8.2"


@case(seconds=180)
def migrate_announce(folder):
    """After activation the network where the machine is now hears of it: RARP from its host, and ARP from the guest."""
    namespace = f"rfa{os.getpid() % 100000}"
    inside = ("ip", "netns", "exec", namespace)
    if ENGINE != "translate":
        raise Skipped("runs with the tests of the translator")
    if os.geteuid() != 0 or not shutil.which("ip") or not os.path.exists("/dev/net/tun"):
        raise Skipped("needs root, ip(8) and /dev/net/tun")
    made = subprocess.run(["sh", "-c", NAMESPACE.format(n=namespace)], stderr=subprocess.PIPE, text=True)
    try:
        if made.returncode:
            raise Skipped(f"this host gives no tap in a network namespace: {made.stderr.strip()}")
        with subprocess.Popen([*inside, sys.executable, "-c", LISTEN], stdout=subprocess.PIPE, bufsize=0) as listener, \
                Journey(folder, net=f"tap,ifname=tap0,mac={GUEST_MAC}", prefix=inside,
                        workload=f"ip addr add {GUEST_ADDRESS}/24 dev eth0; ip link set eth0 up; memcheck 4 1000 100") as journey:
            try:
                check(listener.stdout.readline() == b"listening\n", "nothing can be heard on the interface")
                journey.start(ENGINE)
                journey.hop(ENGINE, target_flags=("--net", "tap,ifname=tap1"))
                hear_announcements(listener.stdout)
            finally:
                listener.kill()
    finally:
        subprocess.run(["ip", "netns", "del", namespace], stderr=subprocess.DEVNULL)


def hear_announcements(lines):
    """Ethernet's and ARP's layouts: RFC 826 and 903."""
    mac, address = bytes.fromhex(GUEST_MAC.replace(":", "")), bytes(map(int, GUEST_ADDRESS.split(".")))
    to_all = b"\xff" * 6 + mac
    rarp = to_all + b"\x80\x35" + b"\0\1\x08\0\6\4\0\3" + mac + bytes(4) + mac + bytes(4)
    arp = to_all + b"\x08\x06" + b"\0\1\x08\0\6\4"
    heard, deadline = [], time.monotonic() + 20 * patience()
    missing = {"RARP": 2, "ARP": 1}
    while any(n > 0 for n in missing.values()):
        left = deadline - time.monotonic()
        check(left > 0 and select.select([lines], [], [], left)[0],
              f"missing on the wire: {missing}; heard: {heard}")
        frame = bytes.fromhex(lines.readline().decode())
        heard.append(frame[:42].hex())
        missing["RARP"] -= frame.startswith(rarp)
        missing["ARP"] -= frame.startswith(arp) and frame[22:28] == mac and frame[28:32] == address
