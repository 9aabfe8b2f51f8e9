"""Notes of a rank's gradients for the others: squared norms, and a sketch that tells how gradients agree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from trainer.control.reports import SKETCH
from trainer.wire.flat import piece_values, pieces, real_view

TURNS = 256
"""Places at which the row of signs may begin."""
CHANGE_WINDOW = 25
"""Noted steps over which the change of the gradient's norm is smoothed."""
KEPT = (
    *("_own", "_mean", "_weight_in_mean", "_count", "_steps"),
    *("_rest", "_sketch", "_sketch_sq", "_apart", "_norm", "_change", "_weight"),
)
Parameters = Sequence[torch.Tensor]


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
        self._signs = torch.empty(0, dtype=torch.float32, device=device)
        self._buckets: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._norm = self._change = self._weight = 0.0
        self._rest_steps, self._rest, self._alone = rest_steps, 0, alone
        self.begin()

    def begin(self) -> None:
        """Begin the next observation."""
        self._own = self._mean = self._weight_in_mean = 0.0
        self._count = self._steps = 0
        self._sketch: list[float] | None = None
        self._sketch_sq = 0.0
        self._apart = False

    def begin_world(self, *, alone: bool) -> None:
        """The ranks are others now: begin the next observation."""
        self._alone, self._rest = alone, 0
        self._buckets = []
        self.begin()

    def begin_part(self) -> None:
        """Another device begins within the observation: its first gradient is noted too."""
        self._steps = self._rest = 0

    def look(self, parameters: Parameters, number: int, *, every: bool, apart: bool) -> None:
        """In a local phase, before an update: note the observation's first gradient.

        Args:
            parameters: whose gradients are there.
            number: turns the sketch's signs, so that errors average out.
            every: follow the norms of the other steps' gradients, too.
            apart: the replicas that this step's gradients are of were not one model.
        """
        if not self._steps and not self._rest:
            self._rest = self._rest_steps
            self._apart = apart
            if self._alone:
                self.follow(parameters)
            else:
                self.note(parameters, number)
        elif every:
            self.follow(parameters)

    def end_step(self) -> None:
        """A local step is over, whether it was skipped or not."""
        self._steps += 1
        self._rest = max(0, self._rest - 1)
        self._buckets = []

    @torch.no_grad()
    def note(self, parameters: Parameters, number: int) -> None:
        """Note this rank's own gradient in a local phase; a parameter without one counts as zeros."""
        if not parameters or all(parameter.grad is None for parameter in parameters):
            return
        count = 2 * sum(parameter.numel() for parameter in parameters)  # a complex value is two
        signs = self._signs_of(count // SKETCH + len(parameters) + 1)[31 * number % TURNS :]
        sketch, norms = torch.zeros(SKETCH, dtype=torch.float32, device=signs.device), []
        for some in _gradient_pieces(parameters):
            piece = some.float()
            rows, rest = len(piece) // SKETCH, len(piece) % SKETCH
            norms.append(torch.dot(piece, piece))
            sketch += signs[:rows] @ piece[: rows * SKETCH].view(rows, SKETCH)
            sketch[:rest] += signs[rows] * piece[rows * SKETCH :]
            signs = signs[rows + (rest > 0) :]
        sq_norm = float(torch.stack(norms).double().sum())
        if not math.isfinite(sq_norm):
            return
        self._follow(sq_norm)
        self._count += 1
        self._own += sq_norm
        fresh = sketch.tolist()
        self._sketch = [a + b for a, b in zip(self._sketch, fresh, strict=True)] if self._sketch else fresh
        self._sketch_sq += sum(value * value for value in fresh)

    def _signs_of(self, rows: int) -> torch.Tensor:
        """A sign for each of so many rows, and `TURNS` more."""
        if len(self._signs) < rows + TURNS:
            signs = torch.randint(0, 2, (rows + TURNS,), generator=torch.Generator().manual_seed(0))
            self._signs = signs.mul_(2).sub_(1).to(self._signs)
        return self._signs

    @torch.no_grad()
    def follow(self, parameters: Parameters) -> None:
        """Note how the gradient's norm changes."""
        found = [_dense(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if found:
            norms = torch._foreach_norm(found)
            self._follow(float(torch.stack([norm.double() for norm in norms]).square().sum()))

    def bucket(self, own: torch.Tensor) -> torch.Tensor | None:
        """At period 1, in an observation's first step: the squared norm of a bucket of this rank's gradient, before it
        is averaged in place."""
        return _squared(own) if not self._steps else None

    def averaged(self, own: torch.Tensor, mean: torch.Tensor) -> None:
        """At period 1: what `bucket` said, and the averaged bucket. Buckets may end in any order, on any stream."""
        self._buckets.append((own, _squared(mean)))

    def sum_up(self, scale: float = 1.0, weight: float | None = None) -> None:
        """At period 1, once the gradients are there: sum up the noted step.

        Args:
            scale: the loss scaler's.
            weight: of this rank's gradient in the mean; None: one of N.
        """
        if self._buckets:
            own, mean = (float(torch.stack(norms).sum()) / scale**2 for norms in zip(*self._buckets, strict=True))
            self._buckets = []
            self._own, self._mean, self._count = self._own + own, self._mean + mean, self._count + 1
            self._weight_in_mean = math.nan if weight is None else weight
            self._follow(own)

    def noted(self) -> dict[str, Any]:
        """The fields of a Report: squared norms as means over the noted steps, NaN where there are none."""
        return {
            "grad_sq": self._own / self._count if self._count else math.nan,
            "mean_grad_sq": self._mean / self._count if self._count and self._sketch is None else math.nan,
            "grad_weight": self._weight_in_mean or math.nan,
            "grad_change": self.change,
            "grad_apart": self._apart,
            "sketch_sq": self._sketch_sq,
        }

    def sketch(self) -> list[float]:
        """Sum of the noted gradients' sketches; zeros where none was noted."""
        return self._sketch or [0.0] * SKETCH

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


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def _gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """A parameter's gradient, dense and real; zeros where it has none."""
    gradient = parameter.grad
    if gradient is None:
        gradient = torch.zeros_like(parameter)
    elif gradient.layout == torch.strided and not gradient.is_complex():
        return gradient
    return real_view(_dense(gradient).detach())


def _gradient_pieces(parameters: Parameters) -> Iterator[torch.Tensor]:
    """All gradients in a row, flat, in pieces of whole parameters or whole sketch rows.

    A model of thousands of small tensors so takes a few operations, not a few for each.
    """
    held: list[torch.Tensor] = []
    count, size, kind = 0, piece_values(parameters[0].device), None
    for parameter in parameters:
        gradient = _gradient_of(parameter)
        values = gradient.numel()
        if held and (count + values > size or kind != (gradient.dtype, gradient.device)):
            yield torch._C._nn.flatten_dense_tensors(held)
            held, count = [], 0
        if values > size:
            flat = gradient.reshape(-1)
            yield from (flat[place] for place in pieces(values, flat.device))
        else:
            kind = (gradient.dtype, gradient.device)
            held.append(gradient)
            count += values
    if held:
        yield torch._C._nn.flatten_dense_tensors(held)


def _squared(flat: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(flat.dtype, torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(flat.detach(), dtype=wide)
    return norm.double().square()
