"""Linux is moved about between processes and engines while it checks its memory, and either side or the link is killed.

migrate and migrate-disks are the short tests; migrate-storm and migrate-disks-storm, only when asked for, do MIGRATE_ROUNDS (default
200) with MIGRATE_SEED (default 1).
"""

import os
import shutil
import subprocess
import time

from cases import case
from machine import ENGINE, Skipped, check, log, patience
from migration import ENGINES, Journey


def other(engine):
    return ENGINES[(ENGINES.index(engine) + 1) % len(ENGINES)]


@case(seconds=420, parts=True)
def migrate(report, folder):
    if ENGINE not in ENGINES:
        report.line("SKIP", "migrate", f"both engines of {', '.join(ENGINES)} take part already")
        return
    if ENGINE != "translate":
        # Both engines take part in each journey.
        report.line("SKIP", "migrate", "runs with the tests of the translator")
        return
    with Journey(folder) as journey:
        def there_and_back():
            journey.start(ENGINE)
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
            for fault in ("kill-target", "cut", "cut-for-a-while", "kill-source"):
                outcome = journey.hop_with_fault(ENGINE, fault)
                log(f"migrate: {fault}: {outcome}")
                if outcome == "lost":
                    # Who is killed after it took the machine takes it along, and settle() saw that this is what was said.
                    check(fault.startswith("kill"), f"{fault} lost the machine")
                    journey.start(ENGINE)
                else:
                    journey.progress()

        if report.part("migrate/there-and-back", there_and_back):
            report.part("migrate/post-copy", post_copy)
            report.part("migrate/refused", refused)
            report.part("migrate/faults", faults)


# What the guest writes, and what it leaves alone.
DISK_MIB, WRITTEN_MIB = 48, 16


def make_disk(path):
    """Zero where the guest writes; contents and a hole behind that."""
    with open(path, "wb") as f:
        f.seek((WRITTEN_MIB + 4) << 20)
        f.write(os.urandom(3 << 20))
        f.truncate(DISK_MIB << 20)


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
    make_disk(disk)
    with Journey(folder, workload=f"diskcheck {WRITTEN_MIB} 600 /dev/vda", extra=("--disk", f"path={disk}")) as journey:
        def place(name):
            return folder / "data/ringfort/machines" / name / "disk0"

        def along():
            journey.start(ENGINE)
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
            for fault in ("kill-target", "cut", "cut-for-a-while", "kill-source"):
                outcome = journey.hop_with_fault(ENGINE, fault, "--with-disks")
                log(f"migrate-disks: {fault}: {outcome}")
                if outcome == "lost":
                    check(fault.startswith("kill"), f"{fault} lost the machine")
                    make_disk(disk)
                    journey.start(ENGINE)
                else:
                    journey.progress()

        if report.part("migrate-disks/along", along):
            report.part("migrate-disks/faults", faults)

    def on_a_server():
        """The disk stays; each side has a connection while the machine is its. The server is killed once, too."""
        if not shutil.which("nbdkit"):
            raise Skipped("there is no nbdkit on this host")
        make_disk(disk)
        here = folder / "nbd"
        here.mkdir()
        server = Nbdkit(folder, disk)
        uri = f"nbd+unix:///?socket={server.path}"
        with server, Journey(here, workload=f"diskcheck {WRITTEN_MIB} 600 /dev/vda", extra=("--disk", uri)) as journey:
            journey.start(ENGINE)
            journey.hop("interp")
            server.stop()
            time.sleep(0.5)
            server.start()
            journey.progress()
            check("connected again" in journey.messages(journey.current), "nothing is said of the broken connection")
            # Nothing to be copied: it is where it is.
            figures = journey.hop(ENGINE, "--with-disks", "--post-copy", "now")
            check(figures["disk_bytes"] == 0, f"bad figures: {figures}")
            for fault in ("kill-target", "cut-for-a-while"):
                outcome = journey.hop_with_fault(ENGINE, fault)
                log(f"migrate-disks: on a server, {fault}: {outcome}")
                if outcome == "lost":
                    break
                journey.progress()
            if outcome != "lost":
                # What goes on from a snapshot has the disk as it was then, without the server.
                journey.go_on_from_snapshot()
                server.stop()
                journey.progress()

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


def storm(name, journey, start, *flags):
    """Migrations, most of them broken at random; the guest finds nothing amiss, and never two machines run."""
    rounds, outcomes = int(os.environ.get("MIGRATE_ROUNDS", "200")), {}
    choose = journey.random
    for i in range(rounds):
        if not journey.current:
            start()
        fault = choose.choice(("none", "none", "kill-target", "kill-source", "cut", "cut-for-a-while"))
        post_copy = choose.choice(("auto", "never", "now"))
        if fault in ("kill-target", "cut") and post_copy == "now":
            post_copy = "never"     # the machine would wait for its memory for ever
        if fault == "none":
            journey.hop(choose.choice(ENGINES), "--post-copy", post_copy, *flags)
            outcome = "moved"
        else:
            outcome = journey.hop_with_fault(choose.choice(ENGINES), fault, "--post-copy", post_copy, *flags)
            if journey.current:
                journey.progress()
        outcomes[fault, outcome] = outcomes.get((fault, outcome), 0) + 1
        if i % 10 == 9:
            log(f"{name}: {i + 1} rounds: " + ", ".join(f"{f} {o} {n}" for (f, o), n in sorted(outcomes.items())))
            for old in (journey.folder / "data/ringfort/machines").glob("*"):
                if old.name != journey.current:
                    shutil.rmtree(old)


def seed():
    return int(os.environ.get("MIGRATE_SEED", "1"))


@case(seconds=48 * 3600, wanted=True)
def migrate_storm(folder):
    with Journey(folder, seed=seed(), extra=("--cpus", str(1 + seed() % 2)), workload="memcheck 16 1500 & memcheck 16 1500") as journey:
        storm("migrate-storm", journey, lambda: journey.start(journey.random.choice(ENGINES)))


@case(seconds=48 * 3600, wanted=True)
def migrate_disks_storm(folder):
    disk = folder / "disk.img"
    with Journey(folder, seed=seed(), workload=f"diskcheck {WRITTEN_MIB} 600 /dev/vda", extra=("--disk", f"path={disk}")) as journey:
        def start():
            make_disk(disk)
            journey.start(journey.random.choice(ENGINES))

        storm("migrate-disks-storm", journey, start, "--with-disks")
