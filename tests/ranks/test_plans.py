"""What a Plan may ask for besides batch and period, on real ranks: no averaging, early ends, a delay, a format."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from little import by_hand, new_model, one_step, train, trained
from ranks import run

from trainer import Constant, Decision, LocalSGD, Observation, Plan, Policy, SyncConfig
from trainer.distributed.world import World
from trainer.plan import Memory

SELECTIVE = Plan(8, 50, early_end="gradient_change", early_end_above=0.3)


@dataclass(frozen=True)
class InTurn(Policy):
    """These Plans, one a round (at period 1 or 0 one an observation)."""

    each: tuple[Plan, ...] = (Plan(8, 4),)

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        turn = memory.get("turn", 0)
        return Decision(self.each[turn % len(self.each)], f"turn {turn}", memory={"turn": turn + 1})

    def plans(self) -> tuple[Plan, ...]:
        return self.each


# ---- period 0


def alone_then_evaluated(world: World) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weights = []
    settings = SyncConfig(observe_steps=2)
    with LocalSGD(model, optimizer, Constant(Plan(8, 0)), settings=settings, world=world) as sync:
        for step in range(6):
            trained(sync, world.rank, step)
            if step == 2:
                with sync.consensus() as consensus:
                    inside = consensus.weight.detach().clone()
            weights.append(model.weight.detach().clone())
    return weights, inside, model.weight.detach().clone()


def test_period_0_leaves_replicas_alone_shows_their_mean_and_averages_at_the_end() -> None:
    results = run(2, alone_then_evaluated)
    replicas = [new_model().weight.detach().clone() for _ in range(2)]
    for step in range(6):
        replicas = [one_step(replica, rank, step) for rank, replica in enumerate(replicas)]
        for rank, replica in enumerate(replicas):
            torch.testing.assert_close(results[rank][0][step], replica, rtol=1e-5, atol=1e-6)
        if step == 2:
            torch.testing.assert_close(results[0][1], sum(replicas) / 2, rtol=1e-5, atol=1e-6)
    for _, inside, end in results:
        assert torch.equal(inside, results[0][1])
        assert torch.equal(end, results[0][2])
        torch.testing.assert_close(end, sum(replicas) / 2, rtol=1e-5, atol=1e-6)


def test_a_plan_may_change_between_all_kinds_of_period_and_replicas_are_one_in_between() -> None:
    plans = (Plan(8, 1), Plan(8, 0), Plan(8, 3), Plan(8, 0), Plan(8, 1), Plan(8, 3))
    results = run(2, train, SyncConfig(observe_steps=2), InTurn(each=plans), 26)
    assert {ended.phase.plan.sync_period_steps for ended in results[0][1]} == {0, 1, 3}
    assert torch.equal(results[0][0][-1], results[1][0][-1])
    # two steps of averaged gradients, two alone, then one model again before the next three
    first, second = (weights for weights, _ in results)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[2], second[2])
    apart = [one_step(weights[2], rank, 3) for rank, weights in enumerate((first, second))]
    torch.testing.assert_close(first[3], (apart[0] + apart[1]) / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(first[3], second[3])


# ---- rounds that end early


def test_a_round_ends_where_replicas_have_moved_apart_and_not_before() -> None:
    probe = run(2, train, SyncConfig(), Constant(Plan(8, 5)), 20)[0][1]
    threshold = probe[0].seen.divergence / 2
    plan = Plan(8, 50, early_end="divergence", early_end_above=threshold)
    results = run(2, train, SyncConfig(), Constant(plan), 40)
    for rounds in (rounds for _, rounds in results):
        whole = rounds[:-1]
        assert len(whole) >= 2
        assert all(1 <= ended.seen.steps < 50 for ended in whole)
        # the first round has no direction to look along, so its estimate is the mean squared move
        assert [ended.seen.steps for ended in whole] == [ended.seen.steps for ended in results[0][1][:-1]]
    base, replicas = new_model().weight.detach(), [new_model().weight.detach().clone() for _ in range(2)]
    for step in range(results[0][1][0].seen.steps):
        replicas = [one_step(replica, rank, step) for rank, replica in enumerate(replicas)]
        move = sum(float((replica - base).square().sum()) for replica in replicas) / 2
        assert (move > threshold) == (step == results[0][1][0].seen.steps - 1)


def test_a_round_ends_where_some_ranks_gradient_has_changed() -> None:
    results = run(2, train, SyncConfig(), Constant(SELECTIVE), 30)
    steps = [[ended.seen.steps for ended in rounds] for _, rounds in results]
    assert steps[0] == steps[1]
    assert sum(steps[0]) == 30
    assert len(steps[0]) > 2
    assert all(ended.seen.grad_change >= 0.3 for ended in results[0][1][:-1])


def resumed(world: World, plan: Plan, cut: int) -> tuple[torch.Tensor, list[int]]:
    """Twenty steps, with all state saved and loaded into fresh objects after `cut` of them."""
    state: dict[str, Any] = {}
    rounds: list[int] = []
    weights = torch.empty(0)
    for begin, end in ((0, cut), (cut, 20)) if cut else ((0, 20),):
        model = new_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with LocalSGD(model, optimizer, Constant(plan), world=world) as sync:
            if state:
                model.load_state_dict(state["model"])
                sync.load_state_dict(state["sync"])
            for step in range(begin, end):
                rounds += [ended.seen.local_step for ended in trained(sync, world.rank, step)]
            weights = model.weight.detach().clone()
            copied = {name: value.clone() for name, value in model.state_dict().items()}
            state = {"model": copied, "sync": copy.deepcopy(sync.state_dict())} if end < 20 else {}
    return weights, rounds


@pytest.mark.parametrize("plan", [SELECTIVE, Plan(8, 50, early_end="divergence", early_end_above=0.05)])
def test_resume_in_the_middle_of_such_a_round_is_exact(plan: Plan) -> None:
    whole = run(2, resumed, plan, 0)
    for cut in (3, 8):
        parts = run(2, resumed, plan, cut)
        for (weights, rounds), (other, other_rounds) in zip(whole, parts, strict=True):
            assert torch.equal(weights, other)
            assert rounds == other_rounds


# ---- another delay, another wire format


def test_a_plans_own_delay_is_the_settings_delay() -> None:
    policy = Constant(Plan(8, 4, delay_steps=2))
    for rank, ((weights, _), expected) in enumerate(
        zip(run(2, train, SyncConfig(), policy, 11), by_hand(2, 11, 4, 2), strict=True)
    ):
        for ours, theirs in zip(weights[:11], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=f"rank {rank}")


def test_delay_format_and_fragments_may_change_at_every_round() -> None:
    plans = (
        Plan(8, 4, wire_format="int8"),
        Plan(8, 4, delay_steps=3, wire_format="int4"),
        Plan(8, 4, delay_steps="auto", wire_format="float32"),
        Plan(8, 1),
        Plan(8, 4, delay_steps=2, wire_format="bf16", fragments=3),
    )
    results = run(2, train, SyncConfig(observe_steps=2), InTurn(each=plans), 40)
    assert {ended.phase.plan for ended in results[0][1]} == set(plans)
    assert torch.equal(results[0][0][-1], results[1][0][-1])
    plain = run(2, train, SyncConfig(), Constant(Plan(8, 4)), 40)[0][0][-1]
    assert float((results[0][0][-1] - plain).norm() / plain.norm()) < 0.2


@dataclass(frozen=True)
class Shorter(InTurn):
    """The same, and only the first Plan is known beforehand."""

    def plans(self) -> tuple[Plan, ...]:
        return self.each[:1]


def test_every_fragment_is_averaged_in_rounds_shorter_than_there_are_fragments() -> None:
    policy = Shorter(each=(Plan(8, 4), Plan(8, 2), Plan(8, 2), Plan(8, 4)))
    results = run(2, train, SyncConfig(fragments=4), policy, 12)
    assert {ended.phase.plan.sync_period_steps for ended in results[0][1]} == {2, 4}
    # 18 values padded to 32: quarters of 8; in a round of two steps the first two are sent at the first step
    first, second = ([weight.flatten() for weight in weights] for weights, _ in results)
    assert torch.equal(first[4][:16], second[4][:16])
    assert not torch.equal(first[4][16:], second[4][16:])
    assert torch.equal(first[5][16:], second[5][16:])


def test_a_plan_may_say_what_the_settings_say_else() -> None:
    said = Constant(Plan(8, 4, fragments=4, delay_steps=1, wire_format="int8"))
    asked = SyncConfig(fragments=4, delay_steps=1, wire_format="int8")
    ours, theirs = run(2, train, SyncConfig(), said, 12), run(2, train, asked, Constant(Plan(8, 4)), 12)
    for rank in range(2):
        assert torch.equal(torch.stack(ours[rank][0]), torch.stack(theirs[rank][0]))


def test_an_outer_momentum_goes_on_where_the_fragments_change() -> None:
    outer = SyncConfig(outer="fedavgm", outer_momentum=0.5)
    first, same, other = Plan(8, 4), Plan(8, 4, wire_format="bf16"), Plan(8, 4, wire_format="bf16", fragments=3)
    kept, divided, plain = (
        run(2, train, settings, InTurn(each=(first, second)), 8)[0][0][7]
        for settings, second in ((outer, same), (outer, other), (SyncConfig(), same))
    )
    assert float((divided - kept).norm()) < 0.2 * float((kept - plain).norm())


def momenta(world: World, state: str) -> torch.Tensor:
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = SyncConfig(observe_steps=2, state=state)  # type: ignore[arg-type]
    policy = InTurn(each=(Plan(8, 0), Plan(8, 1), Plan(8, 1)))
    with LocalSGD(model, optimizer, policy, settings=settings, world=world) as sync:
        for step in range(4):
            trained(sync, world.rank, step)
    return optimizer.state[model.weight]["momentum_buffer"].clone()


@pytest.mark.parametrize("state", ["keep", "average", "reset"])
def test_period_1_after_period_0_begins_from_one_optimizer_state(state: str) -> None:
    first, second = run(2, momenta, state)
    assert torch.equal(first, second)
