"""What all ranks' numbers of a round come to: sums and means, and estimates smoothed over observations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.control.reports import SKETCH_NAMES
from trainer.plan import Observation

Header = Mapping[str, float]
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


def noise(headers: Sequence[Header]) -> tuple[float, float]:
    """‖G‖² of the full gradient G, and tr Σ of one sample's gradient, both without bias (McCandlish et al. 2018, A.1).

    With N ranks of b samples each, E‖g_k‖² = ‖G‖² + tr Σ / b and E‖mean g‖² = ‖G‖² + tr Σ / (N b). At period 1 the norm
    of the mean was measured; in a local phase it is put together from the norms and the sketches' products.
    NaN, NaN where a rank has no gradient to tell of, and on one rank.
    """
    ranks = len(headers)
    own = sum(header["grad_sq"] for header in headers) / ranks
    mean = sum(header["mean_grad_sq"] for header in headers) / ranks
    steps = sum(header["steps"] for header in headers)
    if ranks == 1 or steps == 0 or not math.isfinite(own):
        return math.nan, math.nan
    if not math.isfinite(mean):
        total = [sum(header[name] for header in headers) for name in SKETCH_NAMES]
        each = [[header[name] for name in SKETCH_NAMES] for header in headers]
        cross = _squared(total) - sum(_squared(sketch) for sketch in each)
        mean = (sum(header["grad_sq"] for header in headers) + cross) / ranks**2
    batch = sum(header["samples"] for header in headers) / steps
    return (ranks * mean - own) / (ranks - 1), (own - mean) * batch * ranks / (ranks - 1)


def _squared(values: Sequence[float]) -> float:
    return sum(value * value for value in values)


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

    def take(self, headers: Sequence[Header], samples: int, loss: float, *, apart: bool = False) -> dict[str, float]:
        """The Observation's smoothed figures after these headers; `samples` are all that were trained.

        Replicas that are `apart` where they look at the gradient (under a delay, with mixing, between averages of
        parts, where none are averaged) make it seem two to four times as noisy as it is; once noise was seen where they
        were one, theirs is left out.
        """
        sq_norm, variance = noise(headers)
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


SUMMED = ("samples", "loss_sum", "loss_samples", "judged", "right", "compute_s", "wait_s", "sent_bytes", "skipped")


def reduce(headers: Sequence[Header], before: int) -> Observation:
    """What all ranks did together; `before` is the samples trained up to the last observation."""
    total = {name: sum(header[name] for header in headers) for name in SUMMED}
    most = {name: max(header[name] for header in headers) for name in ("compute_s", "transfer_s", "memory")}
    changes = [header["grad_change"] for header in headers if math.isfinite(header["grad_change"])]
    ranks = len(headers)
    return Observation(
        round=int(headers[0]["round"]),
        local_step=int(headers[0]["step"]),
        samples=before + int(total["samples"]),
        ranks=ranks,
        steps=int(headers[0]["steps"]),
        lr=sum(header["lr"] for header in headers) / ranks,
        train_loss=total["loss_sum"] / total["loss_samples"] if total["loss_samples"] else math.nan,
        train_accuracy=total["right"] / total["judged"] if total["judged"] else math.nan,
        compute_s=total["compute_s"] / ranks,
        slowest_compute_s=most["compute_s"],
        sync_wait_s=total["wait_s"] / ranks,
        transfer_s=most["transfer_s"],
        sent_bytes=total["sent_bytes"] / ranks,
        grad_change=max(changes, default=math.nan),
        memory_share=most["memory"],
        skipped_steps=int(total["skipped"]),
    )
