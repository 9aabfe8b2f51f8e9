"""Sums and means of all ranks' numbers of a round, and estimates smoothed over observations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.control.reports import Total
from trainer.plan import Observation

DECAY = 0.95
TREND_OBSERVATIONS = 16


@dataclass
class Smoothed:
    """An exponential mean that is right from its first value on (bias correction, as in Adam)."""

    decay: float = DECAY
    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float) -> None:
        """Take a value in; one that was not measured changes nothing."""
        if math.isfinite(value):
            self.total = self.decay * self.total + (1 - self.decay) * value
            self.weight = self.decay * self.weight + 1 - self.decay

    @property
    def mean(self) -> float:
        """NaN before the first value."""
        return self.total / self.weight if self.weight else math.nan


def noise(total: Total) -> tuple[float, float]:
    """‖G‖² of the full gradient G, and tr Σ of one sample's gradient, both without bias (McCandlish et al. 2018, A.1).

    With b_k samples on rank k and weights w_k in the mean, E‖g_k‖² = ‖G‖² + tr Σ / b_k and
    E‖Σ w_k g_k‖² = ‖G‖² + tr Σ · Σ w_k² / b_k; so unequal batches count by their harmonic mean. At period 1 the norm
    of the mean was measured; in a local phase it is put together from the norms and the sketches' products.
    Ranks here are all parts that noted a gradient: the ranks themselves, or the devices that they host.
    NaN, NaN where a rank has no gradient to tell of, and on one rank.
    """
    parts, sums = total.sums["parts"], total.sums
    if parts < 2 or not math.isfinite(sums["grad_sq"]):
        return math.nan, math.nan
    own, mean, mean_noise = sums["grad_sq"] / parts, sums["mean_grad_sq"] / parts, sums["mean_noise"]
    if not math.isfinite(mean):
        cross = sum(value * value for value in total.sketch) - sums["sketch_sq"]
        mean, mean_noise = (sums["grad_sq"] + cross) / parts**2, sums["own_noise"] / parts**2
    between = sums["own_noise"] / parts - mean_noise
    if not abs(between) > 1e-6 * sums["own_noise"] / parts:  # with given noise the mean may have more than its parts
        return math.nan, math.nan
    variance = (own - mean) / between
    return own - variance * sums["own_noise"] / parts, variance


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through (x, y) points; NaN for fewer than three, or all of one x."""
    count = len(points)
    if count < 3:
        return math.nan
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else math.nan


@dataclass
class Signals:
    """The estimates that need more than one observation; the same on every rank."""

    sq_norm: Smoothed = field(default_factory=Smoothed)
    variance: Smoothed = field(default_factory=Smoothed)
    of_one: bool = False
    """Noise was seen where replicas were one."""
    losses: list[tuple[float, float]] = field(default_factory=list)

    def take(self, total: Total, samples: int, loss: float) -> dict[str, float]:
        """The Observation's smoothed figures after these reports; `samples` are all that were trained.

        Replicas that are apart where they look at the gradient (under a delay, with mixing, between averages of
        parts, where none are averaged) make it seem two to four times as noisy as it is; once noise was seen where they
        were one, theirs is left out.
        """
        sq_norm, variance = noise(total)
        apart = total.most["grad_apart"] > 0
        if not (apart and self.of_one):
            self.sq_norm.add(sq_norm)
            self.variance.add(variance)
            self.of_one |= not apart and math.isfinite(sq_norm)
        if math.isfinite(loss):
            self.losses = [*self.losses, (float(samples), loss)][-TREND_OBSERVATIONS:]
        both = self.sq_norm.mean > 0 and self.variance.mean > 0
        return {
            "grad_sq_norm": self.sq_norm.mean,
            "grad_variance": self.variance.mean,
            "noise_scale": self.variance.mean / self.sq_norm.mean if both else math.nan,
            "loss_trend": slope(self.losses),
            "loss_window": int(self.losses[-1][0] - self.losses[0][0]) if self.losses else 0,
        }

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; JSON values."""
        return {
            "sq_norm": [self.sq_norm.total, self.sq_norm.weight],
            "variance": [self.variance.total, self.variance.weight],
            "of_one": self.of_one,
            "losses": [list(point) for point in self.losses],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in ("sq_norm", "variance"):
            smoothed: Smoothed = getattr(self, name)
            smoothed.total, smoothed.weight = state[name]
        self.of_one = state["of_one"]
        self.losses = [(x, y) for x, y in state["losses"]]


def reduce(total: Total, before: int) -> Observation:
    """The Observation of all ranks together; `before` is the samples trained up to the last one."""
    sums, most, ranks = total.sums, total.most, total.ranks
    return Observation(
        round=int(total.alike["round"]),
        local_step=int(total.alike["step"]),
        samples=before + int(sums["samples"]),
        ranks=ranks,
        steps=round(sums["steps"] / ranks),
        lr=sums["lr"] / ranks,
        train_loss=sums["loss_sum"] / sums["loss_samples"] if sums["loss_samples"] else math.nan,
        train_accuracy=sums["correct"] / sums["judged"] if sums["judged"] else math.nan,
        compute_s=sums["compute_s"] / ranks,
        slowest_compute_s=most["slowest_compute_s"],
        sync_wait_s=sums["wait_s"] / ranks,
        transfer_s=most["transfer_s"],
        sent_bytes=sums["sent_bytes"] / ranks,
        grad_change=most["grad_change"],
        memory_share=most["memory"],
        skipped_steps=int(sums["skipped"]),
    )
