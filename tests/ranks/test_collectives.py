"""Averages over real ranks against means computed by hand."""

from __future__ import annotations

import pytest
import torch
from ranks import run

from trainer.distributed.clock import Clock
from trainer.distributed.collectives import Collectives
from trainer.distributed.world import World

SHAPES = [(7,), (3, 5), (1,), (2, 3, 2), (11,), ()]


def mine(rank: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(rank)
    tensors = [torch.randn(shape, generator=draw) for shape in SHAPES]
    return [
        *tensors,
        torch.randn(4, 2, 3, 3, generator=draw).to(memory_format=torch.channels_last),
        tensors[0].double(),
    ]


def average(world: World, weights: list[float], bucket_bytes: int) -> tuple[list[torch.Tensor], float, float]:
    collectives = Collectives(world, Clock(world.device), bucket_bytes)
    tensors = mine(world.rank)
    collectives.mean_(tensors, weights[world.rank])
    expected = 2 * (world.size - 1) / world.size * sum(tensor.nbytes for tensor in tensors)
    return tensors, collectives.sent_bytes, expected


@pytest.mark.parametrize("bucket_bytes", [1, 64, 2**20])
@pytest.mark.parametrize("weights", [[0.25, 0.75], [0.5, 0.125, 0.25, 0.125]])
def test_mean_over_odd_buckets_is_the_weighted_mean(weights: list[float], bucket_bytes: int) -> None:
    results = run(len(weights), average, weights, bucket_bytes)
    ranks = [mine(rank) for rank in range(len(weights))]
    for place, tensor in enumerate(results[0][0]):
        by_hand = sum(weight * rank[place] for weight, rank in zip(weights, ranks, strict=True))
        torch.testing.assert_close(tensor, by_hand)
        for tensors, _, _ in results[1:]:
            assert torch.equal(tensor, tensors[place]), "ranks must hold the very same bits"
    assert all(sent == expected for _, sent, expected in results)


def compare(world: World) -> tuple[list[dict[str, float]], float, list[torch.Tensor]]:
    collectives = Collectives(world, Clock(world.device), 2**20)
    gathered = collectives.gather({"rank": world.rank, "big": 2**53 - 1 - world.rank})
    total = collectives.end_sum(collectives.begin_sum(torch.tensor(float(world.rank + 1))))
    counter, floats = torch.tensor(world.rank), torch.full((3,), float(world.rank))
    collectives.max_([counter])
    collectives.broadcast_([floats])
    return gathered, total, [counter, floats]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_scalars(size: int) -> None:
    for gathered, total, (counter, floats) in run(size, compare):
        assert gathered == [{"rank": rank, "big": 2**53 - 1 - rank} for rank in range(size)]
        assert total == size * (size + 1) / 2
        assert counter == size - 1
        assert torch.equal(floats, torch.zeros(3))
