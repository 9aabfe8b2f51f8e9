"""Two clusters, or two commits, side by side: samples/s of every case that both measured, with intervals.

    python -m benchmarks.compare A B

A and B are folders of `benchmarks.throughput`. A ratio is A over B, so above 1 A is faster. Its interval is Welch's at
95 % over the repeats, on logarithms; where it holds 1, no difference is shown. Imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.intervals import ratio
from benchmarks.throughput import cost
from benchmarks.throughput.records import Measured, load
from benchmarks.throughput.suite import label
from trainer.cli import guarded
from trainer.errors import ConfigError
from trainer.report import text

HEAD = ["case", "A samples/s", "B samples/s", "A / B", "95 %", "A is"]


def main(argv: Sequence[str]) -> int:
    """Print the comparison."""
    if len(argv) != 2 or any(word.startswith("-") for word in argv):
        raise ConfigError("command line: write A B, two folders of benchmarks.throughput")
    a, b = (load(Path(folder)) for folder in argv)
    print("\n".join(compared(a, b)))
    return 0


def compared(a: Measured, b: Measured) -> Iterator[str]:
    """The lines of the comparison.

    Raises:
        ConfigError: folders of different tasks, or without a case in common.
    """
    a.task.refuse_other(b.task, str(a.folder), str(b.folder))
    ours, theirs = a.by_case, b.by_case
    both = [case for case in ours if case in theirs]
    if not both:
        raise ConfigError(
            f"{b.folder}: has no case in common with {a.folder} (models, batches, periods, wire formats, world sizes); "
            "measure both with the same flags"
        )
    yield from (f"{name}: {told_of(measured)}" for name, measured in (("A", a), ("B", b)))
    yield ""
    rows = []
    for case in both:
        mine, other = ([run.figures["samples_per_s"] for run in runs[case]] for runs in (ours, theirs))
        found = ratio(mine, other)
        interval = "one repeat" if found.low != found.low else f"{found.low:.3f} to {found.high:.3f}"
        means = [f"{fmean(values):,.0f}" for values in (mine, other)]
        rows.append([label(case), *means, f"{found.value:.3f}", interval, found.verdict()])
    yield text.columns([HEAD, *rows], words=(0, 5))
    left = len(ours) + len(theirs) - 2 * len(both)
    yield from [f"{left} cases were measured by one of the two alone"] if left else []
    yield ""
    yield from _costs(a, b)


def told_of(measured: Measured) -> str:
    """A folder, and what it was measured with."""
    seen = {str(run.provenance.get("commit", ""))[:10]: run.provenance for run in measured.good}
    return f"{measured.folder} ({'; '.join(text.pairs(each) for each in seen.values())})"


def _costs(a: Measured, b: Measured) -> Iterator[str]:
    """The fitted costs beside one another."""
    ours, theirs = (_cost(measured) for measured in (a, b))
    for name in (name for name in ours.compute if name in theirs.compute):
        both = ours.compute[name], theirs.compute[name]
        steps = [f"{each.start_s * 1e3:.2f} ms + {each.per_sample_s * 1e6:.1f} µs a sample" for each in both]
        yield f"a step of {name}: {steps[0]}, against {steps[1]}"
    for name in (name for name in ours.links if name in theirs.links):
        links = ours.links[name], theirs.links[name]
        rates = [f"{each.latency_s * 1e6:,.0f} µs + bytes at {text.size(each.bytes_per_s)}/s" for each in links]
        yield f"a transfer ({name}): {rates[0]}, against {rates[1]}"


def _cost(measured: Measured) -> cost.CostModel:
    """The folder's cost file, which somebody may have replaced; fitted anew where there is none."""
    path = measured.folder / "cost.json"
    return cost.CostModel.load(path) if path.exists() else cost.fit(measured)


if __name__ == "__main__":
    sys.exit(guarded("benchmarks.compare", lambda: main(sys.argv[1:])))
