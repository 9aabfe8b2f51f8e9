"""Where a pass's batches come from: items read by index, a stream of items, or a DataLoader's own batches."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, IterableDataset

from trainer.data.nested import length, nbytes
from trainer.data.planned import PlannedBatches, Worlds, dealt_order, pass_order, shard_sizes
from trainer.data.reading import BatchReader, Collate, Failed, Reading, dead_worker, mixed_seed, one_line, put_together
from trainer.errors import ConfigError, DataError

LOOK_AHEAD_BYTES = 2**28
"""Read ahead at most, besides what the next step needs."""
UNKNOWN = -1
"""Samples of a batch that has no length."""
Sizes = Callable[[], Iterator[int]]


@dataclass(frozen=True)
class Place:
    """Who reads: a rank among all, the device that batches go to, and the seed of sharding and order."""

    rank: int
    ranks: int
    device: torch.device
    seed: int


class Supply(Protocol):
    """One rank's source of a pass."""

    kind: str
    """In words for people; the same on every rank."""
    length: int
    """Of the whole data set, or UNKNOWN."""
    by_samples: bool
    """Batches are cut as planned; else they come as they are."""

    @property
    def left(self) -> list[int]:
        """Sizes of what is known to be left: one number of samples, or one a batch."""

    @property
    def ended(self) -> bool:
        """Nothing follows what is left."""

    def begin(self, number: int, consumed: int, past: Worlds = ()) -> None:
        """Begin pass `number` after so much of it (samples or batches), in the last of the worlds that it went
        through."""

    def look_ahead(self, steps: int, planned: int) -> None:
        """Know of so many batches to come, where there are as many."""

    def take(self, count: int, coming: Sizes) -> Any:
        """The next batch: of `count` samples, or as it is; `coming` makes the sizes that follow, this one first."""

    def close(self) -> None:
        """Let go of what was read ahead."""


def open_supply(data: Any, place: Place, *, collate: Collate | None, workers: int, shard: bool) -> Supply:
    """The supply for whatever a user has.

    Raises:
        ConfigError: nothing to train from, or arguments that do not go with it.
    """
    if isinstance(data, DataLoader):
        _own_loader_takes_no("collate_fn", collate is not None)
        _own_loader_takes_no("workers", workers > 0)
        return PlannedLoader(data) if isinstance(data.batch_sampler, PlannedBatches) else LoaderSupply(data)
    refuse_what_is_no_data_set(data)
    streams = isinstance(data, IterableDataset) or not (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    if not streams:
        return MapSupply(data, place, collate, workers, shard)
    if workers:
        raise ConfigError(
            f"workers = {workers}: iterable data is read in the training process; "
            "make a DataLoader of your own for reading processes"
        )
    return StreamSupply(data, collate)


def _own_loader_takes_no(name: str, given: bool) -> None:
    if given:
        raise ConfigError(f"{name}: a DataLoader has its own; set it there")


def refuse_what_is_no_data_set(data: Any) -> None:
    """Refuse what would be taken for samples and is none.

    Raises:
        ConfigError: names the kind, and what to pass.
    """
    if isinstance(data, Mapping | str | bytes):
        raise ConfigError(f"dataset = a {type(data).__name__}: pass a data set whose items are samples")
    pair = isinstance(data, tuple) and 1 < len(data) <= 4 and all(isinstance(each, torch.Tensor) for each in data)
    if pair and len({len(each) if each.dim() else 0 for each in data}) == 1:
        raise ConfigError("dataset = a tuple of tensors: pass torch.utils.data.TensorDataset(*tensors)")
    known = any(hasattr(data, name) for name in ("__getitem__", "__iter__", "__next__"))
    if not known and not callable(data):
        raise ConfigError(
            f"dataset = {type(data).__name__}: pass a data set, a DataLoader, an iterable, or a function that makes one"
        )


class MapSupply:
    """This rank's share of a data set that is read by index, in batches of any size.

    Args:
        shard: share it out by rank; else all of it is this rank's.
    """

    kind = "data set"
    by_samples = True
    ended = True

    def __init__(self, items: Any, place: Place, collate: Collate | None, workers: int, shard: bool) -> None:
        try:
            self.length = len(items)
        except Exception as error:
            raise ConfigError(f"len(dataset) raised {one_line(error)}") from error
        if not self.length:
            raise ConfigError("dataset is empty: len() says 0")
        self._items, self._place, self._collate, self._workers = items, place, collate, workers
        self._shared = shard
        self._size = shard_sizes(self.length, place.ranks)[place.rank] if shard else self.length
        self._reader: BatchReader | None = None
        self._consumed = 0

    def begin(self, number: int, consumed: int, past: Worlds = ()) -> None:
        place = self._place
        if self._shared:
            order = dealt_order(self.length, place.rank, place.ranks, place.seed, number, past)
        else:
            order = pass_order(self.length, place.seed, place.rank, number)
        self._size = len(order)
        reading = Reading(self._items, order, mixed_seed(place.seed, 4, place.rank, number), self._collate)
        self._reader = BatchReader(reading, self._workers, pin=place.device.type == "cuda")
        self._consumed = consumed

    @property
    def left(self) -> list[int]:
        return [max(0, self._size - self._consumed)]

    def look_ahead(self, steps: int, planned: int) -> None:
        pass

    def take(self, count: int, coming: Sizes) -> Any:
        assert self._reader is not None
        batch = self._reader.read(self._consumed, count, coming)
        self._consumed += count
        return batch

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()


class StreamSupply:
    """Items in the order that they come, cut into batches as planned; the stream is this rank's own."""

    kind = "stream"
    by_samples = True
    length = UNKNOWN

    def __init__(self, data: Any, collate: Collate | None) -> None:
        self._data, self._collate = data, collate
        self.once = hasattr(data, "__next__")
        """It can be read once only."""
        if self.once:
            self.kind = "generator"
        self._items: Iterator[Any] = iter(())
        self._held: deque[Any] = deque()
        self._item_bytes = 0
        self.ended = False

    def begin(self, number: int, consumed: int, past: Worlds = ()) -> None:
        try:
            source = self._data if hasattr(self._data, "__iter__") or self.once else self._data()
            self._items = iter(source)
        except Exception as error:
            raise DataError(f"the iterable data raised {one_line(error)} when it began") from error
        self._held.clear()
        self.ended = False
        for _ in range(consumed):
            self._pull()
            if self._held:
                self._held.popleft()

    @property
    def left(self) -> list[int]:
        return [len(self._held)]

    def look_ahead(self, steps: int, planned: int) -> None:
        wanted = steps * planned
        while not self.ended and len(self._held) < wanted:
            self._pull()
            wanted = min(wanted, max(planned, LOOK_AHEAD_BYTES // max(self._item_bytes, 1)))

    def _pull(self) -> None:
        try:
            item = next(self._items)
        except StopIteration:
            self.ended = True
            return
        except Exception as error:
            raise DataError(f"the iterable data raised {one_line(error)}") from error
        self._item_bytes = self._item_bytes or nbytes(item)
        self._held.append(item)

    def take(self, count: int, coming: Sizes) -> Any:
        batch = put_together([self._held.popleft() for _ in range(count)], self._collate)
        if isinstance(batch, Failed):
            raise batch.error()
        return batch

    def close(self) -> None:
        self._items = iter(())
        self._held.clear()


class LoaderSupply:
    """A DataLoader's own batches, as they are; the loader reads what is this rank's own."""

    kind = "DataLoader"
    by_samples = False
    length = UNKNOWN

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self._batches: Iterator[Any] = iter(())
        self._held: deque[Any] = deque()
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self.ended = False

    def begin(self, number: int, consumed: int, past: Worlds = ()) -> None:
        self._batches = guarded_batches(self._loader)
        self._held.clear()
        self._sizes.clear()
        self.ended = False
        for _ in range(consumed):
            next(self._batches, None)

    @property
    def left(self) -> list[int]:
        return list(self._sizes)

    def look_ahead(self, steps: int, planned: int) -> None:
        while not self.ended and len(self._held) < steps:
            if self._held and len(self._held) * self._bytes > LOOK_AHEAD_BYTES:
                return
            try:
                batch = next(self._batches)
            except StopIteration:
                self.ended = True
                return
            count = length(batch)
            self._held.append(batch)
            self._sizes.append(UNKNOWN if count is None else count)
            self._bytes = self._bytes or nbytes(batch)

    def take(self, count: int, coming: Sizes) -> Any:
        self._sizes.popleft()
        return self._held.popleft()

    def close(self) -> None:
        self._batches = iter(())
        self._held.clear()
        self._sizes.clear()


class PlannedLoader:
    """A DataLoader over PlannedBatches: every rank knows the sizes of all ranks' batches without a message."""

    kind = "DataLoader of batch_sampler"
    by_samples = False
    ended = False

    def __init__(self, loader: DataLoader[Any]) -> None:
        assert isinstance(loader.batch_sampler, PlannedBatches)
        self._loader, self._sampler = loader, loader.batch_sampler
        self.length, self.seed = self._sampler.samples, self._sampler.seed
        self._batches: Iterator[Any] = iter(())

    @property
    def left(self) -> list[int]:
        return []

    def begin_with(self, number: int, left: list[int] | None, place: Place, past: Worlds = ()) -> list[int]:
        """Begin pass `number` with so many samples left on each rank; what is left."""
        told = self._sampler.begin(number, left, (place.rank, place.ranks), past)
        self._batches = guarded_batches(self._loader)
        return told

    def begin(self, number: int, consumed: int, past: Worlds = ()) -> None:
        raise AssertionError("begun by begin_with")

    def look_ahead(self, steps: int, planned: int) -> None:
        pass

    def next_batch(self) -> tuple[Any, list[int]] | None:
        """The next batch and its samples on every rank; None at the end."""
        try:
            batch = next(self._batches)
        except StopIteration:
            return None
        return batch, self._sampler.drawn.popleft()

    def take(self, count: int, coming: Sizes) -> Any:
        raise AssertionError("taken by next_batch")

    def close(self) -> None:
        self._batches = iter(())


def guarded_batches(loader: DataLoader[Any]) -> Iterator[Any]:
    """A loader's batches; its errors in one line.

    Raises:
        DataError: what the loader raised.
    """
    try:
        yield from loader
    except Exception as error:
        gone = isinstance(error, ConnectionError | EOFError)
        if gone or "exited unexpectedly" in str(error) or "pickle" in str(error):
            raise dead_worker(error) from error
        raise DataError(f"the DataLoader raised {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """An error in one line; of one from a reading process, the line with its type."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].startswith("Caught "):
        named = [line for line in lines[1:] if re.match(r"[A-Za-z_][\w.]*: ", line)]
        return (named or lines)[-1].strip()
    return one_line(error)
