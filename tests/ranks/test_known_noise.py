"""Signals that come from real ranks, on a problem whose noise is known."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from ranks import run
from torch import nn

from trainer import Constant, LocalSGD, Plan, SyncConfig
from trainer.distributed.world import World
from trainer.sync.given_noise import directions

DIMENSION, DEVIATION, DISTANCE, BATCH = 4_000, 0.5, 2.0, 16
TRUE_VARIANCE = DIMENSION * DEVIATION**2
TRUE_SQ_NORM = DISTANCE**2


class Quadratic(nn.Module):
    """½ ‖w − x‖² over samples x: the gradient of one sample is w − x, of all w − mean x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIMENSION))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.weight - x).square().sum(dim=1).mean()


def watched(world: World, period: int, rounds: int) -> list[Any]:
    """What a model that hardly moves is observed to have; its mean gradient is 2 long, along the first axis."""
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    draw = torch.Generator().manual_seed(world.rank)
    seen = []
    settings = SyncConfig(observe_steps=2)
    with LocalSGD(model, optimizer, Constant(Plan(BATCH, period)), settings=settings, world=world) as sync:
        for _ in range(rounds * max(period, 2)):
            x = torch.randn(BATCH, DIMENSION, generator=draw) * DEVIATION
            x[:, 0] += DISTANCE
            optimizer.zero_grad()
            loss = sync.model(x)
            loss.backward()
            optimizer.step()
            seen += [ended.seen for ended in sync.step(loss, BATCH)]
    return seen


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_noise_scale_of_a_known_problem_in_both_kinds_of_phase(ranks: int) -> None:
    estimates = []
    for period in (1, 4):
        each = run(ranks, watched, period, 150)
        assert [o.noise_scale for o in each[0][1:]] == [o.noise_scale for o in each[1][1:]], "one on all ranks"
        settled = each[0][50:]
        variance = statistics.mean(seen.grad_variance for seen in settled)
        sq_norm = statistics.mean(seen.grad_sq_norm for seen in settled)
        assert variance == pytest.approx(TRUE_VARIANCE, rel=0.1)
        assert sq_norm == pytest.approx(TRUE_SQ_NORM, rel=0.25)
        estimates.append(variance / sq_norm)
    assert estimates[1] == pytest.approx(estimates[0], rel=0.25)
    assert estimates[0] == pytest.approx(TRUE_VARIANCE / TRUE_SQ_NORM, rel=0.25)


def test_one_rank_alone_knows_no_noise_scale() -> None:
    assert all(math.isnan(seen.noise_scale) for seen in run(1, watched, 4, 3)[0])


def looked(world: World, settings: SyncConfig, period: int, steps: int, evaluated_at: int) -> list[bool]:
    """Whether a round's noted gradients were of replicas that were apart, by round."""
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(world.rank)
    apart = []
    with LocalSGD(model, optimizer, Constant(Plan(BATCH, period)), settings=settings, world=world) as sync:
        for step in range(steps):
            optimizer.zero_grad()
            loss = sync.model(torch.randn(BATCH, DIMENSION, generator=draw))
            loss.backward()
            begins = sync.between_rounds
            optimizer.step()
            if begins and step % max(period, 4) == 0:
                apart.append(bool(sync._progress.notes.noted()["grad_apart"]))
            sync.step(loss, BATCH)
            if step + 1 == evaluated_at:
                sync.settle()
    return apart


@pytest.mark.parametrize(
    ("settings", "period", "apart"),
    [
        (SyncConfig(observe_steps=1), 4, [False, False, False, False]),
        (SyncConfig(observe_steps=1, delay_steps=2), 4, [False, True, True, False]),
        (SyncConfig(observe_steps=1, delay_steps=4, wire_format="int8"), 4, [False, True, True, False]),
        (SyncConfig(observe_steps=1, mixing=0.5), 4, [False, True, True, False]),
        (SyncConfig(observe_steps=1, fragments=2), 4, [False, True, True, False]),
        (SyncConfig(observe_steps=4), 1, [False, False, False, False]),
        (SyncConfig(observe_steps=4), 0, [False, True, True, True]),
    ],
    ids=["blocking", "delay", "delay of a round", "mixing", "fragments", "averaged gradients", "never averaged"],
)
def test_ranks_know_whether_the_gradients_they_look_at_are_of_one_model(
    settings: SyncConfig, period: int, apart: list[bool]
) -> None:
    """An evaluation after the third round makes replicas one, where the Plan averages at all."""
    for found in run(2, looked, settings, period, 16, 12):
        assert found == apart


def trained_with_noise(world: World, period: int) -> tuple[torch.Tensor, float]:
    """The weights after every local step, and the noise scale that was seen."""
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    weights, seen = [], math.nan
    plan = Plan(BATCH, period, noise_batch=BATCH // 4)
    with LocalSGD(model, optimizer, Constant(plan), settings=SyncConfig(observe_steps=1), world=world) as sync:
        for step in range(4):
            optimizer.zero_grad()
            loss = sync.model(inputs(world.rank, step))
            loss.backward()
            optimizer.step()
            weights.append(model.weight.detach().clone())
            for ended in sync.step(loss, BATCH):
                seen = ended.seen.noise_scale
    return torch.stack(weights), seen


def inputs(rank: int, step: int) -> torch.Tensor:
    return torch.randn(BATCH, DIMENSION, generator=torch.Generator().manual_seed(10 * step + rank)) + 1


def test_averaged_gradients_are_given_the_same_noise_on_all_ranks() -> None:
    found = run(3, trained_with_noise, 1)
    weight = torch.zeros(DIMENSION)
    for step in range(4):
        counts = torch.tensor(1 / 3 + directions(3, 3.0, step), dtype=torch.float32)
        weight = weight - 0.5 * sum(c * (weight - inputs(k, step).mean(dim=0)) for k, c in enumerate(counts))
        torch.testing.assert_close(found[0][0][step], weight)
    assert all(torch.equal(theirs, found[0][0]) for theirs, _ in found)
    # the mean's variance is more than its parts' here, and the estimate is right all the same: tr Σ / ‖G‖²
    assert found[0][1] == pytest.approx(DIMENSION / float((weight - 1).square().sum()), rel=1.0)


def test_replicas_that_are_apart_have_noise_of_their_own() -> None:
    (first, _), (second, _) = run(2, trained_with_noise, 2)
    plain = [0.5 * inputs(rank, 0).mean(dim=0) for rank in range(2)]  # nothing was before the first step
    torch.testing.assert_close(first[0], plain[0])
    torch.testing.assert_close(second[0], plain[1])
    for weights, rank in ((first, 0), (second, 1)):
        own = weights[0] - inputs(rank, 1).mean(dim=0)
        noise = (weights[0] - weights[1]) / 0.5 - own
        other = own - (0 - inputs(rank, 0).mean(dim=0))
        torch.testing.assert_close(noise.abs(), math.sqrt(1.5) * other.abs(), atol=1e-4, rtol=1e-4)
