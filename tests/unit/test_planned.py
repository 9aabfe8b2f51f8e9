"""Sizes of steps, random seeds of reading, and nested batches."""

from __future__ import annotations

import random
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from trainer.data.nested import leaves, length, mapped, nbytes
from trainer.data.planned import PlannedBatches, count_steps, shard_sizes, step_sizes
from trainer.data.reading import Failed, mixed_seed, read_batch, seeded
from trainer.errors import ConfigError

Pair = namedtuple("Pair", "x y")  # what a data set may hold


@given(samples=st.integers(2, 300), ranks=st.integers(1, 8), planned=st.lists(st.integers(2, 40), min_size=1))
def test_shards_of_a_data_set_end_together_with_every_sample_trained(
    samples: int, ranks: int, planned: list[int]
) -> None:
    samples = max(samples, ranks)
    left, trained, step = shard_sizes(samples, ranks), [0] * ranks, 0
    while sizes := step_sizes(left, planned[step % len(planned)]):
        assert max(sizes) <= planned[step % len(planned)]
        left = [each - size for each, size in zip(left, sizes, strict=True)]
        trained = [each + size for each, size in zip(trained, sizes, strict=True)]
        step += 1
    assert sum(trained) == samples


@given(
    left=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    planned=st.integers(1, 30),
    uneven=st.sampled_from(["stop", "go_on"]),
)
def test_steps_are_counted_as_they_come(left: list[int], planned: int, uneven: Any) -> None:
    count, rest = 0, list(left)
    while sizes := step_sizes(rest, planned, uneven):
        rest = [each - size for each, size in zip(rest, sizes, strict=True)]
        count += 1
    assert count_steps(left, planned, uneven) == count


def test_a_batch_sampler_follows_the_plan_as_it_draws() -> None:
    sizes = iter([3, 3, 5, 5, 5, 5, 5, 5])
    passes = iter(range(9))
    sampler = PlannedBatches(41, 1, 2, seed=0, planned=lambda: next(sizes), next_pass=lambda: next(passes))
    first = list(iter(sampler))  # list(sampler) would ask for its length
    assert [len(batch) for batch in first] == [3, 3, 5, 5, 4]
    sampler.begin(0, [21 - 6, 20 - 6])
    sizes = iter([5] * 9)
    assert list(iter(sampler)) == first[2:]
    with pytest.raises(ConfigError, match="too few for 2 ranks"):
        PlannedBatches(1, 0, 2, seed=0, planned=lambda: 1, next_pass=lambda: 0)


def test_reading_leaves_the_draws_of_training_alone() -> None:
    def drawn() -> tuple[float, ...]:
        return float(torch.rand(())), float(np.random.rand())

    def begin() -> None:
        random.seed(1), torch.manual_seed(1), np.random.seed(1)

    begin()
    expected = [drawn() for _ in range(2)]
    begin()
    found = [drawn()]
    with seeded(7):
        inside = drawn(), random.random()
    found.append(drawn())
    after = random.random()
    assert found == expected
    begin()
    torch.rand(9)
    with seeded(7):
        assert (drawn(), random.random()) == inside
    assert random.random() == after  # it follows from what training had seeded


@settings(max_examples=50)
@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5), st.integers(0, 4))
def test_seeds_depend_on_every_number(numbers: list[int], place: int) -> None:
    other = list(numbers)
    other[place % len(numbers)] += 1
    assert mixed_seed(*numbers) != mixed_seed(*other)
    assert 0 <= mixed_seed(*numbers) < 2**64


def test_the_length_of_a_batch_is_its_first_tensors() -> None:
    three = torch.zeros(3, 2)
    assert length((three, torch.zeros(4))) == 3
    assert length({"text": ["a", "b", "c"], "y": three}) == 3
    assert length(["a", "b"]) == 2
    assert length([torch.tensor(1.0), np.zeros((5, 2))]) == 5
    assert length(torch.tensor(1.0)) is None
    assert length(object()) is None
    doubled = mapped(Pair(three + 1, {"z": [three, "s"]}), lambda leaf: leaf * 2)
    assert isinstance(doubled, Pair)
    assert doubled.y["z"][1] == "ss"
    assert float(doubled.x.sum()) == 12
    assert nbytes([three, ("a", three)]) == 48
    assert len(list(leaves(Pair(1, [2, (3, "x")])))) == 3


def test_tensors_are_picked_at_once_and_give_what_collating_items_gives() -> None:
    items = TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6))
    places = np.array([4, 0, 2])
    at_once, one_by_one = read_batch(items, places, 0, None), read_batch([*items], places, 0, None)
    for a, b in zip(at_once, one_by_one, strict=True):
        assert torch.equal(a, b)


def test_an_item_that_cannot_be_read_is_named() -> None:
    failed = read_batch([(torch.zeros(1), 0)] * 3, np.array([0, 1, 5]), 0, None)
    assert isinstance(failed, Failed)
    assert "dataset[5] raised IndexError" in failed.message
    assert "len() says 3" in failed.message
