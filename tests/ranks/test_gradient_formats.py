"""Gradients in fewer bits: replicas stay one, and nothing is lost."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch
from little import (
    CLASSES,
    FEATURES,
    LR,
    Values,
    batch,
)
from ranks import run
from torch import nn
from torch.nn import functional as F

from trainer import Constant, LocalSGD, Plan, SyncConfig
from trainer.distributed.world import World

WIDTHS = (64, 256, 1_024, CLASSES)  # more than a megabyte, so that gradients go in two buckets


def compressed(world: World, gradient_format: Any) -> tuple[Values, list[float]]:
    """The weights at the end, and the bytes of each local step at period 1."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(wide, narrow, bias=False) for wide, narrow in itertools.pairwise(WIDTHS)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    settings = SyncConfig(gradient_format=gradient_format, observe_steps=100)
    sent = []
    with LocalSGD(model, optimizer, Constant(Plan(8, 1)), settings=settings, world=world) as sync:
        for step in range(14):
            before = sync.collectives.sent_bytes
            draw = torch.Generator().manual_seed(100 * world.rank + step)
            optimizer.zero_grad()
            loss = sync.model(torch.randn(8, 64, generator=draw)).square().mean()
            loss.backward()
            optimizer.step()
            sync.step(loss, samples=8)
            sent.append(sync.collectives.sent_bytes - before)
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]), sent


def test_gradients_in_fewer_bits_keep_replicas_one() -> None:
    exact, sent = run(2, compressed, "float32")[0]
    values = sum(wide * narrow for wide, narrow in itertools.pairwise(WIDTHS))
    flags = 8 * (5 + len(WIDTHS) - 1)  # what goes along with gradients: five numbers, and one a parameter
    assert set(sent) == {4 * values + flags}
    first, second = run(2, compressed, "bf16")
    assert torch.equal(first[0], second[0])
    assert set(first[1]) == {2 * values + flags}
    torch.testing.assert_close(first[0], exact, rtol=0, atol=2e-3)
    first, second = run(2, compressed, "powersgd")
    assert torch.equal(first[0], second[0])
    assert first[1][0] == sent[0], "early steps are exact"
    assert first[1][-1] < sent[0] / 4
    torch.testing.assert_close(first[0], exact, rtol=0, atol=2e-2)


class Given(nn.Module):
    """Two layers whose gradients are what they are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.zeros(rows, 32)) for rows in (64, 48))

    def forward(self, gradient: Values) -> Values:
        return (torch.cat([self.first, self.second]) * gradient).sum()


def owing(world: World, resume_at: int | None, rewraps: bool = False) -> tuple[Values, Values, Values]:
    """What powersgd applied in 30 steps, what this rank was given, and what it owes; maybe begun afresh at step 15, or
    resumed there."""
    settings = SyncConfig(gradient_format="powersgd", observe_steps=100)
    given, saved = torch.zeros(112, 32), None
    for part in [range(15), range(15, 30)] if resume_at else [range(30)]:
        model = Given()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with LocalSGD(model, optimizer, Constant(Plan(8, 1)), settings=settings, world=world) as sync:
            if saved is not None:
                model.load_state_dict(saved["model"])
                sync.load_state_dict(saved["sync"])
            for step in part:
                if step == 15 and rewraps:
                    sync.rewrap()
                gradient = torch.randn(112, 32, generator=torch.Generator().manual_seed(100 * world.rank + step))
                given += gradient
                optimizer.zero_grad()
                loss = sync.model(gradient)
                loss.backward()
                optimizer.step()
                sync.step(loss, samples=8)
            saved = copy.deepcopy({"model": model.state_dict(), "sync": sync.state_dict()})
            applied = -torch.cat([model.first, model.second]).detach()
            owed = saved["sync"]["gradients"]["owed"]
    return applied, given, torch.cat([owed[0], owed[1]]).view(112, 32)


def test_what_powersgd_owes_outlives_its_wrapper_and_is_in_a_checkpoint() -> None:
    for rewraps in (True, False):
        ranks = run(2, owing, None, rewraps)
        applied = ranks[0][0]
        given, owed = (torch.stack([rank[at] for rank in ranks]).mean(0) for at in (1, 2))
        assert owed.abs().max() > 0.1
        torch.testing.assert_close(applied + owed, given, rtol=0, atol=1e-4)  # nothing is lost
    for resumed, rank in zip(run(2, owing, 15), ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(resumed, rank, strict=True))


def spoiled(world: World) -> tuple[bool, Values]:
    """Whether a step of another rank's NaN was skipped, and the weights some steps after it, with PowerSGD."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.Linear(32, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    settings, seen = SyncConfig(gradient_format="powersgd"), []
    with LocalSGD(model, optimizer, Constant(Plan(8, 1)), settings=settings, world=world) as sync:
        for step in range(18):
            x, y = batch(world.rank, step)
            optimizer.zero_grad()
            loss = F.mse_loss(sync.model(x), y) * (math.nan if (step, world.rank) == (13, 1) else 1.0)
            finite = sync.all_finite(loss)
            loss.backward()
            seen.append(finite())
            if seen[-1]:
                optimizer.step()
            sync.step(loss, samples=8, skipped=not seen[-1])
    return seen == [step != 13 for step in range(18)], torch.cat(
        [each.detach().flatten() for each in model.parameters()]
    )


def test_a_gradient_that_is_not_finite_leaves_nothing_in_the_compressor() -> None:
    (skipped, first), (_, second) = run(2, spoiled)
    assert skipped
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
