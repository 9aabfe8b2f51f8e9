"""How the length of an optimizer's step follows the length of its gradients, tried out on a twin of it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer

STEPS = 8
SIDE = 8
TWIN: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.0, "fused": None, "foreach": None, "capturable": False}
"""What a twin has in place of the optimizer's own settings."""


def step_response(optimizer: Optimizer) -> float:
    """The power of a gradient's length that a step's length goes by: 1 of SGD, 0 of Adam, Lion, LARS and their kin.

    A twin of the optimizer, with the settings of its first parameter group, trains a few values by random gradients,
    and another one by the same gradients twice as long. An optimizer of which no twin can be made counts as SGD.
    """
    try:
        once, twice = (_moved(optimizer, scale) for scale in (1.0, 2.0))
        found = math.log2(twice / once)
    except Exception:  # of anybody's optimizer: an extra never stops training
        return 1.0
    return round(min(1.0, max(0.0, found)), 2) if math.isfinite(found) else 1.0


def _moved(optimizer: Optimizer, scale: float) -> float:
    """How far a twin goes by gradients of this scale."""
    draw = torch.Generator().manual_seed(0)
    values = torch.nn.Parameter(torch.randn(SIDE, SIDE, generator=draw, dtype=torch.float64))
    before = values.detach().clone()
    group = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    group |= {name: value for name, value in TWIN.items() if name in group}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        twin = type(optimizer)([{**group, "params": [values]}])  # type: ignore[call-arg]  # defaults are the group's
        for _ in range(STEPS):
            values.grad = scale * torch.randn(SIDE, SIDE, generator=draw, dtype=torch.float64)
            twin.step()
    return float((values.detach() - before).norm())
