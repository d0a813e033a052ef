"""Reduced runs of the benchmarks whose bounds are promises: a machine that stands still for longer fails.

They run alone, and the best of a few runs counts: what else a host does makes some runs slow, a slower program all of them.
"""

import subprocess

import machine
from cases import case
from machine import ENGINE, ROOT, Skipped, check, log


def bench(name, *args, seconds):
    if ENGINE != "translate":
        raise Skipped("runs with the tests of the translator")
    done = subprocess.run([ROOT / "bench" / name, "--judge", "least", *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, timeout=seconds * machine.patience())
    log(done.stdout)
    check(done.returncode == 0, f"bench/{name} ended with status {done.returncode}:\n{done.stdout}")


@case(240, alone=True)
def bench_snapshot(folder):
    """Snapshot and restore within 100 ms, engine switch within 50 ms."""
    bench("snapshot", "--ringfort", machine.ringfort(), "--folder", folder, "--runs", "3", "--fill", "200", seconds=200)


@case(240, alone=True)
def bench_migrate(folder):
    """An idle machine of 1 GiB stands still for at most 50 ms."""
    bench("migrate", "--runs", "3", "idle", seconds=200)
