"""Shards that are disjoint and complete; epochs that read every sample once, whatever the batch sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numbered import Numbers, stream
from torch.utils.data import TensorDataset

from trainer.config.config import DataConfig
from trainer.data import DataPart, Transform, open_part, shard_of, split_evenly
from trainer.data.sets import fake
from trainer.distributed.world import World
from trainer.errors import ConfigError


@given(samples=st.integers(1, 200), shards=st.integers(1, 12), seed=st.integers(0, 2**40))
def test_iid_shards_are_disjoint_complete_and_even(samples: int, shards: int, seed: int) -> None:
    if shards > samples:
        with pytest.raises(ConfigError, match=f"too few for {shards} ranks"):
            shard_of("iid", samples, shards, 0, seed)
        return
    parts = [shard_of("iid", samples, shards, rank, seed) for rank in range(shards)]
    assert sorted(itertools.chain(*parts)) == list(range(samples))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("tensors", [True, False])
@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), cut=st.integers(0, 30))
def test_an_epoch_reads_every_sample_once_across_batch_sizes_and_a_resume(
    tensors: bool, sizes: list[int], cut: int
) -> None:
    shard = set(shard_of("iid", 61, 3, 1, seed=3).tolist())
    read: list[int] = []
    current = stream(61, 3, 1, tensors=tensors)
    for index, size in enumerate(sizes):
        if index == cut:  # as a killed and resumed run would: a new stream from the saved count alone
            consumed, current = current.consumed, stream(61, 3, 1, tensors=tensors)
            current.seek(consumed)
        inputs, labels = current.take(size)
        assert inputs.shape == (size, 1)
        assert inputs[:, 0].tolist() == labels.tolist()
        read += labels.tolist()
    for start in range(0, len(read) - len(shard) + 1, len(shard)):
        assert set(read[start : start + len(shard)]) == shard
    assert len(set(read[-(len(read) % len(shard)) :])) == (len(read) % len(shard) or min(len(read), len(shard)))


def test_shards_of_two_nodes_follow_the_global_rank() -> None:
    nodes = [World(rank=rank, size=4, local_rank=rank % 2, local_size=2, node=rank // 2) for rank in range(4)]
    shards = [set(shard_of("iid", 40, world.size, world.rank, 0).tolist()) for world in nodes]
    assert set.union(*shards) == set(range(40))
    assert sum(map(len, shards)) == 40


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_test_set_is_split_without_padding(size: int) -> None:
    part = fake(50, train=False)
    transform = Transform.of(part, DataConfig(), torch.device("cpu"), train=False)
    labels = [
        label
        for rank in range(size)
        for _, batch in split_evenly(part, World(rank=rank, size=size), 7, transform)
        for label in batch.tolist()
    ]
    assert sorted(labels) == sorted(part.items.tensors[1].tolist())


def test_augmentation_shifts_and_mirrors_and_repeats_by_its_seed() -> None:
    part = DataPart(TensorDataset(torch.zeros(1, 1, 6, 6, dtype=torch.uint8), torch.zeros(1)), 1, (0.0,), (1 / 255,))
    transform = Transform.of(part, DataConfig(crop_padding=2, flip=True), torch.device("cpu"), train=True)
    picture = torch.zeros(64, 1, 6, 6, dtype=torch.uint8)
    picture[:, 0, 2, 1] = 200
    once, again, other = (transform(picture, seed=(seed, 1)) for seed in (1, 1, 2))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    places = {tuple(place) for place in once.nonzero()[:, 2:].tolist()}
    rows, columns = {row for row, _ in places}, {column for _, column in places}
    assert rows == {0, 1, 2, 3, 4}  # 2 up to 2 pixels either way
    assert columns == {0, 1, 2, 3, 4, 5}  # 1 up to 2 either way, or mirrored from there
    assert torch.equal(once[once != 0].unique(), torch.tensor([200.0]))
    assert torch.equal(transform(picture), picture.float())


def test_normalised_by_channel() -> None:
    part = DataPart([], 1, (0.5, 0.25), (0.5, 0.25))
    transform = Transform.of(part, DataConfig(), torch.device("cpu"), train=False)
    pictures = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1)
    torch.testing.assert_close(transform(pictures).flatten(), torch.tensor([-1.0, 3.0]))


def test_limits_and_unknown_names() -> None:
    assert len(open_part(DataConfig(name="fake", train_limit=100), True, 0)) == 100
    own = DataConfig(name="test_data:make_numbers", test_limit=5)
    assert len(open_part(own, False, 0)) == 5
    for name, said in (("nope", "choose one of"), ("no.such:thing", "importable"), ("test_data:Numbers", "classes")):
        with pytest.raises(ConfigError, match=said):
            open_part(DataConfig(name=name, root="3"), True, 0) if name != "test_data:Numbers" else open_part(
                DataConfig(name="test_data:unlabelled"), True, 0
            )
    with pytest.raises(ConfigError, match=r"python -m trainer\.data cifar10"):
        open_part(DataConfig(name="cifar10", root="nowhere"), True, 0)
    with pytest.raises(ConfigError, match="train/ and val/"):
        open_part(DataConfig(name="imagefolder", root="nowhere"), True, 0)
    with pytest.raises(ConfigError, match=r"choose one of .*iid"):
        shard_of("nope", 10, 2, 0, 0)


def make_numbers(root: str, train: bool) -> Numbers:
    found = Numbers(20 if train else 10)
    found.classes = 20  # type: ignore[attr-defined]
    return found


def unlabelled(root: str, train: bool) -> Numbers:
    return Numbers(20)
