"""Averages in every combination of settings, weighted by samples, after a stop, and where a peer goes away."""

from __future__ import annotations

import copy
import itertools
import os
import warnings
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
    new_model,
    trained,
)
from ranks import RankError, run
from torch import nn
from torch.nn import functional as F

from trainer import Alternating, Constant, LocalSGD, Plan, SyncConfig
from trainer.distributed.world import World


def test_replicas_are_one_after_finish_in_every_combination() -> None:
    for ranks in (2, 3):
        for result in zip(*run(ranks, combinations, ranks, timeout_s=240), strict=True):
            name, weights, state = result[0]
            for other_name, other, other_state in result[1:]:
                assert other_name == name
                assert torch.equal(weights, other), name
                if "keep" not in name:
                    assert torch.equal(state, other_state), name
            assert torch.isfinite(weights).all(), name


def combinations(world: World, ranks: int) -> list[tuple[str, Values, Values]]:
    """On three ranks the wire format that has another exchange there."""
    found = []
    for wire, delay, fragments, outer, mixing, state in itertools.product(
        ("float32", "int8"), (0, 2), (1, 3), ("none", "diloco", "slowmo"), (1.0, 0.5), ("keep", "average", "reset")
    ):
        if (outer != "none" and mixing < 1) or (ranks == 3 and wire == "float32"):
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
        with LocalSGD(model, optimizer, Constant(Plan(8, 3)), settings=settings, world=world) as sync:
            for step in range(7 + delay):
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


def far(world: World, settings: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 moves a thousand times as far as the others, once."""
    model, heard = new_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with LocalSGD(model, optimizer, Constant(8, 2), settings=settings) as sync:
        for step in range(6):
            if world.rank == 1 and step == 2:
                with torch.no_grad():
                    model.weight.add_(50.0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                heard += trained(sync, world.rank, step)
    return {"left_out": [each.left_out for each in heard], "norm": float(model.weight.detach().norm())}


@pytest.mark.parametrize(
    "settings", [{}, {"wire_format": "int8"}, {"outer": "slowmo"}, {"delay_steps": 1}, {"fragments": 2}]
)
def test_a_replica_that_has_moved_too_far_is_left_out(settings: dict[str, Any]) -> None:
    for found in run(3, far, settings | {"leave_out_above": 10.0}):
        assert (1,) in found["left_out"]
        assert found["norm"] < 5
    for found in run(3, far, settings):
        assert (1,) not in found["left_out"]
        assert found["norm"] > 5
