"""Data of every kind: nested items, streams, loaders; and mistakes that are said in one line on every rank."""

from __future__ import annotations

import os
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import RankError, fork_readers, run
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from trainer import Constant, LocalSGD, Plan
from trainer.distributed.world import World
from trainer.errors import ConfigError, DataError

Pair = namedtuple("Pair", "x y")


class Items(Dataset[Any]):
    """Items made by a function of their index."""

    def __init__(self, make: Callable[[int], Any], size: int = 24, says: int | None = None) -> None:
        self.make, self.size, self.says = make, size, says

    def __len__(self) -> int:
        return self.says or self.size

    def __getitem__(self, index: int) -> Any:
        if index >= self.size:
            raise IndexError(f"only {self.size}")
        return self.make(index)


class Endless(IterableDataset[Any]):
    """Never ends."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.ones(3), 1


class Word:
    """No tensor, no number."""


def began(world: World, batch: int = 4, period: int = 2) -> LocalSGD:
    model = nn.Linear(3, 1)
    return LocalSGD(model, torch.optim.SGD(model.parameters(), 1e-4), Constant(Plan(batch, period)), world=world)


def step(sync: LocalSGD, samples: int | None = None) -> None:
    sync.optimizer.zero_grad()
    loss = sync.model(torch.ones(2, 3)).square().mean()
    loss.backward()
    sync.optimizer.step()
    sync.step(loss, samples)


KINDS: dict[str, tuple[Callable[[int], Any], Any]] = {
    "one": (lambda i: torch.ones(3), None),
    "three": (lambda i: (torch.ones(3), 1.0, i), None),
    "dict": (lambda i: {"x": torch.ones(3), "y": i, "text": "a"}, None),
    "named": (lambda i: Pair(np.ones(3, dtype=np.float32), i), None),
    "strings": (lambda i: ("text", torch.ones(3)), None),
    "floats": (lambda i: float(i), None),
    "nested": (lambda i: ({"ids": torch.ones(3), "deep": [i, (torch.ones(2), "s")]}, 1), None),
    "objects": (lambda i: Word(), lambda items: items),
    "ragged": (lambda i: torch.ones(i + 1), lambda items: nn.utils.rnn.pad_sequence(items, batch_first=True)),
    "no length": (lambda i: Word(), lambda items: Word()),
}


def kinds(world: World) -> dict[str, tuple[list[str], int]]:
    found = {}
    for name, (make, collate) in KINDS.items():
        with began(world) as sync:
            batches = []
            for batch in sync.batches(Items(make), collate_fn=collate):
                batches.append(type(batch).__name__)
                step(sync)
            found[name] = batches, sync.samples
    with began(world) as sync:
        x, y = next(iter(sync.batches(Items(lambda i: (torch.full((3,), i, dtype=torch.uint8), "s")))))
        assert x.dtype == torch.uint8, "a user's bytes are his own"
        assert y == ["s"] * 4 or y == ("s",) * 4
    return found


def test_items_of_any_kind_become_batches_with_a_count() -> None:
    for found in run(2, kinds):
        assert {samples for _, samples in found.values()} == {24}
        assert found["named"][0] == ["Pair"] * 3
        assert found["dict"][0] == ["dict"] * 3


def numbered(index: int) -> Any:
    return torch.ones(3), index


def streams_and_loaders(world: World) -> list[Any]:
    fork_readers()
    with began(world) as sync:
        for number, batch in enumerate(sync.batches(Endless())):
            step(sync)
            if number == 4:
                counted = [sync.samples, len(batch[0])]
                break
        for _ in sync.batches(Endless(), samples=100):
            step(sync)
        counted.append(sync.samples)
    ones = Items(numbered, 20)
    with began(world) as sync, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            for x, _y in sync.batches(DataLoader(ones, batch_size=5, num_workers=1)):
                step(sync)
                counted.append(len(x))
        loader = DataLoader(ones, batch_sampler=sync.batch_sampler(ones), num_workers=1)
        planned: list[list[int]] = []
        for data in (sync.batches(loader), sync.batches(loader), loader):
            read = []
            for x, y in data:
                step(sync, len(x))
                read += y.tolist()
            planned.append(read)
        told = [str(each.message) for each in said if "DataLoader gives" in str(each.message)]
        with pytest.raises(ConfigError, match="collate_fn: a DataLoader has its own"):
            next(iter(sync.batches(loader, collate_fn=list)))
        lone = DataLoader(Items(lambda i: Word()), batch_size=None, collate_fn=lambda item: item)
        for _ in sync.batches(lone):
            with pytest.raises(ValueError, match=r"pass sync.step\(loss, samples="):
                step(sync)
            break
    return [counted, told, planned]


def test_streams_follow_the_plan_and_loaders_come_as_they_are_unless_they_sample_by_it() -> None:
    both = run(2, streams_and_loaders)
    for counted, told, _ in both:
        assert counted == [40, 4, 100, *[5] * 8]
        assert len(told) == 1
        assert "batches of 5 samples where the Plan has 4" in told[0]
    for first, second in zip(both[0][2], both[1][2], strict=True):
        assert sorted(first + second) == list(range(20))
    assert len({tuple(order) for order in both[0][2]}) == 3


# ---- mistakes


def broken_at(bad: int, index: int) -> Any:
    if index == bad:
        raise OSError("the disk\nis gone")
    return torch.ones(3)


def dying(index: int) -> Any:
    return os._exit(3) if index == 5 else torch.ones(3)


def failing_stream(rank: int) -> Iterator[Any]:
    for index in range(40):
        if rank == 1 and index == 21:
            raise KeyError("shard 7")
        yield torch.ones(3)


def mistakes(rank: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    fine = Items(lambda i: torch.ones(3))
    return {
        "empty": ([], {}),
        "one of two is empty": ([torch.ones(3)] if rank == 0 else [], {"shard": False}),
        "too few for the ranks": ([torch.ones(3)], {}),
        "len differs": (Items(lambda i: torch.ones(3), 20 + rank), {}),
        "pictures": (Items(lambda i: (Image.new("RGB", (3, 3)), i)), {}),
        "shapes": (Items(lambda i: torch.ones(i + 1)), {}),
        "len lies": (Items(lambda i: torch.ones(3), 24, says=99), {}),
        "item": (Items(partial(broken_at, 5)), {"shard": False}),
        "item in a worker": (Items(partial(broken_at, 5)), {"shard": False, "workers": 2}),
        "worker dies": (Items(dying), {"shard": False, "workers": 1}),
        "unpicklable": (Items(lambda i: torch.ones(3)), {"workers": 1}),
        "stream breaks": (failing_stream(rank), {}),
        "stream is empty on one": (iter([torch.ones(3)] * 30 * rank), {}),
        "collate": (fine, {"collate_fn": lambda items: items[99]}),
        "tensors": ((torch.ones(5, 3), torch.ones(5)), {}),
        "mapping": ({"x": [1, 2, 3]}, {}),
        "nothing": (3, {}),
        "uneven": (fine, {"uneven": "wait"}),
        "workers of a stream": (iter([1]), {"workers": 2}),
        "loader": (DataLoader(Items(partial(broken_at, 5)), batch_size=4, num_workers=1), {}),
    }


SAID = {
    "empty": "dataset is empty",
    "one of two is empty": "rank 1: dataset is empty",
    "too few for the ranks": "too few for 2 ranks",
    "len differs": "different lengths (20 on rank 0, 21 on rank 1): pass shard=False",
    "pictures": "collate_fn=",
    "shapes": "collate_fn=",
    "len lies": "its len() says 99",
    "item": "dataset[5] raised OSError: the disk",
    "item in a worker": "dataset[5] raised OSError: the disk",
    "worker dies": "a reading process died",
    "unpicklable": "cannot be sent to reading processes",
    "stream breaks": "rank 1: the iterable data raised KeyError: 'shard 7'",
    "stream is empty on one": "the generator gave nothing on rank 0; a generator is used up",
    "collate": "collate_fn raised IndexError",
    "tensors": "TensorDataset(*tensors)",
    "mapping": "pass a data set whose items are samples",
    "nothing": "pass a data set, a DataLoader",
    "uneven": "choose one of stop, go_on",
    "workers of a stream": "make a DataLoader of your own",
    "loader": "OSError: the disk",
}


def refused(world: World) -> dict[str, str]:
    found = {}
    for name, (data, options) in mistakes(world.rank).items():
        sync = began(world, period=100).__enter__()
        try:
            for _ in sync.batches(data, **options):
                step(sync)
            found[name] = "nothing"
        except (ConfigError, DataError) as error:
            found[name] = str(error)
            sync.__exit__(type(error), error, None)
    return found


def test_mistakes_are_said_in_one_line_on_every_rank() -> None:
    for found in run(2, refused):
        for name, said in SAID.items():
            assert said in found[name], (name, found[name])
            assert "\n" not in found[name], name


def lone_failure(world: World) -> None:
    with began(world, period=1) as sync:
        for _ in sync.batches(Items(partial(broken_at, 5), 60)):
            step(sync)


def test_one_ranks_failure_ends_the_others_at_once() -> None:
    with pytest.raises(RankError, match=r"dataset\[5\] raised OSError") as raised:
        run(2, lone_failure, timeout_s=60)
    assert "a peer went away" in str(raised.value)


def rates_with_a_loader(world: World) -> list[float]:
    """The rates of updates with a DataLoader's batches of 32 where the Plan has 8, and with the Plan's own."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[float] = []
    data = torch.utils.data.TensorDataset(torch.randn(64, 3))
    with warnings.catch_warnings(), LocalSGD(model, optimizer, Constant(8, 2, lr_scaling="sqrt"), world=world) as sync:
        warnings.simplefilter("ignore")
        optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
        for source in (torch.utils.data.DataLoader(data, 32), data):
            for (x,) in sync.batches(source):
                optimizer.zero_grad()
                loss = sync.model(x).square().mean()
                loss.backward()
                optimizer.step()
                sync.step(loss)
    return sorted(set(seen))


def test_the_rate_follows_the_batch_that_is_trained() -> None:
    for rates in run(2, rates_with_a_loader):
        assert rates == pytest.approx([0.1, 0.2])
