"""This rank's shard as a stream of samples, cut into batches of any size; its whole state is a count of samples."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainer.config.config import DataConfig
from trainer.data.partition import Indices, shard_of
from trainer.data.sets import DataPart
from trainer.data.transform import Transform
from trainer.distributed.world import World

Batch = tuple[Any, Any]
CHUNK = 16  # samples that a reading process hands over at once; batches are put together from them


class Order:
    """The endless order of a shard's samples: one permutation an epoch, a pure function of the position."""

    def __init__(self, size: int, seed: int, rank: int) -> None:
        self.size = size
        self.seed, self.rank = seed, rank
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> Indices:
        return np.random.default_rng([self.seed, 3, self.rank, epoch]).permutation(self.size)

    def places(self, start: int, count: int) -> Indices:
        """Places within the shard at positions start .. start + count - 1."""
        parts, position, end = [], start, start + count
        while position < end:
            epoch, offset = divmod(position, self.size)
            part = self._permutation(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def __getstate__(self) -> tuple[int, int, int]:  # reading processes cache their own permutations
        return self.size, self.seed, self.rank

    def __setstate__(self, state: tuple[int, int, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]  # the same fields as from the constructor


class ShardStream:
    """Batches of one rank's shard, of the size asked for at each step.

    In one epoch every sample of the shard is read exactly once, whatever sizes followed one another: a batch at an
    epoch's end is filled up from the next. `consumed` (samples handed out) is all that a resume needs.

    Args:
        shard: this rank's samples, and no others.
    """

    def __init__(self, shard: DataPart, config: DataConfig, world: World, seed: int) -> None:
        self.consumed = 0
        self.transform = Transform.of(shard, config, world.device, train=True)
        self._order = Order(len(shard), seed, world.rank)
        tensors = config.on_device and isinstance(shard.items, TensorDataset)
        reader = TensorReader if tensors else LoaderReader
        self._reader: TensorReader | LoaderReader = reader(shard.items, self._order, config, world.device)

    @classmethod
    def of(cls, dataset: Any, world: World, *, seed: int = 0) -> ShardStream:
        """The stream of this rank's share of a user's own data set, for a loop of his own."""
        mine = shard_of("iid", len(dataset), world.size, world.rank, seed)
        return cls(DataPart(dataset, classes=0).subset(mine), DataConfig(workers=0), world, seed)

    def take(self, count: int) -> Batch:
        """The next `count` samples: inputs [count, ...] ready for the model, labels [count]."""
        inputs, labels = self._reader.read(self.consumed, count)
        inputs = self.transform(inputs, seed=(self._order.seed, self._order.rank, self.consumed))
        self.consumed += count
        return inputs, labels

    def sample_inputs(self, count: int, batch: int) -> Iterator[Any]:
        """The first `count` inputs of the shard, unaugmented and without moving the stream (for calibration)."""
        for start in range(0, min(count, self._order.size), batch):
            places = np.arange(start, min(start + batch, count, self._order.size))
            yield self.transform(self._reader.at(places)[0])

    def seek(self, consumed: int) -> None:
        """Go on after `consumed` samples."""
        self.consumed = consumed
        self._reader.close()

    def close(self) -> None:
        """End reading processes."""
        self._reader.close()


class TensorReader:
    """A shard held on the device as it is stored (uint8 pictures)."""

    def __init__(self, items: TensorDataset, order: Order, config: DataConfig, device: torch.device) -> None:
        self._order = order
        self._inputs, self._labels = (tensor.to(device) for tensor in items.tensors)

    def read(self, start: int, count: int) -> Batch:
        return self.at(self._order.places(start, count))

    def at(self, places: Indices) -> Batch:
        chosen = torch.from_numpy(places).to(self._inputs.device)
        return self._inputs[chosen], self._labels[chosen]

    def close(self) -> None:
        pass


@dataclass
class _Positioned:
    """A data set asked by position in the stream; its own random transforms depend on the position alone."""

    items: Any
    order: Order

    def __getitem__(self, position: int) -> Any:
        place = int(self.order.places(position, 1)[0])
        mixed = int(np.random.SeedSequence([self.order.seed, 4, self.order.rank, position]).generate_state(1)[0])
        with kept_random_state():  # where no process of its own reads, training draws from the same states
            random.seed(mixed)
            np.random.seed(mixed % 2**32)
            torch.default_generator.manual_seed(mixed)
            return self.items[place]


class LoaderReader:
    """A shard read through a DataLoader.

    Reading processes prefetch small chunks in the stream's order, which no batch size changes; so a new batch size
    holds from the very next step, and what was prefetched is neither lost nor read twice.
    """

    def __init__(self, items: Any, order: Order, config: DataConfig, device: torch.device) -> None:
        self._items, self._order, self._device = items, order, device
        self._workers = config.workers
        self._chunks: Iterator[Any] | None = None
        self._rest: Batch | None = None

    def read(self, start: int, count: int) -> Batch:
        if self._chunks is None:
            self._chunks = iter(self._loader(start))
        parts = [self._rest] if self._rest is not None else []
        while sum(len(labels) for _, labels in parts) < count:
            parts.append(next(self._chunks))
        inputs, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self._rest = (inputs[count:], labels[count:]) if len(labels) > count else None
        return self._put(inputs[:count]), self._put(labels[:count])

    def at(self, places: Indices) -> Batch:
        picked = torch.utils.data.default_collate([self._items[int(place)] for place in places])
        return self._put(picked[0]), self._put(picked[1])

    def close(self) -> None:
        self._chunks, self._rest = None, None

    def _loader(self, start: int) -> DataLoader[Any]:
        return DataLoader(
            _Positioned(self._items, self._order),  # type: ignore[arg-type]  # map-style by its __getitem__
            batch_size=CHUNK,
            sampler=_Endless(start),
            num_workers=self._workers,
            prefetch_factor=4 if self._workers else None,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # of its own: a reader that starts anew must not draw from training's
        )

    def _put(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


@dataclass
class _Endless(torch.utils.data.Sampler[int]):
    start: int

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


def split_evenly(
    part: DataPart, world: World, batch: int, transform: Transform, workers: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's part of a test set, in order: every sample on exactly one rank, none padded, none twice."""
    mine = part.subset(np.arange(world.rank, len(part), world.size))
    if isinstance(mine.items, TensorDataset):
        batches: Iterable[Any] = (mine.items[start : start + batch] for start in range(0, len(mine), batch))
    else:
        batches = DataLoader(mine.items, batch, num_workers=workers, generator=torch.Generator())
    for inputs, labels in batches:
        yield transform(inputs.to(world.device)), labels.to(world.device)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put every host random state back as it was."""
    host = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(host[0])
    np.random.set_state(host[1])
