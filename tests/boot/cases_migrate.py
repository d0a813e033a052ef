"""Linux is moved about between processes and engines while it checks its memory, and either side or the link is killed.

migrate is the short test; migrate-storm, only when asked for, does MIGRATE_ROUNDS (default 200) with MIGRATE_SEED (default 1).
"""

import os

from cases import case
from machine import ENGINE, check, log, patience
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


@case(seconds=48 * 3600, wanted=True)
def migrate_storm(folder):
    rounds, seed = int(os.environ.get("MIGRATE_ROUNDS", "200")), int(os.environ.get("MIGRATE_SEED", "1"))
    outcomes = {}
    with Journey(folder, seed=seed, extra=("--cpus", str(1 + seed % 2)), workload="memcheck 16 1500 & memcheck 16 1500") as journey:
        choose = journey.random
        for i in range(rounds):
            if not journey.current:
                journey.start(choose.choice(ENGINES))
            fault = choose.choice(("none", "none", "kill-target", "kill-source", "cut", "cut-for-a-while"))
            post_copy = choose.choice(("auto", "never", "now"))
            if fault in ("kill-target", "cut") and post_copy == "now":
                post_copy = "never"     # the machine would wait for its memory for ever
            if fault == "none":
                journey.hop(choose.choice(ENGINES), "--post-copy", post_copy)
                outcome = "moved"
            else:
                outcome = journey.hop_with_fault(choose.choice(ENGINES), fault, "--post-copy", post_copy)
                if journey.current:
                    journey.progress()
            outcomes[fault, outcome] = outcomes.get((fault, outcome), 0) + 1
            if i % 10 == 9:
                log(f"migrate-storm: {i + 1} rounds: " + ", ".join(f"{f} {o} {n}" for (f, o), n in sorted(outcomes.items())))
