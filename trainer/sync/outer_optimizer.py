"""Outer optimizers: what is done with the averaged displacement of a round.

`base` is the model that the round began from, the same on every rank, and Δ = mean(replicas) − base the averaged
displacement, which serves as a step downhill. With learning rate 1 and momentum 0 every rule but fedadam is plain
averaging. They work on the pieces that an exchange brings, one after another, since an optimizer of torch.optim reads
the whole model anew for each of its operations, in memory that training beside it wants.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.config.sync import SyncConfig

TAU, BETA2 = 1e-3, 0.99
LEAST_LR = 1e-12  # a schedule may end at 0, where nothing has moved
Moments = Mapping[str, torch.Tensor]


def heavy_ball(delta: torch.Tensor, moments: Moments, beta: float) -> None:
    """u ← β u + Δ; the base moves along u."""
    delta.copy_(moments["momentum"].mul_(beta).add_(delta))


def nesterov(delta: torch.Tensor, moments: Moments, beta: float) -> None:
    """u ← β u + Δ; the base moves along Δ + β u."""
    delta.add_(moments["momentum"].mul_(beta).add_(delta), alpha=beta)


def adam(delta: torch.Tensor, moments: Moments, beta: float) -> None:
    """m ← β₁ m + (1 − β₁) Δ; v ← β₂ v + (1 − β₂) Δ²; the base moves along m / (√v + τ), from m₀ = 0 and v₀ = τ²,
    without bias correction."""
    moments["momentum"].lerp_(delta, 1 - beta)
    moments["square"].mul_(BETA2).addcmul_(delta, delta, value=1 - BETA2)
    torch.sqrt(moments["square"], out=delta).add_(TAU)
    torch.div(moments["momentum"], delta, out=delta)


@dataclass(frozen=True)
class Rule:
    """A rule for Δ, in place; its published defaults; and whether Δ counts in units of the local learning rate."""

    direct: Callable[[torch.Tensor, Moments, float], None]
    lr: float
    momentum: float
    in_local_lr: bool = False
    begins: Mapping[str, float] = field(default_factory=lambda: {"momentum": 0.0})
    """The moments, and from what they begin."""


RULES = {
    # Wang et al. 2020, arXiv 1910.00643: u ← β u + Δ/γ;  x ← base + α γ u
    "slowmo": Rule(heavy_ball, 1.0, 0.5, in_local_lr=True),
    # Douillard et al. 2023, arXiv 2311.08105
    "diloco": Rule(nesterov, 0.7, 0.9),
    # Hsu et al. 2019, arXiv 1909.06335: x ← base + η u
    "fedavgm": Rule(heavy_ball, 1.0, 0.9),
    # Reddi et al. 2021, arXiv 2003.00295, algorithm 2
    "fedadam": Rule(adam, 0.01, 0.9, begins={"momentum": 0.0, "square": TAU**2}),
}


class Outer:
    """One flat buffer of parameters under one rule."""

    def __init__(self, rule: Rule, lr: float, beta: float, moments: Moments) -> None:
        self._rule, self._lr, self._beta, self._moments = rule, lr, beta, moments

    @classmethod
    def of(cls, settings: SyncConfig, values: torch.Tensor) -> Outer | None:
        """The outer optimizer that the settings name, for these parameters."""
        if settings.outer == "none":
            return None
        rule, lr, beta = RULES[settings.outer], settings.outer_lr, settings.outer_momentum
        kind = torch.promote_types(values.dtype, torch.float32)
        moments = {moment: torch.full_like(values, value, dtype=kind) for moment, value in rule.begins.items()}
        return cls(rule, rule.lr if lr is None else lr, rule.momentum if beta is None else beta, moments)

    def at(self, place: slice) -> Outer:
        """This optimizer for a place of the buffer, in the same memory."""
        moments = {name: moment[place] for name, moment in self._moments.items()}
        return Outer(self._rule, self._lr, self._beta, moments)

    def direct_(self, delta: torch.Tensor, place: slice, local_lr: float) -> torch.Tensor:
        """Make a place's averaged displacement what the base is to move by there; `local_lr` is γ."""
        unit = max(local_lr, LEAST_LR) if self._rule.in_local_lr else 1.0
        moments = {name: moment[place] for name, moment in self._moments.items()}
        self._rule.direct(delta.div_(unit), moments, self._beta)
        return delta.mul_(self._lr * unit)

    def take(self, other: Outer) -> None:
        """Go on with another's moments of as many values."""
        for name, moment in self._moments.items():
            moment.copy_(other._moments[name])

    def forget(self) -> None:
        """Begin anew: what was averaged before says nothing of what follows."""
        for name, moment in self._moments.items():
            moment.fill_(self._rule.begins[name])

    def state_dict(self) -> dict[str, Any]:
        """Moments, for a checkpoint."""
        return dict(self._moments)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""
        for name, moment in self._moments.items():
            moment.copy_(state[name])
