"""Runs that differ in their seed only are one line of the report, with its spread."""

from __future__ import annotations

import json
import statistics
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from trainer.records.reader import Run

OWN = ("seed", "name", "root", "resume", "reference")
"""Fields of the section `run` that are a run's own."""
GRID = 60
"""Points that curves of several seeds are compared at."""


@dataclass(frozen=True)
class Line:
    """One run, or several of different seeds."""

    label: str
    runs: tuple[Run, ...]

    def numbers(self, name: str) -> list[float]:
        """A figure of each run that has it."""
        return [value for run in self.runs if (value := run.number(name)) is not None]

    def mean(self, name: str) -> float | None:
        """Mean of a figure over the runs that have it; None where none has."""
        found = self.numbers(name)
        return statistics.fmean(found) if found else None

    def spread(self, name: str) -> float | None:
        """Standard deviation of a figure over the seeds; None for fewer than two."""
        found = self.numbers(name)
        return statistics.stdev(found) if len(found) > 1 else None


def lines_of(runs: Sequence[Run]) -> list[Line]:
    """The runs as lines, in the order in which each line's first run comes."""
    groups: dict[Any, list[tuple[Any, Run]]] = {}
    for number, run in enumerate(runs):
        task, seed = _task(run)
        key = (task,) if task is not None else (number, "alone")
        if any(seed == other for other, _ in groups.get(key, [])):
            key = (number, "alone")  # the same seed again is another run
        groups.setdefault(key, []).append((seed, run))
    return [_line([run for _, run in group]) for group in groups.values()]


def _task(run: Run) -> tuple[str | None, Any]:
    """All that the configuration says but what is a run's own, and its seed; None where there is no configuration."""
    try:
        table = tomllib.loads(run.config_text)
    except tomllib.TOMLDecodeError:
        return None, None
    own = table.get("run", {})
    if not table or "seed" not in own:
        return None, None
    seed = own["seed"]
    table["run"] = {name: value for name, value in own.items() if name not in OWN}
    return json.dumps(table, sort_keys=True, default=str), seed


def _line(runs: Sequence[Run]) -> Line:
    if len(runs) == 1:
        return Line(runs[0].label, tuple(runs))
    common = _common([run.label for run in runs]) or _common([run.folder.name for run in runs])
    return Line(f"{common or runs[0].label} ({len(runs)} seeds)", tuple(runs))


def _common(names: Sequence[str]) -> str:
    """The letters that all names begin with."""
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike).rstrip(" -_.(/")


def band(curves: Sequence[Sequence[tuple[float, float | None]]]) -> tuple[Any, Any, Any]:
    """Places, means and standard deviations of curves of (x, y), where all of them were measured."""
    seen = [[(x, y) for x, y in curve if y is not None] for curve in curves]
    seen = [curve for curve in seen if curve]
    low, high = max((curve[0][0] for curve in seen), default=0), min((curve[-1][0] for curve in seen), default=0)
    if not seen or low > high:
        return np.empty(0), np.empty(0), np.empty(0)
    at = np.linspace(low, high, GRID)
    values = np.stack([np.interp(at, [x for x, _ in curve], [y for _, y in curve]) for curve in seen])
    return at, values.mean(axis=0), values.std(axis=0, ddof=1 if len(seen) > 1 else 0)
