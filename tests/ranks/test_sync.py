"""LocalSGD over real ranks: exactly data-parallel at period 1, silent inside a round, one model after it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from little import CLASSES, FEATURES, LR, Net, batch, flat, new_model, one_step, optimizer_of, trained
from ranks import RankError, run
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from trainer import Alternating, Constant, LocalSGD, Plan, PostLocal, SyncConfig
from trainer.config.config import OptimConfig, StepConfig
from trainer.distributed.world import World
from trainer.loop.step import LocalStep
from trainer.plan import Decision, Memory, Observation
from trainer.policies import Policy


def state_of(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    values = [v for state in optimizer.state.values() for _, v in sorted(state.items()) if torch.is_tensor(v)]
    return torch.cat([value.detach().double().reshape(-1) for value in values]) if values else torch.zeros(0)


# ---- period 1


def against_ddp(world: World, optimizer: str) -> list[bool]:
    torch.manual_seed(0)
    ours = Net()
    theirs = DistributedDataParallel(copy.deepcopy(ours), broadcast_buffers=False)
    our_optimizer, their_optimizer = optimizer_of(optimizer, ours), optimizer_of(optimizer, theirs)
    same = []
    with LocalSGD(ours, our_optimizer, Constant(Plan(8, 1)), world=world) as sync:
        for step in range(6):
            trained(sync, world.rank, step)
            x, y = batch(world.rank, step)
            their_optimizer.zero_grad()
            F.mse_loss(theirs(x), y).backward()
            their_optimizer.step()
            same.append(torch.equal(flat(ours), flat(theirs)))
    return same


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_period_1_is_ddp_step_by_step(optimizer: str) -> None:
    for same in run(2, against_ddp, optimizer):
        assert same == [True] * 6


def large_batch(world: World) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES)
    with LocalSGD(model, optimizer_of("sgd", model), Constant(Plan(8, 1)), world=world) as sync:
        for step in range(5):
            trained(sync, world.rank, step)
    return flat(model)


def test_period_1_is_large_batch_sgd() -> None:
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES)
    optimizer = optimizer_of("sgd", model)
    for step in range(5):
        x, y = (torch.cat(parts) for parts in zip(*(batch(rank, step) for rank in range(4)), strict=True))
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    for result in run(4, large_batch):
        torch.testing.assert_close(result, flat(model))


# ---- longer periods


def one_round(world: World) -> tuple[torch.Tensor, list[int], list[float]]:
    model = new_model()
    if world.rank:  # LocalSGD gives all ranks rank 0's model
        nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    group = dist.distributed_c10d._get_default_group()
    calls, sent = [], []
    with LocalSGD(model, optimizer, Constant(Plan(8, 4)), world=world) as sync:
        for step in range(4):
            before = group._get_sequence_number_for_group(), sync.collectives.sent_bytes
            trained(sync, world.rank, step, size=4 + 4 * world.rank)
            calls.append(group._get_sequence_number_for_group() - before[0])
            sent.append(sync.collectives.sent_bytes - before[1])
    return flat(model), calls, sent


def test_a_round_sends_nothing_and_ends_in_the_mean_weighted_by_samples() -> None:
    replicas = [new_model().weight.detach() for _ in range(3)]
    for step in range(4):
        replicas = [one_step(replica, rank, step, 4 + 4 * rank) for rank, replica in enumerate(replicas)]
    mean = sum(replica * weight for replica, weight in zip(replicas, (4 / 24, 8 / 24, 12 / 24), strict=True))
    for result, calls, sent in run(3, one_round):
        torch.testing.assert_close(result.float(), mean.flatten(), rtol=1e-5, atol=1e-6)
        assert calls[:3] == [0, 0, 0]
        assert sent[:3] == [0, 0, 0]
        assert calls[3] > 0
        assert sent[3] > 0


def replicas(world: World, policy: Any, settings: SyncConfig, optimizer: str) -> list[Any]:
    """At every observation: the parameters, the state, the buffers, and whether period 1 begins."""
    torch.manual_seed(world.rank)
    model = Net(unused=True)
    seen = []
    with LocalSGD(model, optimizer_of(optimizer, model), policy, settings=settings, world=world) as sync:
        for step in range(24):
            for ended in trained(sync, world.rank, step):
                entering = ended.next_phase is not None and sync.plan.sync_period_steps == 1
                stats = sync.replica.model.norm.running_mean.clone()
                seen.append((flat(model), state_of(sync.optimizer), stats, entering))
    return seen


POLICY = Alternating(small=Plan(8, 4), large=Plan(8, 1), steps_per_phase=8)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("state", ["keep", "average", "reset"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_replicas_are_one_after_every_averaging(size: int, state: Any, optimizer: str) -> None:
    results = run(size, replicas, POLICY, SyncConfig(state=state), optimizer)
    entered = 0
    for observations in zip(*results, strict=True):
        parameters, states, _stats, entering = zip(*observations, strict=True)
        period_1_or_shared = entering[0] or state != "keep"
        for rank in range(1, size):
            assert torch.equal(parameters[0], parameters[rank])
            if period_1_or_shared:
                assert torch.equal(states[0], states[rank])
        entered += entering[0]
        if state == "reset" and entering[0]:
            assert len(states[0]) == 0
    assert entered == 2
    # kept state is each rank's own in a local phase: the first averaging leaves it so
    if state == "keep":
        assert not torch.equal(results[0][0][1], results[1][0][1])
    # after a whole period-1 phase too, the state is still one
    assert torch.equal(results[0][2][1], results[1][2][1])


@pytest.mark.parametrize(("policy", "one"), [("average", True), ("keep", False), ("recalibrate", False)])
def test_batch_norm_policy_at_an_averaging(policy: Any, one: bool) -> None:
    first, second = run(2, replicas, Constant(Plan(8, 4)), SyncConfig(batch_norm=policy), "sgd")
    assert all(torch.equal(a[2], b[2]) == one for a, b in zip(first, second, strict=True))


def evaluated(world: World, policy: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(world.rank)
    model = Net()
    with LocalSGD(
        model, optimizer_of("sgd", model), Constant(Plan(8, 4)), settings=SyncConfig(batch_norm=policy), world=world
    ) as sync:
        for step in range(6):  # ends in the middle of a round
            trained(sync, world.rank, step)
        own = model.norm.running_mean.clone()
        with sync.consensus([batch(world.rank, step)[0] for step in range(3)]) as consensus:
            assert not consensus.training
            inside = torch.cat([flat(consensus), consensus.norm.running_mean.double()])
        return inside, own, model.norm.running_mean.clone()


@pytest.mark.parametrize("policy", ["average", "keep", "recalibrate"])
def test_the_consensus_model_is_one_model_and_keep_keeps(policy: str) -> None:
    results = run(3, evaluated, policy)
    for inside, own, after in results:
        assert torch.equal(inside, results[0][0])
        assert torch.equal(own, after) == (policy == "keep")


def test_recalibrated_statistics_are_the_mean_over_the_ranks_batches() -> None:
    results = run(2, evaluated, "recalibrate")
    torch.manual_seed(0)
    model = Net()
    weights = results[0][0][: flat(model).numel()].float()
    nn.utils.vector_to_parameters(weights, model.parameters())
    batches = [model.hidden(model.frozen(batch(rank, step)[0])).mean(dim=0) for rank in range(2) for step in range(3)]
    expected = torch.stack(batches).mean(dim=0)
    torch.testing.assert_close(results[0][0][-8:].float(), expected.detach(), rtol=1e-4, atol=1e-5)


# ---- what goes wrong


def non_finite(world: World, period: int) -> list[Any]:
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES)
    step = LocalStep(StepConfig(), OptimConfig(), nn.CrossEntropyLoss(), world.device)
    rounds, skips = [], []
    settings = SyncConfig(observe_steps=4)
    with LocalSGD(model, optimizer_of("sgd", model), Constant(Plan(8, period)), settings=settings, world=world) as sync:
        for number in range(8):
            x, y = batch(world.rank, number)
            if world.rank == 1 and number in (2, 3):
                x = x * float("nan")
            loss, skipped, _ = step(sync, x, y.argmax(1))
            skips.append(skipped)
            rounds += sync.step(loss, samples=8, skipped=skipped)
    ended = [(r.seen.skipped_steps, r.skipped_in_a_row, r.seen.train_loss) for r in rounds]
    return [skips, ended, flat(model)]


def test_a_bad_loss_at_period_1_is_skipped_by_every_rank() -> None:
    first, second = run(2, non_finite, 1)
    expected = [number in (2, 3) for number in range(8)]
    assert first[0] == second[0] == expected
    assert first[1] == second[1]
    assert [(skipped, in_a_row) for skipped, in_a_row, _ in first[1]] == [(4, 2), (0, 0)]
    assert torch.isfinite(first[2]).all()
    assert torch.equal(first[2], second[2])


def test_a_bad_loss_in_a_round_is_skipped_by_its_own_rank_and_told_to_all() -> None:
    first, second = run(2, non_finite, 4)
    assert first[0] == [False] * 8
    assert second[0] == [number in (2, 3) for number in range(8)]
    assert first[1] == second[1]
    assert [(skipped, in_a_row) for skipped, in_a_row, _ in first[1]] == [(2, 2), (0, 0)]
    assert all(loss == loss for _, _, loss in first[1]), "a skipped step is no part of the mean loss"
    assert torch.equal(first[2], second[2])


@dataclass(frozen=True)
class OfItsOwn(Policy):
    """Plans another batch on every rank, from the second round on."""

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        own = dist.get_rank() if seen.round and dist.is_initialized() else 0
        return Decision(Plan(8 + own, 2), f"own {own}")

    def plans(self) -> tuple[Plan, ...]:
        return (Plan(8, 2),)


def disagree(world: World, policy: Any) -> None:
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES)
    with LocalSGD(model, optimizer_of("sgd", model), policy or Constant(Plan(8 + world.rank, 2)), world=world) as sync:
        for step in range(8):
            trained(sync, world.rank, step)


def test_ranks_with_different_plans_are_told_apart() -> None:
    with pytest.raises(
        RankError, match=r"MismatchError: the policy of LocalSGD is .* on rank 0, .*=9.* on rank 1; give"
    ):
        run(2, disagree, None)


def test_ranks_that_come_to_different_plans_are_told_apart() -> None:
    with pytest.raises(
        RankError, match=r"MismatchError: ranks disagree about their batch: rank 0 .* batch 8 .*; rank 1 .* batch 9 "
    ):
        run(2, disagree, OfItsOwn())


def scaled(world: World) -> list[float]:
    torch.manual_seed(0)
    model = nn.Linear(FEATURES, CLASSES)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (4 + world.rank))
    policy = PostLocal(large=Plan(8, 2), local=Plan(8, 1), switch_samples=8 * world.size * 2)
    scales = []
    with LocalSGD(model, optimizer_of("sgd", model), policy, world=world, scaler=scaler) as sync:
        for step in range(4):
            x, y = batch(world.rank, step)
            sync.optimizer.zero_grad()
            loss = F.mse_loss(sync.model(x), y)
            scaler.scale(loss).backward()
            scaler.step(sync.optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
            sync.step(loss, samples=8)
    return [*scales, *flat(model).tolist()]


def test_period_1_begins_with_one_loss_scale() -> None:
    first, second = run(2, scaled)
    assert (first[0], second[0]) == (16, 32)
    assert first[2] == second[2] == 16
    assert first[4:] == second[4:]
