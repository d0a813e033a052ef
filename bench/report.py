"""From raw runs of bench/vs-qemu to medians, ratios, a Markdown table, and which bounds are met."""

import math
import statistics

from workloads import COMPUTE, VECTOR

# What the translator promises. Ratios over QEMU's TCG are speed, those over the host are slowness.
TCG_MEAN, TCG_EACH, COMPUTE_MEAN, VECTOR_MEAN, BEYOND_RAM = 4.0, 1.2, 3.0, 1.5, 192 << 20
BASES = {"cpu": "processor seconds of all of the machine's processes", "wall": "elapsed seconds as the guest measured them"}


def geometric(values):
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def number(value, digits=2):
    return "" if value is None else f"{value:.{digits}f}"


def good(sample):
    return sample.get("status") == 0


class Summary:
    def __init__(self, raw, basis):
        """raw: what vs-qemu collects and writes as JSON; basis: "cpu" or "wall"."""
        self.raw, self.basis = raw, basis
        self.engines = list(raw["engines"])
        self.ours = [e for e in self.engines if raw["engines"][e]["kind"] == "ringfort"]
        self.rows = {r["name"]: r["kind"] for r in raw["workloads"]}

    def samples(self, engine, row):
        return self.raw["engines"][engine]["samples"].get(row, [])

    def median(self, engine, row, basis=None):
        values = [s[basis or self.basis] for s in self.samples(engine, row) if good(s)]
        return statistics.median(values) if values else None

    def ratio(self, over, under, row, basis=None):
        if over not in self.engines or under not in self.engines:
            return None
        a, b = self.median(over, row, basis), self.median(under, row, basis)
        return a / b if a and b else None

    def mean(self, over, under, kinds=None, basis=None):
        """Geometric mean of over ÷ under, and how many rows it has."""
        ratios = [self.ratio(over, under, row, basis) for row, kind in self.rows.items() if not kinds or kind in kinds]
        ratios = [r for r in ratios if r]
        return geometric(ratios), len(ratios)

    def wrong(self):
        """(engine, row, why) of the first sample that failed, or whose output is not the first engine's."""
        for row in self.rows:
            truth = next((s for e in self.engines for s in self.samples(e, row) if good(s) and s.get("digest")), {})
            for e in self.engines:
                for s in self.samples(e, row):
                    if not good(s):
                        yield e, row, s["why"]
                        break
                    if s.get("digest") != truth.get("digest"):
                        yield e, row, f"its output differs: {s['output']!r}, not {truth['output']!r}"
                        break

    def table(self):
        head = ["workload", "kind", *(f"{e}, s" for e in self.engines)]
        for e in self.ours:
            if "qemu" in self.engines:
                head.append(f"qemu ÷ {e}")
            if "native" in self.engines:
                head.append(f"{e} ÷ native")
        yield "| " + " | ".join(head) + " |"
        yield "| " + " | ".join(["---"] * 2 + ["---:"] * (len(head) - 2)) + " |"
        for row, kind in self.rows.items():
            cells = [row, kind]
            for e in self.engines:
                samples = self.samples(e, row)
                cells.append("failed" if samples and not any(map(good, samples)) else number(self.median(e, row), 3))
            for e in self.ours:
                if "qemu" in self.engines:
                    cells.append(number(self.ratio("qemu", e, row)))
                if "native" in self.engines:
                    cells.append(number(self.ratio(e, "native", row)))
            yield "| " + " | ".join(cells) + " |"

    def bounds(self, engine):
        """(met, text) for each figure that is promised and was measured."""
        def bound(value, limit, rows, at_least, text):
            if value is None:
                return
            met = value >= limit if at_least else value <= limit
            other = "wall" if self.basis == "cpu" else "cpu"
            over, under, kinds = rows
            also = number(self.mean(over, under, kinds, other)[0])
            yield met, (f"{text}: {value:.2f} ({'at least' if at_least else 'at most'} {limit} wanted; "
                        f"by {other} time {also}; {self.mean(over, under, kinds)[1]} rows)")

        over_tcg = ("qemu", engine, None)
        yield from bound(self.mean(*over_tcg)[0], TCG_MEAN, over_tcg, True, "speed over TCG, geometric mean")
        ratios = {row: r for row in self.rows if (r := self.ratio("qemu", engine, row))}
        if ratios:
            slow = [f"{row} {r:.2f}" for row, r in ratios.items() if r < TCG_EACH]
            yield not slow, (f"each row at least {TCG_EACH} times TCG's speed: " +
                             (", ".join(slow) + " are not" if slow else f"the slowest is {min(ratios, key=ratios.get)}, {min(ratios.values()):.2f}"))
        for kind, limit, text in ((COMPUTE, COMPUTE_MEAN, "user-mode compute"), (VECTOR, VECTOR_MEAN, "vector and crypto")):
            over_native = (engine, "native", [kind])
            yield from bound(self.mean(*over_native)[0], limit, over_native, False, f"time over native, {text} rows, geometric mean")
        peak = max(self.raw["engines"][engine]["beyond_ram"], default=None)
        if peak is not None:
            yield peak <= BEYOND_RAM, f"peak resident memory beyond guest RAM: {peak / (1 << 20):.0f} MiB (at most {BEYOND_RAM >> 20} wanted)"

    def markdown(self):
        raw = self.raw
        yield (f"{raw['host']['cpu']}, {raw['host']['processors']} processors, load average {raw['host']['load_before']:.1f} before and "
               f"{raw['host']['load_after']:.1f} after; guest kernel {raw['guest_kernel']}, 1 vCPU; {raw['qemu'] or 'no QEMU'}; "
               f"Ringfort {raw['revision']}; medians of {raw['runs']}; {'small' if raw['quick'] else 'full'} amounts of work.")
        yield f"Times and ratios are of {BASES[self.basis]}."
        yield ""
        yield from self.table()
        for engine in self.ours:
            yield ""
            yield f"Bounds, {engine}:"
            yield ""
            for met, text in self.bounds(engine):
                yield f"- {'MET   ' if met else 'MISSED'} {text}"
        wrong = list(self.wrong())
        if wrong:
            yield ""
            yield "Wrong or failed, and not in the figures where failed:"
            yield ""
            for engine, row, why in wrong:
                yield f"- {engine}, {row}: {why.splitlines()[0]}"
