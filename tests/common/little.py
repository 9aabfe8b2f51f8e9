"""A little model for tests of averaging: its batches by rank and step, its loop, and its training by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from trainer import LocalSGD, SyncConfig
from trainer.distributed.world import World

FEATURES, CLASSES, LR = 6, 3, 0.1
Values = torch.Tensor


class Net(nn.Module):
    """Small, with BatchNorm, a frozen layer and a parameter that the forward pass never uses."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.frozen = nn.Linear(FEATURES, FEATURES).requires_grad_(False)
        self.hidden = nn.Linear(FEATURES, 8)
        self.norm = nn.BatchNorm1d(8)
        self.out = nn.Linear(8, CLASSES)
        if unused:
            self.unused = nn.Parameter(torch.randn(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(F.relu(self.norm(self.hidden(self.frozen(x)))))
        return out


def batch(rank: int, step: int, size: int = 8) -> tuple[Values, Values]:
    """Inputs and targets that belong to this rank and this local step."""
    draw = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(size, FEATURES, generator=draw), torch.randn(size, CLASSES, generator=draw)


def new_model() -> nn.Linear:
    """One layer without bias, the same on every rank."""
    torch.manual_seed(7)
    return nn.Linear(FEATURES, CLASSES, bias=False)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with state, of what is to be trained."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamw":
        return torch.optim.AdamW(trained, lr=0.01)
    return torch.optim.SGD(trained, lr=0.1, momentum=0.9, nesterov=True)


def flat(model: nn.Module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in model.parameters()])


def trained(sync: LocalSGD, rank: int, step: int, samples: int | None = None, size: int = 8) -> list[Any]:
    """One local step of the loop, told as one of `samples` (else its own size); the rounds that it ended."""
    device = next(sync.model.parameters()).device
    x, y = (values.to(device) for values in batch(rank, step, size))
    sync.optimizer.zero_grad()
    loss = F.mse_loss(sync.model(x), y)
    loss.backward()
    sync.optimizer.step()
    return sync.step(loss, samples=size if samples is None else samples)


def train(
    world: World, settings: SyncConfig, policy: Any, steps: int, finish_every: int = 0, momentum: float = 0.0
) -> tuple[list[Values], list[Any]]:
    """The weights after every local step, and the rounds."""
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=momentum)
    weights, rounds = [], []
    with LocalSGD(model, optimizer, policy, settings=settings, world=world) as sync:
        for step in range(steps):
            rounds += trained(sync, world.rank, step)
            if finish_every and (step + 1) % finish_every == 0:
                rounds += sync.finish()
            weights.append(model.weight.detach().clone())
        rounds += sync.finish()
        weights.append(model.weight.detach().clone())
    return weights, rounds


def one_step(weight: Values, rank: int, step: int, size: int = 8) -> Values:
    """The weight of `new_model` after one step of SGD by hand."""
    x, y = batch(rank, step, size)
    weight = weight.clone().requires_grad_()
    F.mse_loss(x @ weight.T, y).backward()
    assert weight.grad is not None
    return (weight - LR * weight.grad).detach()


def by_hand(ranks: int, steps: int, period: int, delay: int) -> list[list[Values]]:
    """Each rank's weights after every step: the mean of the snapshots lands `delay` steps later, as a correction."""
    replicas = [new_model().weight.detach().clone() for _ in range(ranks)]
    history: list[list[Values]] = [[] for _ in range(ranks)]
    flying: tuple[int, list[Values]] | None = None
    for step in range(1, steps + 1):
        replicas = [one_step(replica, rank, step - 1) for rank, replica in enumerate(replicas)]
        if flying is not None and step == flying[0] + delay:
            mean = sum(flying[1]) / ranks
            replicas = [now + mean - then for now, then in zip(replicas, flying[1], strict=True)]
            flying = None
        if step % period == 0:
            flying = step, list(replicas)
        for rank, replica in enumerate(replicas):
            history[rank].append(replica)
    return history
