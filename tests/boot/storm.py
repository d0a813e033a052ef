"""One machine that is moved to and fro, while links are cut and processes are killed in every stage.

The guest checks its memory (and its disk), and prints a number for each batch of work. The numbers, over all consoles of all processes
that the machine has been in, have to be one rising sequence: one that comes twice, or goes back, is a machine that ran twice. They
go back only where a fault takes the side that ran the guest and it is continued from an earlier moment, by a documented command.

Every fault has a place (relay.py), and for each place docs/migration.md says what may come of it; allowed() is that table.
"""

import contextlib
import os
import re
import shutil
import signal
import statistics
import subprocess
import time
from collections import Counter

import machine
from machine import Failure, check, log, ringfort
from migration import ENGINES, Journey
from relay import Place, Relay

# Of each stage: direction, frame, the last occurrence that may be chosen.
STAGES = {
    "checks": ((">", "hello", 1), ("<", "hello", 1)),
    "reservation": ((">", "offer", 1), ("<", "ready", 1)),
    "pre-copy": ((">", "hello", 3), (">", "pages", 200), (">", "disk", 100), ("<", "fence", 2)),
    "stop-and-copy": ((">", "state", 1),),
    "commitment": (("<", "prepared", 1),),
    "activation": ((">", "commit", 1), ("<", "running", 1)),
    "post-copy": ((">", "missing", 1), (">", "pages", 200), ("<", "request", 3), ("<", "complete", 1)),
    "end": ((">", "complete", 1),),
}
POINTS = ("before", "inside", "after")
# kill-source and kill-target: SIGKILL. cut: for good; cut-for-a-while: for 0.3 s. silence: nothing passes any more, and nothing breaks;
# stall: for half a second.
FAULTS = ("kill-target", "kill-source", "cut", "cut-for-a-while", "silence", "stall")


class LostWrite(Failure):
    pass


class DoubleRun(Failure):
    pass


def allowed(fault, place):
    """What may come of a fault at a place, post-copy aside. Where STATE or PREPARED has just passed, what follows may have, too."""
    here, there = "resumed here", "resumed there"
    frame, after = place.frame, place.point == "after"
    racing = after and frame in ("state", "prepared")
    # Whether COMMIT has left the source, and arrived.
    sent = frame in ("commit", "running", "complete")
    committed = sent and (frame != "commit" or after)
    if fault == "stall":
        return {"moved"}
    if fault == "kill-source":
        # Before all is there it is gone, as without migration; then the target has it, or is told so by a person.
        if racing:
            return {there, "moved", "lost"} if frame == "state" else {there, "moved"}
        return {"moved"} if committed else {there} if sent or frame == "prepared" else {"lost"}
    if fault == "kill-target":
        # Whether COMMIT left the source the source alone knows: it asks, and a person decides when nobody answers.
        if racing:
            return {"stayed", here, "lost"}
        return {"stayed"} if not sent else {"lost"} if frame == "complete" or (frame == "running" and after) else {here}
    if racing:
        return {"stayed", "moved"} if fault == "cut-for-a-while" else {"stayed", "moved", here, there}
    if sent and not committed:
        return {"stayed"} if fault == "cut-for-a-while" else {here, there}
    return {"moved"} if committed else {"stayed"}


class Consoles:
    """The numbers that the guest has printed, as one sequence over all processes."""

    def __init__(self, journey):
        self.journey = journey
        self.last = {}                      # word: the highest number that counts

    def lines(self, name):
        text = self.journey.run("logs", name, status=None).stdout
        lost = re.search(r"^@lost.*", text, re.M)
        if lost:
            raise LostWrite(f"{name}: {lost[0]}")
        return text

    def numbers(self, name):
        """word: its numbers, of lines that are complete."""
        found = {}
        for word, n in re.findall(r"^@(\w+) (\d+)\r?\n", self.lines(name), re.M):
            found.setdefault(word, []).append(int(n))
        for word, numbers in found.items():
            for a, b in zip(numbers, numbers[1:]):
                if b <= a:
                    raise DoubleRun(f"{name}: @{word} {b} after {a}")
        return found

    def take(self, name):
        """What this process printed counts, so far."""
        for word, numbers in self.numbers(name).items():
            self.last[word] = max(self.last.get(word, 0), numbers[-1])

    def follows(self, name):
        """What this process printed comes after all that counts."""
        for word, numbers in self.numbers(name).items():
            if numbers[0] <= self.last.get(word, 0):
                raise DoubleRun(f"{name} begins with @{word} {numbers[0]}, and {self.last[word]} was printed elsewhere")

    def nothing(self, name):
        """This process never ran the machine."""
        if numbers := self.numbers(name):
            raise DoubleRun(f"{name} has printed {numbers}, and never had the machine")


class Storm(Journey):
    """words: what the guest's programs print before their numbers. flags: of each migration. fresh: called before each start."""

    def __init__(self, folder, words, flags=(), fresh=None, snapshots=True, **more):
        super().__init__(folder, **more)
        self.words, self.flags, self.fresh, self.snapshots = words, flags, fresh, snapshots
        self.consoles = Consoles(self)
        self.outcomes = Counter()           # (stage, fault, outcome)
        self.recoveries = Counter()
        self.rounds = self.machines_started = self.missed = 0
        self.downtimes = []
        self.seconds = 0.0

    # ---- the guest ----

    def begin(self, engine):
        if self.fresh:
            self.fresh()
        self.start(engine)
        self.machines_started += 1
        self.consoles.last = {}

    def goes_on(self):
        """All of the guest's programs do more work, and this process alone runs."""
        before, deadline = None, machine.Deadline(60)
        while True:
            now = {w: n[-1] for w, n in self.consoles.numbers(self.current).items()}
            before = before if before is not None else dict.fromkeys(self.words, 0) | now
            if all(now.get(w, 0) > before[w] for w in self.words):
                break
            check(deadline.left(), f"{self.current}: the guest makes no progress: {before}, {now}; ringfort said:\n"
                  f"{self.messages(self.current)[-800:]}")
            time.sleep(0.02)
        if self.running() != [self.current]:
            raise DoubleRun(f"{self.running()} run instead of {self.current} alone")

    # ---- a round ----

    def choose(self, quick=False):
        """A stage, a fault and a place; what costs half a minute of waiting more seldom, or not at all."""
        choice = self.random.choice
        while True:
            stage = choice(list(STAGES))
            fault = choice(FAULTS)
            spots = [s for s in STAGES[stage] if s[1] != "disk" or "--with-disks" in self.flags]
            place = Place(*self._nth(choice(spots)), choice(POINTS))
            if stage == "post-copy" and fault in ("cut", "silence"):
                continue                    # the machine would wait for its memory for ever
            if fault.startswith("kill") and self.dies(fault, stage, place) and not (self.snapshots and self.random.random() < 0.3):
                continue
            if self.is_slow(fault, place) and (quick or self.random.random() > 0.1):
                continue
            if fault == "silence" and stage == "reservation" and self.random.random() > 0.1:
                continue                    # the target has two minutes to make the machine
            return stage, fault, place

    def _nth(self, spot):
        way, frame, most = spot
        return way, frame, self.random.randint(1, most)

    @staticmethod
    def dies(fault, stage, place):
        """Whether the machine dies with the process, by what docs/migration.md says."""
        if stage == "post-copy":
            return True
        if stage == "end":
            return fault == "kill-target"
        return "lost" in allowed(fault, place)

    @staticmethod
    def is_slow(fault, place):
        return fault == "silence" or (fault in ("cut", "kill-target") and place.frame in ("prepared", "commit", "running"))

    def one(self, stage=None, fault=None, place=None, post_copy=None, target_flags=()):
        """One migration, whole or broken; then the machine's sequence is looked at, and it goes on somewhere."""
        self.rounds += 1
        source, engine = self.current, self.random.choice(ENGINES)
        post_copy = post_copy or ("now" if stage == "post-copy" else self.random.choice(("auto", "never")))
        protected = fault is not None and fault.startswith("kill") and self.dies(fault, stage, place)
        if protected:
            self.run("snapshot", "save", source, "storm")
        target, pids = self.receive(engine, *target_flags)
        victims = {"kill-target": pids, "kill-source": [self.machines()[source]["pid"]]}.get(fault, [])

        def act(relay):
            for pid in victims:
                kill(pid)
            if fault == "cut":
                relay.cut()
            elif fault == "cut-for-a-while":
                relay.cut(0.3)
            elif fault == "silence":
                relay.silence()
            elif fault == "stall":
                relay.silence(0.5)
            return fault in ("silence", "stall")

        relay = Relay(f"{self.folder}/{target}.link", f"{self.folder}/{target}.to", place, act)
        client = subprocess.Popen([ringfort(), "migrate", source, f"unix:{self.folder}/{target}.link", "-o", "json", "--post-copy",
                                   post_copy, *self.flags], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  env=self.environment, text=True)
        if fault == "kill-target" and stage == "post-copy":
            self.give_up_post_copy(source, client, relay)
        try:
            output, errors = client.communicate(timeout=120 * machine.patience())
        except subprocess.TimeoutExpired:
            client.kill()
            raise Failure(f"'ringfort migrate' does not end after {fault} at {place}; the source said:\n{self.messages(source)[-800:]}\n"
                          f"the target said:\n{self.messages(target)[-800:]}") from None
        what = f"round {self.rounds}, {source} to {target}, {fault} at {place}"
        try:
            # The side that lost the link for good waits for a person, who looks at both.
            outcome = self.settle(source, target)
            self.judge(stage, fault, place if relay.fired else None, outcome, source, target)
        except Failure as e:
            raise type(e)(f"{what}: {e}\non the link:\n" + "\n".join(relay.seen[-60:])) from None
        finally:
            relay.close()
        if not relay.fired:
            self.missed += fault is not None
            stage = fault = None
            check(client.returncode == 0, f"{what}: 'ringfort migrate' ended with {client.returncode}: {errors}")
        if fault is None and client.returncode == 0:
            self.downtimes.append(machine.json.loads(output)["downtime_ms"])
        self.outcomes[stage or "none", fault or "none", outcome] += 1
        if outcome in ("resumed here", "resumed there"):
            self.recoveries[f"ringfort resume at the {'source' if outcome == 'resumed here' else 'target'}"] += 1
        if outcome == "lost":
            self.restore()
        self.goes_on()
        self.consoles.take(self.current)
        self.tidy()
        return outcome

    def give_up_post_copy(self, source, client, relay):
        """The source of a target that is dead tries for ever to reach it: a person ends it."""
        deadline = machine.Deadline(60)
        while client.poll() is None and deadline.left():
            if relay.fired and "connecting again" in self.messages(source):
                self.run("stop", "--force", source, status=None)
                return
            time.sleep(0.05)

    def judge(self, stage, fault, place, outcome, source, target):
        """The outcome is one that docs/migration.md has for the fault, and nothing was printed twice."""
        if place is None:
            expected = {"moved"}
        elif stage == "post-copy":
            expected = {"moved", "stayed", "lost", "resumed here"} if fault.startswith("kill") or place.frame == "missing" else {"moved"}
        else:
            expected = allowed(fault, place)
        check(outcome in expected, f"{outcome}, and not {' or '.join(sorted(expected))}; the source said:\n"
              f"{self.messages(source)[-1500:]}\nthe target said:\n{self.messages(target)[-1500:]}")
        if outcome in ("moved", "resumed there"):
            self.consoles.take(source)
            self.consoles.follows(target)
        elif outcome == "stayed":
            self.consoles.nothing(target)
            self.consoles.take(source)
        elif outcome == "resumed here" and fault != "kill-target":
            self.consoles.nothing(target)

    def restore(self):
        """The process died with its machine, which goes on from its snapshot: the numbers go back to that moment."""
        name = self.next_name()
        self.run("snapshot", "restore", "storm", "--name", name, "--detach", "--engine", self.random.choice(ENGINES))
        self.current = name
        self.pids.add(self.machines()[name]["pid"])
        self.recoveries["ringfort snapshot restore"] += 1
        self.consoles.last = {}

    def tidy(self):
        """Only what the current machine needs stays."""
        self.run("snapshot", "rm", "storm", status=None)
        for old in (self.folder / "data/ringfort/machines").glob("*"):
            if old.name != self.current:
                shutil.rmtree(old)
        for old in (*self.folder.glob("m*.to"), *self.folder.glob("m*.link")):
            if old.name.partition(".")[0] != self.current:
                old.unlink()
        for old in (self.folder / "ringfort").glob("m*.*"):
            if old.name.partition(".")[0] != self.current:
                old.unlink()
        # A target whose source was cut off before it said what it is still waits for one.
        owner = self.machines()[self.current]["pid"]
        for pid in self.pids - {owner}:
            kill(pid)
        self.pids = {owner}

    def blow(self, rounds, name="storm"):
        """So many rounds. Gives what they came to; a failure ends them, and is in it."""
        began = time.monotonic()
        failure = None
        try:
            if not self.current:
                self.begin(self.random.choice(ENGINES))
            for i in range(rounds):
                self.one(*(self.choose() if self.random.random() < 0.75 else ()))
                if i % 50 == 49:
                    log(f"{name}: {i + 1} rounds, {sum(n for (s, _, _), n in self.outcomes.items() if s != 'none')} of them broken, "
                        f"{time.monotonic() - began:.0f} s")
        except Failure as e:
            failure = e
        self.seconds += time.monotonic() - began
        return self.figures(failure), failure

    def figures(self, failure):
        stages = {}
        for (stage, fault, outcome), n in sorted(self.outcomes.items()):
            stages.setdefault(stage, {}).setdefault(fault, {})[outcome] = n
        return {
            "rounds": self.rounds, "machines_started": self.machines_started,
            "moved": sum(n for (_, _, o), n in self.outcomes.items() if o in ("moved", "resumed there")),
            "broken": sum(n for (s, _, _), n in self.outcomes.items() if s != "none"), "places_not_reached": self.missed,
            "faults": stages, "recoveries": dict(self.recoveries),
            "lost_writes": int(isinstance(failure, LostWrite)), "double_runs": int(isinstance(failure, DoubleRun)),
            "failure": str(failure) if failure else None,
            "downtime_ms": {"median": statistics.median(self.downtimes), "worst": max(self.downtimes)} if self.downtimes else None,
            "checked": self.consoles.last, "seconds": round(self.seconds),
        }


def kill(pid):
    """SIGKILL, and nothing of it is left when this returns."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        while os.path.exists(f"/proc/{pid}") and " Z " not in open(f"/proc/{pid}/stat").read():
            time.sleep(0.001)


# What the guest writes of its disk, and what it leaves alone.
DISK_MIB, WRITTEN_MIB = 48, 16


def make_disk(path):
    """Zero where the guest writes; contents and a hole behind that."""
    with open(path, "wb") as f:
        f.seek((WRITTEN_MIB + 4) << 20)
        f.write(os.urandom(3 << 20))
        f.truncate(DISK_MIB << 20)


def of_memory_and_disk(folder, with_disks, seed, cpus=2):
    """The usual storm: two programs check memory, or one memory and one the disk that comes along."""
    if not with_disks:
        return Storm(folder, ("check", "other"), seed=seed, extra=("--cpus", str(cpus)),
                     workload="memcheck 16 1500 0 @other & memcheck 16 1500 0")
    disk = folder / "disk.img"
    return Storm(folder, ("check", "other"), ("--with-disks",), lambda: make_disk(disk), seed=seed,
                 extra=("--cpus", str(cpus), "--disk", f"path={disk}"),
                 workload=f"memcheck 16 1000 0 @other & diskcheck {WRITTEN_MIB} 600 /dev/vda 0")
