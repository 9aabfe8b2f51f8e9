"""A rank's report to the others, sent with every averaging, and the total of all ranks' reports.

Reports travel as sums and as largest values, so that a message does not grow with the number of ranks. Only the samples
of each rank are gathered, since averages are weighted by them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.errors import MismatchError

Floats = npt.NDArray[np.float64]

ADMIT, SAVE, STOP = 0.5, 1.0, 2.0
"""Wishes: to let newcomers in, which is added to the others; a checkpoint; a checkpoint and the end."""
SKETCH = 256
"""Values of a gradient's sketch: a product of two gradients is then off by 1/16 of the product of their norms (standard
deviation), which is about what the gradients' own noise does to it."""
SUMMED = (
    "samples",
    "steps",
    "compute_s",
    "wait_s",
    "lr",
    "sq_norm",
    "weighted_sq_norm",
    "loss_sum",
    "loss_samples",
    "judged",
    "correct",
    "skipped",
    "sent_bytes",
    "grad_sq",
    "mean_grad_sq",
    "own_noise",
    "mean_noise",
    "sketch_sq",
    "parts",
    "spread",
)
MOST = (
    "slowest_compute_s",
    "transfer_s",
    "memory",
    "wish",
    "in_a_row",
    "grad_change",
    "grad_apart",
    "changed",
    "sample",
    "sample_below",
    "sample_norm",
)
ALIKE = ("round", "step", "batch", "period", "lr_scale", "plan")
"""Names of the numbers that every rank must believe alike."""
COMPARED = (*ALIKE, "rates", "updates", "state_layout", "moved_layout")
"""Names of the numbers that ranks compare; a difference in the last four is mended, or refused by name elsewhere."""


@dataclass(frozen=True)
class Report:
    """One rank's numbers: where it is, what it did since its last report, and what it saw of its gradient."""

    round: int = 0
    """Rounds ended."""
    step: int = 0
    """Local steps so far."""
    batch: int = 0
    """The Plan's samples a rank and local step."""
    period: int = 0
    """The Plan's local steps between two averagings."""
    lr_scale: float = 1.0
    """The Plan's."""
    plan: int = 0
    """Fingerprint of the whole Plan."""
    rates: int = 0
    """Fingerprint of the optimizer's learning rates."""
    updates: int = 0
    """Optimizer steps since the last report."""
    state_layout: int = 0
    """Fingerprint of which optimizer state this rank has; 0 where nobody asks."""
    changed: bool = False
    """The model has other parameters, or others that require a gradient, than the ranks agreed on."""
    moved_layout: int = 0
    """Fingerprint of which frozen parameters and buffers have moved; 0 where nobody asks."""
    samples: int = 0
    """Trained since the last report."""
    steps: int = 0
    """Local steps since the last report."""
    compute_s: float = 0.0
    """Seconds of compute since the last report."""
    wait_s: float = 0.0
    """Seconds that the training thread waited for the network since the last report."""
    transfer_s: float = math.nan
    """Seconds of this rank's latest transfer; NaN before the first."""
    lr: float = 0.0
    """Learning rate of the first parameter group, the Plan's scale included."""
    sq_norm: float = 0.0
    """Squared norm of what this rank sends to be averaged."""
    loss_sum: float = 0.0
    """Training losses, each times its samples."""
    loss_samples: int = 0
    """Samples that the losses are of."""
    judged: int = 0
    """Samples whose classification is known."""
    correct: float = 0.0
    """Samples that were classified correctly."""
    skipped: int = 0
    """Local steps that were skipped."""
    in_a_row: int = 0
    """Local steps skipped one after another, up to now."""
    sent_bytes: float = 0.0
    """Bytes sent since the last report."""
    wish: float = 0.0
    """What this rank was asked for: nothing, `SAVE` or `STOP`, and `ADMIT`; the largest of any rank's counts."""
    memory: float = 0.0
    """Most memory ever held, as a share of what there is."""
    grad_sq: float = math.nan
    """Squared norm of this rank's gradient, mean over the noted steps."""
    mean_grad_sq: float = math.nan
    """Squared norm of the ranks' mean gradient, where gradients are averaged."""
    grad_weight: float = math.nan
    """Weight of this rank's gradient in that mean; NaN: one of N."""
    grad_change: float = math.nan
    """Relative change of the gradient's norm from step to step, smoothed."""
    grad_apart: bool = False
    """The noted gradient is of a replica that was not one with the others."""
    sample: float = 0.0
    """Signed sum of some of the parameters, where replicas must be one."""
    sample_norm: float = 0.0
    """Norm of the same parameters."""
    sketch: Sequence[float] | None = None
    """Sketch of this rank's gradient, summed over its parts; None where none is asked for."""
    sketch_sq: float = 0.0
    """Squared norms of its parts' sketches."""
    parts: int = 1
    """Devices that this rank trained since its last report: itself, or those that it hosts."""
    weight: float | None = None
    """Of this rank's replica in the average; None: its samples."""
    noise: float | None = None
    """Sum over its parts of 1 / batch at the noted gradients; None: of the mean batch."""
    spread: float = 0.0
    """Squared distances of its devices' models from their mean, each times its weight."""

    @property
    def counts(self) -> float:
        """What this rank's replica weighs in the average."""
        return float(self.samples) if self.weight is None else self.weight

    @property
    def own(self) -> float:
        """What it weighs, or -1 where what this rank sends is not finite."""
        return self.counts if math.isfinite(self.sq_norm) else -1.0

    def sums(self, ranks: int) -> list[float]:
        """The numbers that are summed over the ranks."""
        finite = self.sq_norm if math.isfinite(self.sq_norm) else 0.0
        noise = self.steps / self.samples if self.samples else math.nan  # 1 / batch
        weight = self.grad_weight if self.grad_weight == self.grad_weight else 1 / ranks
        known = {
            "sq_norm": finite,
            "weighted_sq_norm": finite * self.counts,
            "grad_sq": self.grad_sq * self.parts if self.parts else 0.0,
            "own_noise": noise if self.noise is None else self.noise,
            "mean_noise": noise * weight**2,
        }
        return [*(float(known.get(name, getattr(self, name, 0.0))) for name in SUMMED), *(self.sketch or ())]

    def mosts(self) -> list[float]:
        """The numbers whose largest counts; those that are compared also negated, so that the smallest is known too."""
        known = {"slowest_compute_s": self.compute_s, "sample_below": -self.sample}
        if self.grad_change != self.grad_change:
            known["grad_change"] = -1.0  # no change is below 0
        most = [float(known.get(name, getattr(self, name, 0.0))) for name in MOST]
        compared = [float(getattr(self, name)) for name in COMPARED]
        return [*most, *compared, *(-value for value in compared)]

    def with_sq_norm(self, sq_norm: float) -> Report:
        """This report once what is sent is known."""
        return replace(self, sq_norm=sq_norm)

    def place(self) -> dict[str, float]:
        """Where this rank is, for an error that names both sides."""
        return {name: float(getattr(self, name)) for name in (*ALIKE, "samples")}


@dataclass(frozen=True)
class Total:
    """All ranks' reports together; the same on every rank."""

    ranks: int
    alike: Mapping[str, float]
    """Numbers that all ranks believe, by the names of `COMPARED`: the largest of any rank."""
    differing: tuple[str, ...]
    """The names of `COMPARED` that ranks differ in."""
    sums: Mapping[str, float]
    """By the names of `SUMMED`."""
    most: Mapping[str, float]
    """The largest of any rank, by the names of `MOST`."""
    weight_by_rank: Floats
    """Of each rank's replica in the average, by rank: its samples, or its devices' weights; -1 where what the rank
    sent is not finite."""
    sketch: Sequence[float]
    """Sum of the ranks' sketches."""

    @classmethod
    def of(cls, sums: Sequence[float], mosts: Sequence[float], weight_by_rank: npt.ArrayLike) -> Total:
        """The total that the shared numbers make."""
        compared = len(COMPARED)
        high, low = mosts[len(MOST) : len(MOST) + compared], mosts[len(MOST) + compared :]
        differing = tuple(name for name, h, low_ in zip(COMPARED, high, low, strict=True) if h != -low_)
        most = dict(zip(MOST, mosts, strict=False))
        most["grad_change"] = most["grad_change"] if most["grad_change"] >= 0 else math.nan
        summed = dict(zip(SUMMED, sums, strict=False))
        alike = dict(zip(COMPARED, high, strict=True))
        samples = np.asarray(weight_by_rank, dtype=np.float64)
        return cls(len(samples), alike, differing, summed, most, samples, sums[len(SUMMED) :])

    def weights(self) -> Floats:
        """Each rank's share of the average, by its samples or its devices' weights; they sum to 1.

        A rank whose numbers are not finite has none, and where nobody trained all finite ones have the same.
        """
        return weights_of(self.weight_by_rank)

    def mean_sq_norm(self) -> float:
        """Mean squared norm of what was sent, by the same weights."""
        trained = float(self.weight_by_rank.clip(0).sum())
        finite = int((self.weight_by_rank >= 0).sum()) or 1
        return self.sums["weighted_sq_norm"] / trained if trained else self.sums["sq_norm"] / finite

    def mean_spread(self) -> float:
        """Squared distance of devices' models from their rank's mean, by the same weights; 0 without devices."""
        weight = float(self.weight_by_rank.clip(0).sum())
        return self.sums["spread"] / weight if weight else 0.0

    @property
    def are_apart(self) -> bool:
        """Parameters that should be one are not: their samples differ by more than rounding."""
        between, norm = self.most["sample"] + self.most["sample_below"], self.most["sample_norm"]
        return not between <= 1e-5 * norm

    @property
    def left_out(self) -> list[int]:
        """Ranks whose numbers are not finite, where others' are."""
        out: list[int] = np.flatnonzero(self.weight_by_rank < 0).tolist()
        return out if len(out) < self.ranks else []

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values."""
        return {
            "ranks": self.ranks,
            "alike": dict(self.alike),
            "differing": list(self.differing),
            "sums": dict(self.sums),
            "most": dict(self.most),
            "weight_by_rank": self.weight_by_rank.tolist(),
            "sketch": list(self.sketch),
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Total:
        """The Total whose `state` this is; what was wished for then has been."""
        most = {**state["most"], "wish": 0.0}
        samples = np.asarray(state["weight_by_rank"], dtype=np.float64)
        return cls(**{**state, "differing": tuple(state["differing"]), "most": most, "weight_by_rank": samples})


def weights_of(samples: npt.ArrayLike) -> Floats:
    """Shares of an average by samples, (ranks,); -1 is a rank that takes no part, unless all are."""
    counts = np.asarray(samples, dtype=np.float64)
    usable = counts >= 0
    if not usable.any():
        return np.full(len(counts), 1 / len(counts))
    trained = counts.clip(0)
    shares: Floats = trained / trained.sum() if trained.any() else usable / usable.sum()
    return shares


def refuse_difference(places: Sequence[Mapping[str, float]]) -> None:
    """Every rank must have come to the same point by the same Plan.

    Raises:
        MismatchError: names two ranks and what each believes.
    """
    for rank, place in enumerate(places):
        for name in ALIKE:
            if place[name] != places[0][name]:
                sides = "; ".join(
                    f"rank {who} is at round {it['round']:.0f}, local step {it['step']:.0f}, "
                    f"{it['samples']:.0f} samples, plan of batch {it['batch']:.0f} and period {it['period']:.0f}"
                    for who, it in ((0, places[0]), (rank, place))
                )
                raise MismatchError(f"ranks disagree about their {name}: {sides}")
