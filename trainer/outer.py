"""Outer optimizers: what is done with the averaged displacement of a round.

`base` is the model that the round began from, the same on every rank, and Δ = base − mean(replicas) the averaged
displacement, which serves as a gradient. With learning rate 1 and momentum 0 every SGD below is plain averaging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Optimizer


class FedAdam(Optimizer):
    """Adam on the server, without bias correction (Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

    m ← β₁ m + (1 − β₁) Δ;  v ← β₂ v + (1 − β₂) Δ²;  x ← x − η m / (√v + τ), with m₀ = 0 and v₀ = τ².
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, beta1: float, beta2: float, tau: float) -> None:
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "tau": tau})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no closure is taken
        """One round."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["m"] = torch.zeros_like(parameter)
                    state["v"] = torch.full_like(parameter, group["tau"] ** 2)
                state["m"].lerp_(parameter.grad, 1 - group["beta1"])
                state["v"].mul_(group["beta2"]).addcmul_(parameter.grad, parameter.grad, value=1 - group["beta2"])
                parameter.addcdiv_(state["m"], state["v"].sqrt().add_(group["tau"]), value=-group["lr"])


@dataclass(frozen=True)
class Rule:
    """An outer optimizer, its published defaults, and whether Δ counts in units of the local learning rate."""

    build: Callable[[list[torch.Tensor], float, float], Optimizer]
    lr: float
    momentum: float
    in_local_lr: bool = False


RULES = {
    # Wang et al. 2020, arXiv 1910.00643: u ← β u + Δ/γ;  x ← base − α γ u
    "slowmo": Rule(lambda p, lr, momentum: SGD(p, lr, momentum), 1.0, 0.5, in_local_lr=True),
    # Douillard et al. 2023, arXiv 2311.08105: Nesterov
    "diloco": Rule(lambda p, lr, momentum: SGD(p, lr, momentum, nesterov=momentum > 0), 0.7, 0.9),
    # Hsu et al. 2019, arXiv 1909.06335: v ← β v + Δ;  x ← base − η v
    "fedavgm": Rule(lambda p, lr, momentum: SGD(p, lr, momentum), 1.0, 0.9),
    "fedadam": Rule(lambda p, lr, momentum: FedAdam(p, lr, momentum, 0.99, 1e-3), 0.01, 0.9),
}


class Outer:
    """One flat base under one rule."""

    def __init__(self, name: str, base: torch.Tensor, lr: float | None, momentum: float | None) -> None:
        rule = RULES[name]
        self._in_local_lr = rule.in_local_lr
        self._lr = rule.lr if lr is None else lr
        self._parameter = torch.nn.Parameter(base)  # the very storage of `base`
        self._optimizer = rule.build([self._parameter], self._lr, rule.momentum if momentum is None else momentum)

    @torch.no_grad()
    def step(self, displacement: torch.Tensor, local_lr: float) -> None:
        """Move the base; `displacement` is mean(replicas) − base and is consumed, `local_lr` is γ."""
        unit = local_lr if self._in_local_lr else 1.0
        self._parameter.grad = displacement.div_(-unit)
        self._optimizer.param_groups[0]["lr"] = self._lr * unit
        self._optimizer.step()
        self._parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Momenta, for a checkpoint."""
        return self._optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._optimizer.load_state_dict(state)
