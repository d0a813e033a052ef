"""Machines that are moved about.

All machines of a Journey run detached under names of their own (m1, m2, ...), with control sockets and logs in the
journey's folder. The guest runs memcheck (memcheck.c), which finds writes that were lost on the way.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time

import machine
from machine import check, ringfort, script

ENGINES = ("interp", "translate")


class Journey:
    """
    One guest on its way through many processes.

    prefix: a command that runs ringfort in its turn, where machines are made. net: the first one's card.
    """

    def __init__(self, folder, memory="128M", workload="memcheck 32 3000", seed=1, extra=(), net="none", prefix=()):
        self.folder, self.memory, self.workload, self.extra, self.net, self.prefix = folder, memory, workload, extra, net, prefix
        self.random = random.Random(seed)
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "XDG_STATE_HOME": str(folder),
                            "XDG_DATA_HOME": str(folder / "data")}
        self.image = machine.programs(folder, "memcheck", "diskcheck")
        self.count, self.checked, self.current = 0, 0, None
        self.pids = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # ---- commands ----

    def run(self, *args, seconds=60, status=0, prefix=()):
        """prefix: a command that runs ringfort in its turn."""
        done = subprocess.run([*prefix, ringfort(), *map(str, args)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, env=self.environment, text=True, timeout=seconds * machine.patience())
        if status is not None:
            check(done.returncode == status, f"'ringfort {' '.join(map(str, args))}' ended with {done.returncode}: {done.stderr}")
        return done

    def machines(self):
        return {m["name"]: m for m in self.state(self.run("ls", "-o", "json").stdout)}

    @staticmethod
    def state(text):
        answer = json.loads(text)
        return answer["machines"] if isinstance(answer, dict) else answer

    def running(self):
        return sorted(n for n, m in self.machines().items() if m["state"] == "running")

    def messages(self, name):
        return self.run("logs", name, "--messages", status=None).stdout

    def said(self, name):
        """Its messages, of which there will be some: of a refusal the source may hear first."""
        deadline = time.monotonic() + 10 * machine.patience()
        while not self.messages(name) and time.monotonic() < deadline:
            time.sleep(0.05)
        return self.messages(name)

    def next_name(self):
        self.count += 1
        return f"m{self.count}"

    def waits_for_memory(self, name):
        """In post-copy, for a source that is gone."""
        said = self.messages(name)
        return said.rfind("still at the source") > said.rfind("the source is there again")

    # ---- the guest ----

    def start(self, engine):
        name = self.next_name()
        kernel = script("kernel", "cloud")
        initrd = script("initramfs", "--kernel", "cloud")
        self.run("run", "--detach", "--name", name, "--engine", engine, "--memory", self.memory, "--net", self.net, "--kernel",
                 kernel / "vmlinuz", "--initrd", initrd, "--initrd", self.image, "--cmdline",
                 f'console=ttyS0 rf.cmd="{self.workload}"', *self.extra, prefix=self.prefix)
        self.current, self.checked = name, 0
        self.pids.add(self.machines()[name]["pid"])
        self.progress(120)

    def go_on_from_snapshot(self):
        """The current machine is saved and cut off; another one goes on from there."""
        name = self.next_name()
        self.run("snapshot", "save", self.current, name, "--compress")
        self.run("stop", "--force", self.current)
        self.run("snapshot", "restore", name, "--name", name, "--detach")
        self.pids.add(json.loads(self.run("info", name, "-o", "json").stdout)["pid"])
        self.current = name

    def progress(self, seconds=60):
        """The current machine is the only one that runs, and its guest has found more pages right than ever."""
        deadline = time.monotonic() + seconds * machine.patience()
        while True:
            text = self.run("logs", self.current, status=None).stdout
            lost = re.search(r"@lost.*", text)
            check(not lost, f"{self.current}: {lost and lost[0]}")
            checks = [int(n) for n in re.findall(r"@check (\d+)", text)]
            if checks and checks[-1] > self.checked:
                self.checked = checks[-1]
                break
            check(time.monotonic() < deadline, f"{self.current}: the guest makes no progress; its console ends with:\n{text[-800:]}\n"
                  f"and ringfort said:\n{self.messages(self.current)[-800:]}")
            time.sleep(0.1)
        check(self.running() == [self.current], f"{self.running()} run instead of {self.current} alone")

    # ---- one migration ----

    def receive(self, engine, *flags, name=None, prefix=()):
        name = name or self.next_name()
        self.run("receive", name, "--listen", f"unix:{self.folder}/{name}.to", "--detach", "--engine", engine, *flags,
                 prefix=prefix or self.prefix)
        done = subprocess.run(["pgrep", "-f", f"receive {name} .*--listen unix:{self.folder}/"], stdout=subprocess.PIPE, text=True)
        pids = [int(p) for p in done.stdout.split()]
        check(pids, f"no process of {name} is there")
        self.pids |= set(pids)
        return name, pids

    def migrate(self, name, *flags, to=None, seconds=120, status=0):
        done = self.run("migrate", self.current, f"unix:{to or f'{self.folder}/{name}.to'}", "-o", "json", *flags,
                        seconds=seconds, status=status)
        return json.loads(done.stdout) if done.returncode == 0 else done

    def hop(self, engine, *flags, target_flags=(), name=None):
        name, _ = self.receive(engine, *target_flags, name=name)
        figures = self.migrate(name, *flags)
        self.current = name
        self.progress()
        return figures

    def settle(self, source, target):
        """What a person would do by what both sides say; afterwards one machine runs, or it is said that there is none."""
        deadline = time.monotonic() + 60 * machine.patience()
        outcome = {source: "stayed", target: "moved"}
        while True:
            there = self.machines()
            states = {n: there[n]["state"] for n in (source, target) if n in there}
            run = [n for n, s in states.items() if s == "running"]
            # Each says what it knows, and a command that cannot be right yet is refused.
            unknown = any(t in self.messages(source) for t in ("not known who has the machine", "stays paused here"))
            orphan = "source is gone" in self.messages(target)
            check(len(run) < 2, f"both {source} and {target} run")
            if run and run == list(states) and not (run == [target] and self.waits_for_memory(target)):
                self.current = run[0]
                return outcome[run[0]]
            if run == [source] and orphan:
                # The link broke when all was there: the source knows that it goes on, the target cannot.
                self.run("stop", "--force", target, status=None)
            elif run == [target] and source not in states:
                # Killed in post-copy: part of the memory is gone.
                self.run("stop", "--force", target, status=None)
            elif run == [target] and unknown:
                self.run("stop", "--force", source, status=None)
            elif not run and len(states) == 2 and unknown and orphan:
                # Neither can know, and both wait: whichever is chosen, the other ends first.
                chosen, other = self.random.sample((source, target), 2)
                self.run("stop", "--force", other, status=None)
            elif not run and list(states) == [source] and unknown:
                self.run("resume", source)
                outcome[source] = "resumed here"
            elif not run and list(states) == [target] and orphan:
                self.run("resume", target)
                outcome[target] = "resumed there"
            elif not states and (any(t in self.messages(target) for t in ("not received", "will not come", "turned away")) or
                                 any(t in self.messages(source) for t in ("has moved", "does not take the rest"))):
                # The source died as its owner, perhaps before it said that it is one, or in the middle of post-copy; or the target
                # did after it had taken the machine.
                self.current = None
                return "lost"
            check(time.monotonic() < deadline, f"after 60 s {source} and {target} are {states or 'gone'}; the source said:\n{self.messages(source)[-800:]}\n"
                  f"the target said:\n{self.messages(target)[-800:]}")
            time.sleep(0.05)
