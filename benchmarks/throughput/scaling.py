"""Scaling curves: the same case on more and more ranks. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from benchmarks.throughput.records import Measured
from benchmarks.throughput.suite import Case


@dataclass(frozen=True)
class Point:
    """One world size."""

    ranks: int
    samples_per_s: float
    """Of all ranks, mean over repeats."""
    efficiency: float
    """Samples/s a rank, over those of the curve's smallest world."""


@dataclass(frozen=True)
class Curve:
    """One way of training, by world size."""

    model: str
    label: str
    points: tuple[Point, ...]


def curves(measured: Measured, kind: Literal["weak", "strong"] | str) -> Iterator[Curve]:
    """The curves of two world sizes or more: of equal batches a rank (weak), or of equal batches in all (strong).

    One rank alone sends nothing: it begins the curves of every period and wire format.
    """
    rates = {case: fmean(run.figures["samples_per_s"] for run in runs) for case, runs in measured.by_case.items()}
    ways: dict[tuple[str, int, int, str], dict[int, float]] = {}
    alone: dict[tuple[str, int], float] = {}
    for case, rate in rates.items():
        batch = _batch(case, kind)
        if case.world_size == 1:
            alone[case.model, batch] = rate
        else:
            ways.setdefault((case.model, batch, case.sync_period_steps, case.wire_format), {})[case.world_size] = rate
    for (model, batch, period, wire), by_ranks in sorted(ways.items()):
        if (model, batch) in alone:
            by_ranks[1] = alone[model, batch]
        if len(by_ranks) < 2:
            continue
        first = min(by_ranks)
        each = by_ranks[first] / first
        points = (Point(ranks, rate, rate / ranks / each) for ranks, rate in sorted(by_ranks.items()))
        whose = "a rank" if kind == "weak" else "in all"
        yield Curve(model, f"batch {batch} {whose}, period {period}, {wire}", tuple(points))


def _batch(case: Case, kind: str) -> int:
    return case.batch_per_rank if kind == "weak" else case.batch_per_rank * case.world_size
