"""The worth of a candidate Plan: its samples a second, times how much a sample teaches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trainer.plan import Plan
from trainer.policies.constants import CONSTANTS
from trainer.policies.goodput import Costs, delay_of


@dataclass(frozen=True)
class Worth:
    """A candidate Plan and what is expected of it."""

    plan: Plan
    samples_per_s: float
    """Over all ranks."""
    efficiency: float
    """How much a sample teaches, of what it would at the smallest batch without drift: 0 to 1."""
    bytes_per_sample: float
    """Of float32 values: averages a sample, times the format's share."""
    drift: float
    """As `drift_of` tells it."""
    reach: float = 1.0
    """How far a step reaches, of one in an optimizer that goes on: federated devices' begin anew with every round."""

    @property
    def goodput(self) -> float:
        """Samples a second that teach as the smallest batch's do."""
        return self.samples_per_s * self.reach * self.efficiency

    def told(self) -> dict[str, Any]:
        """For a decision's record."""
        plan, numbers = self.plan, (self.samples_per_s, self.efficiency, self.goodput)
        rate, efficiency, goodput = (float(f"{number:.5g}") for number in numbers)
        return {
            "batch": plan.batch_per_rank,
            "period": plan.sync_period_steps,
            "delay": plan.delay_steps,
            "wire": plan.wire_format,
            "fragments": plan.fragments or 1,
            "samples_per_s": rate,
            "efficiency": efficiency,
            "goodput": goodput,
            **({"reach": float(f"{self.reach:.5g}")} if self.reach != 1 else {}),
        }


def worth(plan: Plan, costs: Costs, ranks: int, base_batch: int, max_drift: float) -> Worth:
    """A Plan's worth by these costs.

    Efficiency is (φ + B₀) / (φ + B) for the batch (Pollux, after McCandlish et al. 2018) times
    1 / (1 + d / max_drift) for a mean drift d, times the format's worth, over what steps by one rank's gradients fall
    short of those by the mean of all (`shortfall`).
    """
    batch, period, wire = plan.batch_per_rank, plan.sync_period_steps, plan.wire_format or "float32"
    ranks, round_s = max(ranks, 1), costs.round(plan, ranks)
    efficiency, drift = 1.0, drift_of(plan, costs, ranks)
    if batch > base_batch:
        noise = costs.noise_scale
        efficiency = (noise + ranks * base_batch) / (noise + ranks * batch)
    efficiency /= 1 + drift / max_drift
    if period > 1:
        efficiency *= CONSTANTS.format_worth[wire] / shortfall(costs, ranks)
    shares = CONSTANTS.bytes_of_float32["float32" if period == 1 else wire] / (period * batch * ranks)
    rate = ranks * batch * period / round_s if round_s > 0 else math.inf
    reach = costs.reach(period) * (1 - costs.momentum) / period if costs.of_devices else 1.0
    return Worth(plan, rate, efficiency, shares, drift, reach)


def shortfall(costs: Costs, ranks: int) -> float:
    """How much further along the mean gradient a step by all ranks' mean gradient goes than the mean of N ranks' steps
    by their own.

    An optimizer whose steps do not grow with the gradient (Adam: it divides each value by the root of its mean square)
    goes as far by a gradient of noise as by one of signal. Where values are mostly noise, ranks' own are √N times as
    large as their mean's, and the common part of their steps is √N times shorter. SGD loses nothing. In between it is
    √N to the power 1 - p of an optimizer of response p.

    The noise scale would allow less where the gradient is long, but it tells of the few values that make it long, and
    Adam weighs all alike. Two ranks of a GPT, whose noise scale gives 1.2, had mean displacements that were 1.17, 1.33
    and 1.41 times shorter than averaged gradients' early, in the middle and late in a run (in rounds of 8).
    """
    return float(max(ranks, 1) ** ((1 - costs.response) / 2))


def drift_of(plan: Plan, costs: Costs, ranks: int) -> float:
    """Divergence over the model's squared norm that a Plan leads to, mean over a round's steps, times (N - 1)^1.5 of N
    ranks; 0 where none was seen.

    A delay of D makes replicas D steps' worth apart when they take an average, and period + D steps' just before; of
    fragments each has its own turn, and is as far apart as the whole model would be.

    The more ranks the shorter periods have to be: by the bound of Yu, Yang and Zhu 2019 (arXiv 1807.06629) in
    proportion to T^(1/4) N^(-3/4), where as many samples make T steps in proportion to 1 / N, and so to 1 / N. With
    (N - 1)^1.5 they are in proportion to 1 / (N - 1), and two ranks are what the bound was found for.

    Federated devices drift by how far their optimizers reach, which begin anew with every round. They count as two
    however many there are: a cohort is a sample of all devices, and the more there are the less its mean is off.
    """
    period, delay = plan.sync_period_steps, delay_of(plan)
    if costs.of_devices and costs.drift > 0:
        return float(costs.drift * costs.reach(period) ** CONSTANTS.drift_power / (CONSTANTS.drift_power + 1))
    if period == 1 or not costs.drift > 0:
        return 0.0
    power = CONSTANTS.drift_power + 1
    mean = float((period + delay) ** power - delay**power) / (power * period)
    return float(max(ranks - 1, 0) ** CONSTANTS.drift_power * costs.drift * mean)
