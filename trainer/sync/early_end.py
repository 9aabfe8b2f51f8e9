"""Rounds that end before their period: a signal that all ranks compare at every local step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from trainer.distributed.collectives import Collectives
from trainer.plan import Plan
from trainer.sync.gradient_notes import GradientNotes
from trainer.sync.replica import Replica


class EarlyEnd:
    """Whether a round's signal has reached what the Plan says, in one small message a local step.

    `gradient_change`: the most of any rank (SelSync, Tyagi and Swany 2023). `divergence`: the mean of ‖u_k‖² minus the
    square of the mean of ⟨ξ, u_k⟩, where u_k is what replica k has moved since the last averaging and ξ the unit vector
    along the averaged model's move before that: never below the replicas' variance (LinearFDA, arXiv 2405.20988).
    """

    def __init__(self, replica: Replica, notes: GradientNotes, via: Collectives) -> None:
        self._replica, self._notes, self._via = replica, notes, via
        self._base: list[torch.Tensor] = []
        self._along: list[torch.Tensor] = []

    @torch.no_grad()
    def begin_round(self, plan: Plan) -> None:
        """Moves count from the replica as it is now."""
        if plan.early_end != "divergence":
            self._base, self._along = [], []
            return
        now = self._replica.flat_parameters.adopt()
        if self._base:
            moves = [flat - base for flat, base in zip(now, self._base, strict=True)]
            norm = math.sqrt(sum(float(move.float().square().sum()) for move in moves))
            if norm > 0:  # else nothing was averaged in between: an evaluation begins a round afresh
                self._along = [move / norm for move in moves]
                torch._foreach_copy_(self._base, now)
        else:
            self._base = [flat.clone() for flat in now]

    def forget(self) -> None:
        """The model is laid out anew: moves count from the next round's beginning."""
        self._base, self._along = [], []

    @torch.no_grad()
    def reached(self, plan: Plan) -> bool:
        """After a local step; the same answer on every rank. A signal that is not finite ends nothing."""
        if plan.early_end == "gradient_change":
            change = self._notes.change if math.isfinite(self._notes.change) else -1.0  # none is below 0
            return self._via.most_numbers([change])[0] >= plan.early_end_above
        sq_norm = along = 0.0
        now = self._replica.flat_parameters.adopt()
        for index, (flat, base) in enumerate(zip(now, self._base, strict=True)):
            move = flat - base
            sq_norm += float(torch.dot(move, move))
            along += float(torch.dot(move, self._along[index])) if self._along else 0.0
        mean_sq, mean_along = (total / self._via.size for total in self._via.sum_numbers([sq_norm, along]))
        return mean_sq - mean_along**2 > plan.early_end_above

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint in the middle of a round."""
        return {"base": self._base, "along": self._along}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        device = self._replica.flat_parameters.buffers[0].device
        self._base, self._along = ([tensor.to(device) for tensor in state[name]] for name in ("base", "along"))
