"""What a rank notes of its gradients for the others: squared norms, and a sketch that tells how gradients agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainer.control.reports import SKETCH, SKETCH_NAMES
from trainer.wire.flat import pieces

TURNS = 256
"""Places at which the row of signs may begin."""
CHANGE_WINDOW = 25
"""Noted steps over which the change of the gradient's norm is smoothed."""
KEPT = ("_own", "_mean", "_count", "_steps", "_rest", "_sketch", "_apart", "_norm", "_change", "_weight")


class GradientNotes:
    """Notes, of chosen local steps, the squared norm of this rank's gradient and either its sketch (in local phases,
    at a round's first step) or the squared norm of the ranks' mean gradient (at period 1, as DDP averages its buckets).

    A sketch adds up the gradient's values, with signs drawn at random, in `SKETCH` bins (count sketch, Charikar et al.
    2002): the product of two ranks' sketches is that of their gradients, in the mean over the signs. Values that lie
    `SKETCH` apart share a bin, and those of one row of `SKETCH` values a sign, so that a sketch is a product of signs
    and rows.

    Args:
        device: of the gradients.
        rest_steps: the fewest local steps between two notes of a local phase.
        alone: there is no other rank to tell; in local phases only the norm's change is noted.
    """

    def __init__(self, device: torch.device, rest_steps: int = 1, *, alone: bool = False) -> None:
        self._signs = torch.empty(0, device=device)
        self._buckets: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._norm = self._change = self._weight = 0.0
        self._rest_steps, self._rest, self._alone = rest_steps, 0, alone
        self.begin()

    def begin(self) -> None:
        """Begin the next observation."""
        self._own = self._mean = 0.0
        self._count = self._steps = 0
        self._sketch: list[float] | None = None
        self._apart = False

    def look(self, gradients: Sequence[torch.Tensor | None], number: int, *, every: bool, apart: bool) -> None:
        """In a local phase, before an update: note the observation's first gradient, and with `every` follow the
        others' norms. `apart`: the replicas that this step's gradients are of were not one model."""
        if not self._steps and not self._rest:
            self._rest = self._rest_steps
            self._apart = apart
            if self._alone:
                self.follow(gradients)
            else:
                self.note(gradients, number)
        elif every:
            self.follow(gradients)

    def end_step(self) -> None:
        """A local step is over, whether it was skipped or not."""
        self._steps += 1
        self._rest = max(0, self._rest - 1)
        self._buckets = []

    @torch.no_grad()
    def note(self, gradients: Sequence[torch.Tensor | None], number: int) -> None:
        """Note this rank's own gradient in a local phase, by parameter; `number` turns the signs, so that errors
        average out."""
        found = _dense(gradients)
        if not found:
            return
        signs = self._signs_of(sum(each.numel() // SKETCH + 1 for each in found))[31 * number % TURNS :]
        sketch, norms = torch.zeros(SKETCH, device=signs.device), []
        for flat in (gradient.reshape(-1) for gradient in found):
            for place in pieces(len(flat), flat.device):  # of whole rows; the second look at one finds it in a cache
                piece = flat[place].float()
                rows, rest = len(piece) // SKETCH, len(piece) % SKETCH
                norms.append(torch.dot(piece, piece))
                sketch += signs[:rows] @ piece[: rows * SKETCH].view(rows, SKETCH)
                sketch[:rest] += signs[rows] * piece[rows * SKETCH :]
                signs = signs[rows + (rest > 0) :]
        sq_norm = float(torch.stack(norms).double().sum())
        if math.isnan(sq_norm):
            return
        self._follow(sq_norm)
        self._count += 1
        self._own += sq_norm
        self._sketch = sketch.tolist()

    def _signs_of(self, rows: int) -> torch.Tensor:
        """A sign for each of so many rows, and `TURNS` more."""
        if len(self._signs) < rows + TURNS:
            signs = torch.randint(0, 2, (rows + TURNS,), generator=torch.Generator().manual_seed(0))
            self._signs = signs.mul_(2).sub_(1).to(self._signs)
        return self._signs

    @torch.no_grad()
    def follow(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Note how the gradient's norm changes; sparse gradients are left out."""
        if found := _dense(gradients):
            self._follow(float(torch.stack(torch._foreach_norm(found)).double().square().sum()))

    def bucket(self, own: torch.Tensor) -> torch.Tensor | None:
        """At period 1, in an observation's first step: the squared norm of a bucket of this rank's gradient, before it
        is averaged in place."""
        return _squared(own) if not self._steps else None

    def averaged(self, own: torch.Tensor, mean: torch.Tensor) -> None:
        """At period 1: what `bucket` said, and the averaged bucket. Buckets may end in any order, on any stream."""
        self._buckets.append((own, _squared(mean)))

    def sum_up(self, scale: float = 1.0) -> None:
        """At period 1, once the gradients are there: sum up the noted step; `scale` is the loss scaler's."""
        if self._buckets:
            own, mean = (float(torch.stack(norms).sum()) / scale**2 for norms in zip(*self._buckets, strict=True))
            self._buckets = []
            self._own, self._mean, self._count = self._own + own, self._mean + mean, self._count + 1
            self._follow(own)

    def header(self) -> dict[str, float]:
        """What the others are told: squared norms as means over the noted steps, NaN where there are none."""
        own = self._own / self._count if self._count else math.nan
        mean = self._mean / self._count if self._count and self._sketch is None else math.nan
        told = {"grad_sq": own, "mean_grad_sq": mean, "grad_change": self.change, "grad_apart": self._apart}
        return told | dict(zip(SKETCH_NAMES, self._sketch or [0.0] * SKETCH, strict=True))

    @property
    def change(self) -> float:
        """How much of itself the gradient's norm changes between two noted steps, smoothed (SelSync); NaN at first."""
        return self._change / self._weight if self._weight else math.nan

    def _follow(self, sq_norm: float) -> None:
        before, share = self._norm, 2 / (CHANGE_WINDOW + 1)
        if not math.isfinite(sq_norm):
            return
        self._norm = math.sqrt(sq_norm)
        if before:
            self._change = (1 - share) * self._change + share * abs(self._norm - before) / before
            self._weight = (1 - share) * self._weight + share

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, between two steps."""
        return {name.lstrip("_"): getattr(self, name) for name in KEPT}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in KEPT:
            setattr(self, name, state[name.lstrip("_")])


def _dense(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Those that are there and not sparse."""
    return [each for each in gradients if each is not None and not each.is_sparse]


def _squared(flat: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(flat.detach(), dtype=torch.float32)
    return norm.double().square()
