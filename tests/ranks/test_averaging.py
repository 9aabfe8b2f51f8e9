"""Averages beside training, in parts, in fewer bits and under outer optimizers, against computations by hand."""

from __future__ import annotations

import copy
import itertools
import math
import os
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from ranks import RankError, run
from torch import nn
from torch.nn import functional as F

from trainer import Alternating, Constant, LocalSGD, Plan, SyncConfig
from trainer.distributed.collectives import Collectives
from trainer.distributed.world import World
from trainer.sync.outer_optimizer import Outer
from trainer.sync.replica import Replica

FEATURES, CLASSES, LR = 6, 3, 0.1
Values = torch.Tensor


def batch(rank: int, step: int) -> tuple[Values, Values]:
    draw = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(8, FEATURES, generator=draw), torch.randn(8, CLASSES, generator=draw)


def new_model() -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(FEATURES, CLASSES, bias=False)


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


def trained(sync: LocalSGD, rank: int, step: int, samples: int = 8) -> list[Any]:
    """One local step of the loop; the rounds that it ended."""
    device = next(sync.model.parameters()).device
    x, y = (values.to(device) for values in batch(rank, step))
    sync.optimizer.zero_grad()
    loss = F.mse_loss(sync.model(x), y)
    loss.backward()
    sync.optimizer.step()
    return sync.step(loss, samples=samples)


def one_step(weight: Values, rank: int, step: int) -> Values:
    x, y = batch(rank, step)
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


# ---- delay


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


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=LR),
        lambda parameters: torch.optim.RMSprop(parameters, lr=LR, momentum=0.5, centered=True),
        lambda parameters: torch.optim.Adagrad(parameters, lr=LR),
    ],
)
def test_a_corrected_optimizer_state_is_as_if_it_had_begun_from_the_average(optimizer: Any) -> None:
    """Of the same gradients on top of a rank's own state and of another, corrected, and never corrected."""
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, CLASSES, FEATURES, generator=draw)

    def begun(history: Values) -> Replica:
        model = new_model()
        replica = Replica(model, optimizer(model.parameters()), Collectives(World(), None, 2**20))
        advance(replica, history)
        return replica

    def advance(replica: Replica, history: Values) -> None:
        for gradient in history:
            replica.parameters[0].grad = gradient.clone()
            replica.optimizer.step()

    own, other = begun(gradients[:3]), begun(10 * gradients[3:])
    snapshot, mean = ({place: each.clone() for place, each in one.state().items()} for one in (own, other))
    advance(own, gradients[2:6])
    advance(other, gradients[2:6])
    own.correct_state(mean, snapshot, 4)
    assert own.state()
    for place, value in own.state().items():
        if place[1] != "momentum_buffer" or "alpha" not in own.optimizer.param_groups[0]:  # RMSprop's is not linear
            torch.testing.assert_close(value, other.state()[place], rtol=1e-4, atol=1e-5, msg=str(place))


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


# ---- every combination


def test_replicas_are_one_after_finish_in_every_combination() -> None:
    for ranks in (2, 3):
        for result in zip(*run(ranks, combinations, timeout_s=240), strict=True):
            name, weights, state = result[0]
            for other_name, other, other_state in result[1:]:
                assert other_name == name
                assert torch.equal(weights, other), name
                if "keep" not in name:
                    assert torch.equal(state, other_state), name
            assert torch.isfinite(weights).all(), name


def combinations(world: World) -> list[tuple[str, Values, Values]]:
    found = []
    for wire, delay, fragments, outer, mixing, state in itertools.product(
        ("float32", "int8"), (0, 2), (1, 3), ("none", "diloco", "slowmo"), (1.0, 0.5), ("keep", "average", "reset")
    ):
        if outer != "none" and mixing < 1:
            continue
        settings = SyncConfig(
            wire_format=wire,
            delay_steps=delay,
            fragments=fragments,
            outer=outer,
            mixing=mixing,
            state=state,
        )
        torch.manual_seed(world.rank)
        model = nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with LocalSGD(model, optimizer, Constant(Plan(8, 4)), settings=settings, world=world) as sync:
            for step in range(9 + delay):
                x, y = batch(world.rank, step)
                optimizer.zero_grad()
                loss = F.mse_loss(sync.model(x), y)
                loss.backward()
                optimizer.step()
                sync.step(loss, samples=8)
            with sync.consensus() as consensus:
                weights = torch.cat([value.detach().reshape(-1) for value in consensus.state_dict().values()])
            flat = [v.reshape(-1) for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
            found.append((str(settings), weights, torch.cat(flat) if flat else torch.zeros(0)))
    return found


# ---- outer optimizers


@pytest.mark.parametrize("outer", ["slowmo", "diloco", "fedavgm"])
def test_an_outer_optimizer_of_rate_1_without_momentum_is_plain_averaging(outer: Any) -> None:
    policy = Constant(Plan(8, 4))
    plain = run(2, train, SyncConfig(), policy, 8)
    ours = run(2, train, SyncConfig(outer=outer, outer_lr=1.0, outer_momentum=0.0), policy, 8)
    torch.testing.assert_close(ours[0][0][-1], plain[0][0][-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("outer", "delay"), [("slowmo", 0), ("diloco", 0), ("diloco", 4), ("fedavgm", 0), ("fedadam", 0)]
)
def test_outer_rules_by_hand(outer: Any, delay: int) -> None:
    """Two rounds of period 4 by each paper's own equation."""
    lr, beta = 0.5, 0.8
    settings = SyncConfig(outer=outer, outer_lr=lr, outer_momentum=beta, delay_steps=delay)
    weights = run(2, train, settings, Constant(Plan(8, 4)), 8 + delay)[0][0]
    base = new_model().weight.detach().double()
    momentum, second = torch.zeros_like(base), torch.full_like(base, 1e-6)
    replicas = [base.float(), base.float()]
    for round_ in range(2):
        if round_ == 0 or delay == 0:
            for step in range(4 * round_, 4 * round_ + 4):
                replicas = [one_step(replica, rank, step) for rank, replica in enumerate(replicas)]
        snapshots = replicas
        if delay:  # it lands after the next round's four steps
            for step in range(4 * round_ + 4, 4 * round_ + 8):
                replicas = [one_step(replica, rank, step) for rank, replica in enumerate(replicas)]
        delta = base - sum(snapshot.double() for snapshot in snapshots) / 2
        if outer == "slowmo":
            momentum = beta * momentum + delta / LR
            base = base - lr * LR * momentum
        elif outer == "diloco":
            momentum = beta * momentum + delta
            base = base - lr * (delta + beta * momentum)
        elif outer == "fedavgm":
            momentum = beta * momentum + delta
            base = base - lr * momentum
        else:
            momentum = beta * momentum + (1 - beta) * delta
            second = 0.99 * second + 0.01 * delta**2
            base = base - lr * momentum / (second.sqrt() + 1e-3)
        replicas = [(now + base - then).float() for now, then in zip(replicas, snapshots, strict=True)]
        torch.testing.assert_close(weights[4 * round_ + 3 + delay].double(), replicas[0].double(), rtol=1e-4, atol=1e-5)


def test_an_outer_optimizer_begins_anew_after_averaged_gradients() -> None:
    """A round of period 4 on each side of them: without what the first moved, momentum adds nothing to the second."""
    policy = Alternating(small=Plan(8, 4), large=Plan(8, 1), steps_per_phase=4)
    plain = run(2, train, SyncConfig(observe_steps=4), policy, 12)
    ours = run(2, train, SyncConfig(observe_steps=4, outer="fedavgm", outer_momentum=0.5), policy, 12)
    torch.testing.assert_close(ours[0][0][-1], plain[0][0][-1], rtol=1e-5, atol=1e-6)


def test_slowmo_stands_still_where_a_schedule_ends_at_rate_0() -> None:
    outer = Outer.of(SyncConfig(outer="slowmo"), torch.zeros(4))
    moved = outer.direct_(torch.full((4,), 0.2), slice(0, 4), 0.1)
    torch.testing.assert_close(moved, torch.full((4,), 0.2))
    still = outer.direct_(torch.zeros(4), slice(0, 4), 0.0)
    torch.testing.assert_close(still, torch.zeros(4), rtol=0, atol=1e-6)


# ---- fragments, mixing, divergence


def test_fragments_are_averaged_in_turn() -> None:
    results = run(2, train, SyncConfig(fragments=2), Constant(Plan(8, 4)), 4)
    first, second = ([weight.reshape(-1) for weight in weights] for weights, _ in results)
    half = 32 // 2  # of the flat buffer: 18 weights, and zeros up to 128 bytes
    assert torch.equal(first[1][:half], second[1][:half])
    assert not torch.equal(first[1][half:], second[1][half:])
    assert torch.equal(first[3][half:], second[3][half:])
    assert not torch.equal(first[3][:half], second[3][:half])


def test_mixing_takes_a_share_of_the_average() -> None:
    (first, _), (second, _) = run(2, train, SyncConfig(mixing=0.25), Constant(Plan(8, 4)), 4)
    replicas = [new_model().weight.detach() for _ in range(2)]
    for step in range(4):
        replicas = [one_step(replica, rank, step) for rank, replica in enumerate(replicas)]
    mean = sum(replicas) / 2
    for weights, replica in ((first, replicas[0]), (second, replicas[1])):
        torch.testing.assert_close(weights[3], replica + 0.25 * (mean - replica), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(weights[4], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wire_format", ["float32", "int8"])
@pytest.mark.parametrize("delay", [0, 2])
def test_divergence_is_the_mean_squared_distance_from_the_mean(wire_format: Any, delay: int) -> None:
    settings = SyncConfig(wire_format=wire_format, delay_steps=delay)
    _, rounds = run(3, train, settings, Constant(Plan(8, 4)), 8)[0]
    replicas = [history[3] for history in by_hand(3, 4, 5, 0)]
    mean = sum(replicas) / 3
    expected = sum((replica - mean).square().sum() for replica in replicas) / 3
    assert rounds[0].seen.divergence == pytest.approx(expected.item(), rel=0.05 if wire_format == "int8" else 1e-4)
    assert math.isnan(rounds[0].seen.transfer_s)
    assert rounds[1].seen.transfer_s > 0


# ---- two levels


@pytest.mark.parametrize("wire_format", ["float32", "int8"])
def test_two_levels_with_one_period_are_a_flat_average(wire_format: Any) -> None:
    policy = Constant(Plan(8, 4))
    flat = run(4, train, SyncConfig(), policy, 12)
    levels = SyncConfig(node_period_steps=4, ranks_per_node=2, wire_format=wire_format)
    for (ours, _), (theirs, _) in zip(run(4, train, levels, policy, 12), flat, strict=True):
        for step in (3, 7, 11):
            loose = {"rtol": 0.0, "atol": 2e-3} if wire_format == "int8" else {"rtol": 1e-5, "atol": 1e-6}
            torch.testing.assert_close(ours[step], theirs[step], **loose)


@pytest.mark.parametrize(("node_format", "delay"), [("float32", 0), ("float32", 2), ("bf16", 0)])
def test_a_node_is_averaged_more_often_than_all(node_format: Any, delay: int) -> None:
    settings = SyncConfig(node_period_steps=2, node_wire_format=node_format, delay_steps=delay, ranks_per_node=2)
    results = run(4, train, settings, Constant(Plan(8, 4)), 8)
    weights = [weights for weights, _ in results]
    for step in (1, 5):
        assert torch.equal(weights[0][step], weights[1][step])
        assert torch.equal(weights[2][step], weights[3][step])
        assert not torch.equal(weights[0][step], weights[2][step])
    assert not torch.equal(weights[0][0], weights[1][0])
    replicas = [new_model().weight.detach() for _ in range(4)]
    for step in range(2):
        replicas = [one_step(replica, rank, step) for rank, replica in enumerate(replicas)]
    torch.testing.assert_close(weights[0][1], (replicas[0] + replicas[1]) / 2, rtol=1e-2, atol=1e-3)
    for other in weights[1:]:
        assert torch.equal(weights[0][-1], other[-1])
    assert torch.equal(weights[0][3], weights[2][3]) == (delay == 0)


def test_gradients_every_step_inside_a_node_are_its_large_batch() -> None:
    settings = SyncConfig(node_period_steps=1, ranks_per_node=2)
    results = run(4, train, settings, Constant(Plan(8, 4)), 4)
    nodes = [new_model().weight.detach() for _ in range(2)]
    for step in range(4):
        nodes = [
            sum(one_step(weight, rank, step) for rank in (2 * node, 2 * node + 1)) / 2
            for node, weight in enumerate(nodes)
        ]
        if step < 3:
            for rank, (weights, _) in enumerate(results):
                torch.testing.assert_close(weights[step], nodes[rank // 2], rtol=1e-5, atol=1e-6)
    for weights, _ in results:
        torch.testing.assert_close(weights[3], sum(nodes) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nodes", [1, 2])
def test_levels_beside_training_have_groups_of_their_own(nodes: int) -> None:
    settings = SyncConfig(node_period_steps=1, ranks_per_node=2 // nodes, delay_steps=3, wire_format="int8")
    first, second = run(2, train, settings, Constant(Plan(8, 4)), 40)
    assert torch.equal(first[0][-1], second[0][-1])


def test_ranks_send_each_their_share_between_nodes() -> None:
    settings = SyncConfig(node_period_steps=4, ranks_per_node=2)
    for within, between in run(4, traffic, settings):
        model_bytes = 1024 * 4
        assert between == pytest.approx(model_bytes / 2, rel=0.01)  # half of the model, 2 (M - 1) / M of it
        assert within >= model_bytes


def traffic(world: World, settings: SyncConfig) -> tuple[float, float]:
    """Bytes inside the node and between nodes, of one round."""
    model = nn.Linear(32, 32, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with LocalSGD(model, optimizer, Constant(Plan(8, 4)), settings=settings, world=world) as sync:
        within, between = sync.collectives.within, sync.collectives.between
        assert within is not None
        assert between is not None
        for _ in range(4):
            sync.step(torch.tensor(0.0), samples=8)
        return within.sent_bytes, between.sent_bytes


# ---- gradients in fewer bits, and a world of one


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
    assert set(sent) == {4 * values}
    first, second = run(2, compressed, "bf16")
    assert torch.equal(first[0], second[0])
    assert set(first[1]) == {2 * values}
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


def owing(world: World, resume_at: int | None) -> tuple[Values, Values, Values]:
    """What powersgd applied in 30 steps, what this rank was given, and what it owes; with a new wrapper at step 15, or
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
                if step == 15 and not resume_at:
                    sync.rewrap()  # as a checkpoint does
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
    ranks = run(2, owing, None)
    applied = ranks[0][0]
    given, owed = (torch.stack([rank[at] for rank in ranks]).mean(0) for at in (1, 2))
    assert owed.abs().max() > 0.1
    torch.testing.assert_close(applied + owed, given, rtol=0, atol=1e-4)  # nothing is lost
    for resumed, rank in zip(run(2, owing, 15), ranks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(resumed, rank, strict=True))


@pytest.mark.parametrize("settings", [{"wire_format": "int4", "delay_steps": 3}, {"node_period_steps": 2}])
def test_a_world_of_one_loses_nothing_whatever_the_settings(settings: dict[str, Any]) -> None:
    (plain, _) = train(World(), SyncConfig(), Constant(Plan(8, 4)), 10)
    (ours, _) = train(World(), SyncConfig(**settings), Constant(Plan(8, 4)), 10)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("delay", [0, 2])
def test_every_fragment_has_its_nodes_average_also_at_a_rounds_end(delay: int) -> None:
    settings = SyncConfig(node_period_steps=2, ranks_per_node=2, fragments=2, delay_steps=delay)
    results = run(4, train, settings, Constant(Plan(8, 8)), 16)
    half = FEATURES * CLASSES // 2  # the first fragment, sent in the middle of a round
    first, second = (weights for weights, _ in results[:2])
    assert torch.equal(first[7].view(-1)[:half], second[7].view(-1)[:half])
    assert not torch.equal(first[6].view(-1)[:half], second[6].view(-1)[:half])


# ---- weights


def uneven(world: World, settings: SyncConfig, period: int) -> tuple[Values, Values]:
    """A replica that trained 8 samples a step on rank 0 and 24 on rank 1, before and after the last average."""
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with LocalSGD(model, optimizer, Constant(Plan(8, period)), settings=settings, world=world) as sync:
        for step in range(10):
            x, y = batch(world.rank, step)
            optimizer.zero_grad()
            F.mse_loss(sync.model(x), y).backward()
            optimizer.step()
            sync.step(torch.tensor(0.0), samples=8 + 16 * world.rank)
        own = model.weight.detach().clone()
        sync.finish()
        return own, model.weight.detach().clone()


@pytest.mark.parametrize(("settings", "period"), [(SyncConfig(), 0), (SyncConfig(mixing=0.5), 10)])
def test_the_last_average_is_weighted_by_samples_too(settings: SyncConfig, period: int) -> None:
    (first, consensus), (second, other) = run(2, uneven, settings, period)
    assert torch.equal(consensus, other)
    assert not torch.equal(first, second)
    torch.testing.assert_close(consensus, first / 4 + 3 * second / 4, rtol=1e-5, atol=1e-6)


def ramped(world: World) -> list[float]:
    """The rate's factor at every step, where ranks train unequal batches and a delay hides how many."""
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    small, large = Plan(8, 4), Plan(32, 1)
    policy = Alternating(small=small, large=large, samples_per_phase=96, lr_scaling="linear", lr_ramp_samples=400)
    factors = []
    settings = SyncConfig(delay_steps=2, observe_steps=2)
    with warnings.catch_warnings(), LocalSGD(model, optimizer, policy, settings=settings, world=world) as sync:
        warnings.simplefilter("ignore")  # of unequal batches at period 1
        for step in range(24):
            trained(sync, world.rank, step, samples=8 + 16 * world.rank)
            factors.append(sync.lr_scale)
    return factors


def test_a_rate_ramps_up_alike_on_ranks_with_unequal_batches() -> None:
    first, second = run(2, ramped)
    assert first == second
    assert len(set(first)) > 2, "there is a ramp"


# ---- faults


def test_groups_beside_the_first_wait_as_long_as_it() -> None:
    for found in run(2, time_outs):
        assert found == [77.0] * 5


def time_outs(world: World) -> list[float]:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    settings = SyncConfig(delay_steps=2, node_period_steps=2, ranks_per_node=1)
    mine = replace(world, timeout_s=77.0)
    with LocalSGD(model, optimizer, Constant(Plan(8, 4)), settings=settings, world=mine) as sync:
        beside = sync._averager._beside
        levels = [sync.collectives.within, sync.collectives.between, beside.within, beside.between]
        groups = [beside.group, *(level.group for level in levels if level is not None)]
        cpu = torch.device("cpu")
        return [group._get_backend(cpu).options._timeout.total_seconds() for group in groups if group is not None]


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


def stopped_and_resumed(world: World) -> tuple[int, bool, int]:
    """Ask to stop, leave a checkpoint's state with a transfer under way, and go on from it."""
    policy, settings = Constant(Plan(8, 4)), SyncConfig(delay_steps=4)
    model = new_model()
    with LocalSGD(model, torch.optim.SGD(model.parameters(), lr=LR), policy, settings=settings, world=world) as sync:
        for step in range(100):
            if step == 5 and world.rank == 1:
                sync.ask_to_stop()
            trained(sync, world.rank, step)
            if sync.stopping:
                break
        state, weights = copy.deepcopy((sync.state_dict(), model.state_dict()))
        assert state["averager"]["flying"], "a transfer is under way"
        stopped = sync.local_step
    model = new_model()
    with LocalSGD(model, torch.optim.SGD(model.parameters(), lr=LR), policy, settings=settings, world=world) as sync:
        model.load_state_dict(weights)
        sync.load_state_dict(state)
        for step in range(stopped, stopped + 12):
            trained(sync, world.rank, step)
        return stopped, sync.stopping, sync.local_step


def test_a_run_that_was_stopped_does_not_stop_again_when_it_goes_on() -> None:
    for stopped, again, reached in run(2, stopped_and_resumed):
        assert not again
        assert reached == stopped + 12


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


@pytest.mark.parametrize("when", [5, 8])
def test_a_peer_that_goes_away_in_mid_transfer_is_named(when: int) -> None:
    with pytest.raises(RankError, match=r"PeerError: .+ failed on rank 0 of 2: a peer went away"):
        run(2, deserted, when)


def deserted(world: World, when: int) -> None:
    """Rank 1 dies between sending its replica and taking the average, or as it sends."""
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    settings = SyncConfig(delay_steps=3, wire_format="int8")
    with LocalSGD(model, optimizer, Constant(Plan(8, 4)), settings=settings, world=world) as sync:
        for step in range(1, 20):
            if world.rank == 1 and step == when:
                os._exit(9)
            sync.step(torch.tensor(0.0), samples=8)


# ---- what cannot hold

EARLY = Plan(8, 4, early_end="divergence", early_end_above=1.0)


@pytest.mark.parametrize(
    ("fields", "plan", "said"),
    [
        ({"delay_steps": 5}, Plan(8, 4), r"delay_steps = 5: must be at most the policy's shortest period above 1 \(4"),
        ({"fragments": 5}, Plan(8, 4), "fragments = 5: must be at most"),
        ({"fragments": 2}, Plan(8, 1), "fragments = 2: averages no parameters at period 1"),
        ({"wire_format": "int4"}, Plan(8, 1), "wire_format = 'int4': .* gradients have sync.gradient_format"),
        ({"wire_format": "int3"}, Plan(8, 4), "wire_format = 'int3': choose one of float32, bf16, int8, int4"),
        ({"gradient_format": "int4"}, Plan(8, 1), "gradient_format = 'int4': choose one of float32, bf16, powersgd"),
        ({"delay_steps": -1}, Plan(8, 4), "delay_steps = -1: must be 0 or more local steps, or auto"),
        ({"node_period_steps": 3}, Plan(8, 4), "node_period_steps = 3: must divide the policy's periods above 1"),
        ({"ranks_per_node": 2}, Plan(8, 4), "ranks_per_node = 2: needs sync.node_period_steps"),
        (
            {"node_period_steps": 2, "node_wire_format": "int8", "delay_steps": 2},
            Plan(8, 4),
            "node_wire_format = 'int8': needs sync.delay_steps = 0",
        ),
        ({"outer_lr": 0.5}, Plan(8, 4), "outer_lr = 0.5: needs sync.outer"),
        ({"delay_steps": 2}, Plan(8, 4, delay_steps=1), "delay_steps = 2: has no effect: the policy's plans say it"),
        ({"wire_format": "int8"}, Plan(8, 4, wire_format="bf16"), "wire_format = 'int8': has no effect"),
        ({"fragments": 2}, Plan(8, 4, fragments=4), "fragments = 2: has no effect: the policy's plans say it"),
        ({"mixing": 0.5}, EARLY, "mixing = 0.5: must be 1 where divergence ends rounds"),
        ({"mixing": 0.5}, Plan(8, 1), "mixing = 0.5: averages no parameters at period 1"),
        ({"node_period_steps": 1, "node_wire_format": "int8"}, Plan(8, 4), "node_wire_format = 'int8': averages no"),
        ({"fragments": 2}, EARLY, "fragments = 2: must be 1 where rounds end early"),
        ({"delay_steps": 2}, EARLY, "delay_steps = 2: must be 0 where rounds end early"),
        ({"outer": "diloco", "mixing": 0.5}, Plan(8, 4), "outer = 'diloco': needs sync.mixing = 1"),
    ],
)
def test_what_cannot_hold_is_refused_in_one_line(fields: Any, plan: Plan, said: str) -> None:
    model = new_model()
    with pytest.raises(ValueError, match=said) as refused:
        LocalSGD(model, torch.optim.SGD(model.parameters(), lr=LR), Constant(plan), settings=SyncConfig(**fields))
    assert "\n" not in str(refused.value)
