"""Averages of a part: fragments in turn, and a share of the average; how far replicas are apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from little import (
    CLASSES,
    FEATURES,
    by_hand,
    new_model,
    one_step,
    train,
)
from ranks import run

from trainer import Constant, Plan, SyncConfig


def test_fragments_are_averaged_in_turn() -> None:
    results = run(2, train, SyncConfig(fragments=2), Constant(Plan(8, 4)), 4)
    first, second = ([weight.reshape(-1) for weight in weights] for weights, _ in results)
    half = 32 // 2  # of the flat buffer: 18 weights, and zeros up to 128 bytes
    assert torch.equal(first[1][:half], second[1][:half])
    assert not torch.equal(first[1][half:], second[1][half:])
    assert torch.equal(first[3][half:], second[3][half:])
    assert not torch.equal(first[3][:half], second[3][:half])


@pytest.mark.parametrize("delay", [0, 2])
def test_every_fragment_has_its_nodes_average_also_at_a_rounds_end(delay: int) -> None:
    settings = SyncConfig(node_period_steps=2, ranks_per_node=2, fragments=2, delay_steps=delay)
    results = run(4, train, settings, Constant(Plan(8, 8)), 16)
    half = FEATURES * CLASSES // 2  # the first fragment, sent in the middle of a round
    first, second = (weights for weights, _ in results[:2])
    assert torch.equal(first[7].view(-1)[:half], second[7].view(-1)[:half])
    assert not torch.equal(first[6].view(-1)[:half], second[6].view(-1)[:half])


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
