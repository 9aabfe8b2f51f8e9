"""Loops of strangers: what their tests have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from trainer import LocalSGD


def spread(*tensors: torch.Tensor) -> float:
    """The largest difference of these tensors between rank 0 and any rank."""
    worst = 0.0
    for tensor in tensors:
        real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        mine = real.double().reshape(-1).contiguous()
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, mine)
        worst = max([worst, *(float((each - everyone[0]).abs().max()) for each in everyone if each.numel())])
    return worst


def batch_of(rank: int, step: int, samples: int = 8, features: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (samples, features) and targets (samples, 1), each rank's its own at every step."""
    draw = torch.Generator().manual_seed(1_000 * step + rank)
    x = torch.randn(samples, features, generator=draw, dtype=torch.float32)
    return x, x.sum(1, keepdim=True) + rank


def train(
    sync: LocalSGD, steps: int, start: int = 0, call: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
) -> list[Any]:
    """Train so many local steps on this rank's batches; the rounds that were heard of."""
    heard = []
    for step in range(start, start + steps):
        x, y = batch_of(dist.get_rank(), step)
        sync.optimizer.zero_grad()
        outputs = call(sync.model, x) if call is not None else sync.model(x)
        loss = nn.functional.mse_loss(outputs, y)
        loss.backward()
        sync.optimizer.step()
        heard += sync.step(loss, samples=len(x))
    return heard


def values(model: nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
