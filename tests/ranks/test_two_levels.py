"""Averages inside a node more often than between nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from little import (
    LR,
    new_model,
    one_step,
    train,
)
from ranks import run
from torch import nn

from trainer import Constant, LocalSGD, Plan, SyncConfig
from trainer.distributed.world import World


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
