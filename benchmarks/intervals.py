"""Means and ratios of a few measurements, with intervals that hold 95 times in 100. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t for 1 to 15 degrees of freedom, 95 % between minus and plus. More count as 15: a little too wide."""


@dataclass(frozen=True)
class Ratio:
    """How many times a figure is another, and the interval; NaN where there is nothing to tell an interval by."""

    value: float
    low: float
    high: float

    def verdict(self, tolerance: float = 0.0) -> str:
        """Whether the interval lies above 1, below 1 - tolerance, or across."""
        if math.isnan(self.low):
            return "not known"
        if self.high < 1 - tolerance:
            return "slower"
        return "faster" if self.low > 1 else "no difference shown"

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.value:.3f}{interval}"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours over theirs, of two independent samples: Welch's interval on the logarithms, so on geometric means."""
    a, b = ([math.log(value) for value in values] for values in (ours, theirs))
    middle = statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < 2:
        return Ratio(math.exp(middle), math.nan, math.nan)
    va, vb = (statistics.variance(values) / len(values) for values in (a, b))
    if va + vb == 0:
        return Ratio(math.exp(middle), math.exp(middle), math.exp(middle))
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return _around(middle, math.sqrt(va + vb), freedom)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours over theirs, measured in pairs at one moment each: Student's interval on the logarithms."""
    logs = [math.log(our / their) for our, their in zip(ours, theirs, strict=True)]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return Ratio(math.exp(middle), math.nan, math.nan)
    return _around(middle, statistics.stdev(logs) / math.sqrt(len(logs)), len(logs) - 1)


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the mean; NaN for one value."""
    return statistics.stdev(values) / statistics.fmean(values) if len(values) > 1 else math.nan


def _around(middle: float, error: float, freedom: float) -> Ratio:
    half = T_975[min(max(int(freedom), 1), len(T_975)) - 1] * error
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half))
