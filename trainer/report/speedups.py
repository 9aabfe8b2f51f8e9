"""Time to accuracy, and how much sooner one run reaches it than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

from trainer.records.reader import Eval, Run

Bound = Literal["=", "≥", "≤"]
# thousandths: accuracies are compared more finely where they are harder to come by
LEVELS = (*range(0, 900, 20), *range(900, 980, 5), *range(980, 1001))


@dataclass(frozen=True)
class Crossing:
    """When a run reached an accuracy, in training seconds; `exact` is false where it was before the first look."""

    seconds: float
    exact: bool


@dataclass(frozen=True)
class Speedup:
    """The first run's time to an accuracy over another's: equal to, at least (≥) or at most (≤) the ratio."""

    accuracy: float
    ratio: float
    bound: Bound


def with_distinct_labels(runs: Sequence[Run]) -> list[Run]:
    """These runs, told apart: equal names get their parent folder's before them, or else a number after them."""
    labels = [run.label for run in runs]
    labels = [
        f"{run.folder.resolve().parent.name}/{label}" if labels.count(label) > 1 else label
        for run, label in zip(runs, labels, strict=True)
    ]
    labels = [
        f"{label} ({labels[: i + 1].count(label)})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]
    return [replace(run, label=label) for run, label in zip(runs, labels, strict=True)]


def best_so_far(evals: Sequence[Eval]) -> list[tuple[float, float]]:
    """(training seconds, best accuracy up to then) at every evaluation that measured one."""
    seen = [(each.elapsed_s, each.accuracy) for each in evals if each.accuracy is not None]
    return list(zip([s for s, _ in seen], accumulate((a for _, a in seen), max), strict=True))


def time_to_accuracy(evals: Sequence[Eval], accuracy: float) -> Crossing | None:
    """When the best accuracy so far reached this one, linear between evaluations; None where it never did.

    >>> time_to_accuracy([Eval(1, 10, 10.0, 0.5, None), Eval(2, 20, 20.0, 0.7, None)], 0.6)
    Crossing(seconds=15.0, exact=True)
    """
    curve = best_so_far(evals)
    after = next((i for i, (_, best) in enumerate(curve) if best >= accuracy), None)
    if after is None:
        return None
    seconds, best = curve[after]
    if after == 0:
        return Crossing(seconds, exact=best == accuracy)
    before_s, before = curve[after - 1]
    return Crossing(before_s + (accuracy - before) / (best - before) * (seconds - before_s), exact=True)


def speedups(reference: Run, run: Run) -> tuple[Speedup, ...]:
    """Time-to-accuracy speedups of `run` over `reference`, rising: at the grid's accuracies from the reference's first
    evaluation on that both reached, and last at the highest that both reached. Empty where there is none."""
    curves = [best_so_far(each.evals) for each in (reference, run)]
    if not all(curves):
        return ()
    highest = min(curve[-1][1] for curve in curves)
    levels = [level / 1_000 for level in LEVELS if curves[0][0][1] <= level / 1_000 < highest]
    found = (_speedup(reference, run, level) for level in (*levels, highest))
    return tuple(each for each in found if each is not None)


def _speedup(reference: Run, run: Run, accuracy: float) -> Speedup | None:
    theirs, ours = (time_to_accuracy(each.evals, accuracy) for each in (reference, run))
    if theirs is None or ours is None or theirs.seconds <= 0 or ours.seconds <= 0:
        return None
    bound: Bound = "≤" if not theirs.exact else "=" if ours.exact else "≥"
    return Speedup(accuracy, theirs.seconds / ours.seconds, bound)
