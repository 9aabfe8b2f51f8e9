"""This rank's shard as a stream of samples, cut into batches of any size; its whole state is a count of samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainer.config.config import DataConfig
from trainer.data.deal import Deal, Past, permuted
from trainer.data.nested import put
from trainer.data.partition import Indices
from trainer.data.reading import Failed, as_it_is, dead_worker, mixed_seed, read_batch
from trainer.data.sets import DataPart, open_part
from trainer.data.transform import Transform
from trainer.distributed.world import World

Batch = tuple[Any, Any]
CHUNK = 16
"""Samples that a reading process hands over at once; batches are put together from them."""
AHEAD = 2
"""Batches that reading processes are ahead."""


class Order:
    """The endless order of a shard's samples: one permutation an epoch, a pure function of the position.

    Before the shard there may be a lead, what was left of earlier epochs, which is read once and in order.
    """

    def __init__(self, size: int, seed: int, rank: int, lead: int = 0, first_epoch: int = 0) -> None:
        self.size = size
        self.seed, self.rank = seed, rank
        self.lead, self.first_epoch = lead, first_epoch
        self._permutation = lru_cache(maxsize=2)(self._permute)

    def _permute(self, epoch: int) -> Indices:
        return self.lead + permuted(self.size, self.seed, self.rank, self.first_epoch + epoch)

    def places(self, start: int, count: int) -> Indices:
        """Places within the lead and the shard at positions start .. start + count - 1."""
        parts, position, end = [], start, start + count
        if position < self.lead:
            parts.append(np.arange(position, min(end, self.lead)))
            position += len(parts[0])
        while position < end:
            epoch, offset = divmod(position - self.lead, self.size)
            part = self._permutation(epoch)[offset : offset + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def __getstate__(self) -> tuple[int, ...]:  # reading processes cache their own permutations
        return self.size, self.seed, self.rank, self.lead, self.first_epoch

    def __setstate__(self, state: tuple[int, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]  # the same fields as from the constructor


class ShardStream:
    """Batches of one rank's shard, of the size asked for at each step.

    In one epoch every sample of the shard is read exactly once, whatever sizes followed one another: a batch at an
    epoch's end is filled up from the next. `consumed` (samples handed out) is all that a resume needs.

    Args:
        shard: this rank's samples, and no others.
    """

    def __init__(self, shard: DataPart, config: DataConfig, world: World, seed: int) -> None:
        self.past: Past = ()
        """The worlds that read before, each with what its ranks read."""
        self.transform = Transform.of(shard, config, world.device, train=True)
        self._config, self._world = config, world
        self._open(shard, Order(len(shard), seed, world.rank))

    def _open(self, shard: DataPart, order: Order) -> None:
        self.consumed = 0
        self._order = order
        tensors = self._config.on_device and isinstance(shard.items, TensorDataset)
        reader = TensorReader if tensors else LoaderReader
        self._reader: TensorReader | LoaderReader = reader(shard.items, order, self._config, self._world.device)

    def deal_anew(self, whole: DataPart, past: Past) -> None:
        """Read this rank's share of what is left after these worlds, and then its shard.

        Args:
            whole: the data set, of which only that is kept.
            past: ranks, and samples that each of them read; the first world first.
        """
        rank = self._world.rank
        deal = Deal.of(len(whole), self._world.size, self._order.seed, past)
        shard, lead = deal.shards[rank], [part for _, part in deal.leads[rank]]
        self.close()
        count = sum(map(len, lead))
        order = Order(len(shard), self._order.seed, rank, count, deal.first_epoch)
        self._open(whole.subset(np.concatenate([*lead, shard])), order)
        self.past = past

    def regroup(self, world: World, past: Past) -> None:
        """Read on in another world, from the beginning of this rank's share of what is left after these."""
        self._world = world
        self.deal_anew(open_part(self._config, train=True, seed=self._order.seed), past)

    def take(self, count: int) -> Batch:
        """The next `count` samples: inputs [count, ...] ready for the model, labels [count]."""
        inputs, labels = self._reader.read(self.consumed, count)
        inputs = self.transform(inputs, seed=(self._order.seed, self._order.rank, self.consumed))
        self.consumed += count
        return inputs, labels

    def sample_inputs(self, count: int, batch: int) -> Iterator[Any]:
        """The first `count` inputs of the shard, unaugmented and without moving the stream (for calibration)."""
        held = self._order.lead + self._order.size
        for start in range(0, min(count, held), batch):
            places = np.arange(start, min(start + batch, count, held))
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
class _Chunks:
    """A data set asked for chunks of the stream; its own random transforms depend on the chunk's number alone."""

    items: Any
    order: Order

    def __getitem__(self, number: int) -> Any:
        places = self.order.places(number * CHUNK, CHUNK)
        return read_batch(self.items, places, mixed_seed(self.order.seed, 4, self.order.rank, number), None)


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
        self._ahead = 0

    def read(self, start: int, count: int) -> Batch:
        self._prepare(start, count)
        parts = [self._rest] if self._rest is not None else []
        while sum(len(labels) for _, labels in parts) < count:
            parts.append(self._next())
        inputs, labels = (torch.cat(tensors) if len(parts) > 1 else tensors[0] for tensors in zip(*parts, strict=True))
        self._rest = (inputs[count:], labels[count:]) if len(labels) > count else None
        first, second = put((inputs[:count], labels[:count]), self._device)
        return first, second

    def at(self, places: Indices) -> Batch:
        picked = read_batch(self._items, places, 0, None)
        if isinstance(picked, Failed):
            raise picked.error()
        first, second = put(picked, self._device)
        return first, second

    def close(self) -> None:
        self._chunks, self._rest = None, None

    def _prepare(self, start: int, count: int) -> None:
        """Have chunks come from `start` on, read as far ahead as batches of this size need."""
        needed = AHEAD * -(-count // CHUNK)
        if self._chunks is not None and (needed <= self._ahead or not self._workers):
            return
        self._ahead = max(needed, 4 * self._workers)
        self._chunks = iter(self._loader(start // CHUNK))
        self._rest = None
        if passed := start % CHUNK:  # a chunk is read whole, so that its random draws repeat
            inputs, labels = self._next()
            self._rest = inputs[passed:], labels[passed:]

    def _next(self) -> Batch:
        assert self._chunks is not None
        try:
            chunk = next(self._chunks)
        except Exception as error:
            raise dead_worker(error) from error
        if isinstance(chunk, Failed):
            raise chunk.error()
        inputs, labels = chunk
        return inputs, labels

    def _loader(self, first_chunk: int) -> DataLoader[Any]:
        return DataLoader(
            _Chunks(self._items, self._order),  # type: ignore[arg-type]  # map-style by its __getitem__
            batch_size=None,
            sampler=_Endless(first_chunk),
            num_workers=self._workers,
            collate_fn=as_it_is,
            prefetch_factor=-(-self._ahead // self._workers) if self._workers else None,
            generator=torch.Generator(),  # of its own: a reader that starts anew must not draw from training's
        )


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
