"""Small-batch noise for large batches: made of differences between gradients, which differ by nothing but that noise.

With the covariance Σ of one sample's gradient, that of the mean of B samples is Σ / B, and of b samples Σ / b. What a
large batch lacks is zero-mean noise of covariance Σ (1/b - 1/B). It needs no Σ: a combination Σ c_k g_k of gradients of
B samples each, with Σ c_k = 0, has mean 0 and covariance ‖c‖² Σ / B.

- Where N ranks average gradients, c is drawn from all directions that sum to 0, with ‖c‖² = (B/b - 1) / N: a mean of
  N batches of B with weights 1/N + c_k has the covariance Σ / (N b) of N batches of b. It sends nothing more.
- On one rank, and where replicas are apart, the gradient of the step before is the other one, and c = ±√((B/b - 1) / 2)
  for both; here the gradient's own change between the two steps counts as noise.

Draws are by the local step, the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.plan import Plan

APART, TOGETHER = 1, 2


def excess(plan: Plan) -> float:
    """B/b - 1: the noise that a Plan's gradients are given, over their own."""
    return 0.0 if plan.noise_batch is None else plan.batch_per_rank / plan.noise_batch - 1


def directions(ranks: int, excess: float, step: int) -> npt.NDArray[np.float64]:
    """What each rank's gradient counts more or less than 1/N in the mean of this local step; they sum to 0."""
    drawn = np.random.default_rng([TOGETHER, step]).standard_normal(ranks)
    drawn -= drawn.mean()
    found: npt.NDArray[np.float64] = drawn * math.sqrt(excess / ranks) / np.linalg.norm(drawn)
    return found


class GivenNoise:
    """Noise for gradients that are not averaged: this rank's own, by the gradient of its step before."""

    def __init__(self) -> None:
        self._before: list[torch.Tensor | None] = []

    @torch.no_grad()
    def add(self, parameters: Sequence[torch.Tensor], plan: Plan, step: int, rank: int) -> None:
        """Before an update: give the gradients their noise in place, and keep them as they were for the next one."""
        much = excess(plan)
        if not much > 0:
            self._before = []
            return
        gradients = [parameter.grad for parameter in parameters]
        known = self._before if len(self._before) == len(gradients) else [None] * len(gradients)
        self._before = [None if each is None or each.is_sparse else each.detach().clone() for each in gradients]
        share = math.sqrt(much / 2) * float(np.random.default_rng([APART, step, rank]).choice((-1.0, 1.0)))
        for gradient, own, other in zip(gradients, self._before, known, strict=True):
            if gradient is not None and own is not None and other is not None and other.shape == own.shape:
                gradient.add_(own - other, alpha=share)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"count": len(self._before), **{str(n): each for n, each in enumerate(self._before) if each is not None}}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint."""
        found = [state.get(str(number)) for number in range(state["count"])]
        self._before = [None if each is None else each.to(device) for each in found]
