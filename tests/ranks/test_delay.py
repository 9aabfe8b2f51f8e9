"""Averages beside training: what lands later is the correction that a computation by hand gives."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from little import (
    CLASSES,
    FEATURES,
    LR,
    Values,
    batch,
    by_hand,
    new_model,
    one_step,
    train,
    trained,
)
from ranks import run
from torch import nn
from torch.nn import functional as F

from trainer import Alternating, Constant, LocalSGD, Plan, SyncConfig
from trainer.distributed.world import World


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("delay", [1, 2, 4])
def test_a_delayed_average_is_the_hand_computed_correction(ranks: int, delay: int) -> None:
    results = run(ranks, train, SyncConfig(delay_steps=delay), Constant(Plan(8, 4)), 11)
    for rank, ((weights, _), expected) in enumerate(zip(results, by_hand(ranks, 11, 4, delay), strict=True)):
        for step, (ours, theirs) in enumerate(zip(weights[:11], expected, strict=True)):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=f"rank {rank}, step {step}")
        assert torch.equal(weights[-1], results[0][0][-1])


MOMENTUM = 0.8


def momenta(world: World, settings: SyncConfig, steps: int) -> list[tuple[Values, Values]]:
    """Weights and momenta after every local step."""
    model, seen = new_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    with LocalSGD(model, optimizer, Constant(Plan(8, 4)), settings=settings, world=world) as sync:
        for step in range(steps):
            trained(sync, world.rank, step)
            seen.append((model.weight.detach().clone(), optimizer.state[model.weight]["momentum_buffer"].clone()))
    return seen


@pytest.mark.parametrize("delay", [1, 2, 4])
def test_a_delayed_average_of_momenta_keeps_what_came_since(delay: int) -> None:
    """By hand: momenta a delay ago, averaged, decay in its steps as a momentum does, and the gradients since add up on
    top; a delay as long as a round must not freeze them."""
    results = run(2, momenta, SyncConfig(delay_steps=delay, state="average"), 13)
    weights = [new_model().weight.detach() for _ in range(2)]
    momentum = [torch.zeros_like(weights[0]) for _ in range(2)]
    sent: list[tuple[Values, Values]] = []
    for step in range(13):
        for rank in range(2):
            gradient = (weights[rank] - one_step(weights[rank], rank, step)) / LR
            momentum[rank] = MOMENTUM * momentum[rank] + gradient
            weights[rank] = weights[rank] - LR * momentum[rank]
        if sent and (step + 1 - delay) % 4 == 0:
            for each, share in ((weights, 1.0), (momentum, MOMENTUM**delay)):
                then = [pair[0 if each is weights else 1] for pair in sent]
                each[:] = [now + share * (sum(then) / 2 - mine) for now, mine in zip(each, then, strict=True)]
        if (step + 1) % 4 == 0:
            sent = list(zip(weights, momentum, strict=True))
        for rank in range(2):
            torch.testing.assert_close(results[rank][step], (weights[rank], momentum[rank]), rtol=1e-4, atol=1e-5)


class Normed(nn.Module):
    """Keeps the running mean that its statistics should have by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES, momentum=0.3)
        self.expected = [torch.zeros(FEATURES)]

    def forward(self, x: Values) -> Values:
        self.expected.append(0.7 * self.expected[-1] + 0.3 * x.mean(dim=0))
        found: Values = self.norm(x)[:, :CLASSES]
        return found


def running_means(world: World) -> tuple[Values, Values, Values]:
    """Before the end, what they should be there, and the consensus model's."""
    model = Normed()
    settings = SyncConfig(delay_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with LocalSGD(model, optimizer, Constant(Plan(8, 2)), settings=settings, world=world) as sync:
        for step in range(11):
            trained(sync, world.rank, step)
        own = model.norm.running_mean.clone()
        with sync.consensus():
            return own, model.expected[-1], model.norm.running_mean.clone()


def test_batch_norm_statistics_go_on_beside_a_transfer() -> None:
    """An average that is as late as a round is long would set them back to what they were, for ever."""
    results = run(2, running_means)
    for own, expected, agreed in results:
        torch.testing.assert_close(own, expected)
        torch.testing.assert_close(agreed, (results[0][1] + results[1][1]) / 2)


@pytest.mark.parametrize("wire_format", ["float32", "bf16", "int8", "int4"])
def test_a_transfer_taken_at_once_is_a_blocking_average_bit_for_bit(wire_format: Any) -> None:
    blocking = SyncConfig(wire_format=wire_format)
    policy = Constant(Plan(8, 4))
    now = run(2, train, blocking, policy, 10)
    later = run(2, train, replace(blocking, delay_steps=3), policy, 10, 4)
    for (ours, _), (theirs, _) in zip(now, later, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_under_delay_replica_less_own_progress_is_one_model() -> None:
    period, delay = 5, 3
    results = run(3, train, SyncConfig(delay_steps=delay, wire_format="int8"), Constant(Plan(8, period)), 10)
    agreed = []
    for rank, (weights, _) in enumerate(results):
        snapshot, before = weights[period - 1], weights[period + delay - 2]
        progress = one_step(before, rank, period + delay - 1) - snapshot
        agreed.append(weights[period + delay - 1] - progress)
    for other in agreed[1:]:
        torch.testing.assert_close(agreed[0], other, rtol=0, atol=1e-6)
    assert not torch.equal(results[0][0][period + delay - 1], results[1][0][period + delay - 1])


def test_a_delayed_round_is_told_at_the_next_rounds_end() -> None:
    policy = Alternating(small=Plan(8, 4), large=Plan(8, 1), steps_per_phase=8)
    for weights, rounds in run(2, train, SyncConfig(delay_steps=2, observe_steps=4), policy, 28):
        local = [ended for ended in rounds if ended.phase.plan.sync_period_steps == 4]
        assert [ended.seen.delay_steps for ended in local[:2]] == [2, 2]
        steps = [ended.seen.local_step for ended in rounds]
        assert steps == sorted(set(steps))
        assert {ended.phase.name for ended in rounds} == {"small", "large"}
        assert sum(ended.seen.samples - before.seen.samples for before, ended in itertools.pairwise(rounds)) > 0
        assert all(torch.isfinite(weight).all() for weight in weights)


def test_period_1_begins_from_one_model_whatever_is_under_way() -> None:
    policy = Alternating(small=Plan(8, 4), large=Plan(8, 1), steps_per_phase=8)
    settings = SyncConfig(delay_steps=4, wire_format="int8", fragments=2, observe_steps=4)
    first, second = run(2, train, settings, policy, 24, 0, 0.9)
    phases = [(ended.phase.plan.sync_period_steps, ended.seen.local_step) for ended in first[1]]
    end_of_large = max(step for period, step in phases if period == 1)
    assert torch.equal(first[0][end_of_large - 1], second[0][end_of_large - 1])


def test_auto_agrees_on_one_delay_within_its_bound() -> None:
    results = run(2, train, SyncConfig(delay_steps="auto", max_delay_steps=3), Constant(Plan(8, 6)), 60)
    delays = [[ended.seen.delay_steps for ended in rounds] for _, rounds in results]
    assert delays[0] == delays[1]
    assert delays[0][0] == 0, "the first transfer is measured"
    assert 1 <= max(delays[0]) <= 3


class Branches(nn.Module):
    """The first weight is used from the third step on only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.late, self.early = (nn.Linear(FEATURES, CLASSES, bias=False) for _ in range(2))

    def forward(self, x: Values, step: int) -> Values:
        found: Values = self.early(x)
        return found + self.late(x) if step > 4 else found


def branched(world: World, cut_at: int) -> list[Values]:
    """Weights and momenta at the end; with a cut, of a fresh replica that goes on from its state there."""
    settings, policy = SyncConfig(delay_steps=3, state="average"), Constant(Plan(8, 4))

    def opened(model: nn.Module) -> LocalSGD:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5)
        return LocalSGD(model, optimizer, policy, settings=settings, world=world)

    def go_on(sync: LocalSGD, steps: range) -> None:
        for step in steps:
            x, y = batch(world.rank, step)
            sync.optimizer.zero_grad()
            loss = F.mse_loss(sync.model(x, step), y)
            loss.backward()
            sync.optimizer.step()
            sync.step(loss, samples=8)

    model = Branches()
    with opened(model) as sync:
        go_on(sync, range(cut_at))
        saved = copy.deepcopy((sync.state_dict(), model.state_dict(), sync.optimizer.state_dict()))
        if not saved[0]["averager"]["flying"]:
            go_on(sync, range(cut_at, 12))
    if saved[0]["averager"]["flying"]:
        model = Branches()
        with opened(model) as sync:
            model.load_state_dict(saved[1])
            sync.optimizer.load_state_dict(saved[2])
            sync.load_state_dict(saved[0])
            go_on(sync, range(cut_at, 12))
    return [model.early.weight.detach(), model.late.weight.detach(), *sync.replica.state().values()]


def test_momenta_under_way_find_their_parameters_again() -> None:
    whole, cut = run(2, branched, 0), run(2, branched, 6)  # sent at 4, when the first weight has none, landing at 7
    for ours, theirs in zip(cut, whole, strict=True):
        assert len(ours) == 4
        assert all(torch.equal(mine, its) for mine, its in zip(ours, theirs, strict=True))
