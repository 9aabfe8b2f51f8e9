"""Reading items of a map-style data set: a batch at a time, repeatable, and with errors that name the item."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator
from torch.utils.data import DataLoader, TensorDataset, default_collate, get_worker_info

from trainer.data.partition import Indices
from trainer.errors import ConfigError, DataError

Collate = Callable[[list[Any]], Any]
_MASK = 2**64 - 1
SEEDED_AT_FIRST = 4
"""Batches of a pass that are read with seeds even if they draw nothing."""
_NUMPY = np.random.MT19937(0)
"""Numpy's global generator while items are read in the training process."""


@dataclass(frozen=True)
class Failed:
    """Takes a batch's place where reading it failed, so that a reading process can tell in one line."""

    message: str
    setting: bool = False
    """The mend is an argument, not the data."""

    def error(self) -> Exception:
        """The error to raise in the training process."""
        return ConfigError(self.message) if self.setting else DataError(self.message)


def one_line(error: BaseException) -> str:
    """An error's type and the first line of its text."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0]}" if said else type(error).__name__


def mixed_seed(*numbers: int) -> int:
    """64 bits that depend on every number (the finalizer of SplitMix64, one round a number)."""
    state = 0
    for number in numbers:
        state = ((state ^ (number & _MASK)) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def _drawn() -> tuple[int, bytes, int]:
    """One draw of each random state."""
    return random.getrandbits(64), np.random.bytes(8), int(torch.randint(2**62, ()))


def untouched(seed: int) -> bool:
    """Inside `seeded`, at its end: nothing was drawn in it."""
    drawn = _drawn()
    _seed_all(seed)
    return drawn == _drawn()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random draws of a data set's transforms follow from `seed`, whatever was drawn before.

    In the training process the draws of training are kept apart: torch's and numpy's states are put back as they were.
    Python's own `random` goes on from a number drawn before, since saving its state takes longer than most reads.
    """
    if get_worker_info() is not None:
        _seed_all(seed)
        yield
        return
    training = random.getrandbits(64), get_bit_generator(), torch.default_generator.get_state()
    set_bit_generator(_NUMPY)
    try:
        _seed_all(seed)
        yield
    finally:
        random.seed(training[0])
        set_bit_generator(training[1])
        torch.default_generator.set_state(training[2])


def read_batch(items: Any, places: Indices, seed: int, collate: Collate | None) -> Any:
    """The items at these places as one batch, or Failed."""
    if collate is None and type(items) is TensorDataset:
        chosen = torch.from_numpy(places)
        return [tensor[chosen] for tensor in items.tensors]
    with seeded(seed):
        return read_plainly(items, places, collate)


def read_plainly(items: Any, places: Indices, collate: Collate | None) -> Any:
    """Like `read_batch`, with whatever random states there are."""
    found = read_items(items, places.tolist())
    return found if isinstance(found, Failed) else put_together(found, collate)


def read_items(items: Any, places: list[int]) -> list[Any] | Failed:
    """The items at these places, or Failed with the one that cannot be read."""
    place = places[0]
    at_once = callable(getattr(items, "__getitems__", None))
    try:
        if at_once:
            return list(items.__getitems__(places))
        found = []
        for place in places:  # not a comprehension: the place is named where it fails
            found.append(items[place])
        return found
    except DataError as error:  # it says all
        return Failed(str(error))
    except Exception as error:
        return _failed_item(items, places if at_once else [place], error)


def _failed_item(items: Any, places: list[int], error: Exception) -> Failed:
    """The one of these items that cannot be read."""
    failed = places[0]
    for place in places if len(places) > 1 else ():
        try:
            items[place]
        except Exception as its_own:
            failed, error = place, its_own
            break
    mend = f"; its len() says {len(items)}" if isinstance(error, IndexError) else ""
    return Failed(f"dataset[{failed}] raised {one_line(error)}{mend}")


def put_together(items: list[Any], collate: Collate | None) -> Any:
    """Items as one batch, or Failed."""
    if collate is not None:
        try:
            return collate(items)
        except Exception as error:
            return Failed(f"collate_fn raised {one_line(error)}")
    try:
        return default_collate(items)
    except Exception as error:
        kind = type(items[0])
        inner = {type(part).__name__ for part in items[0]} if isinstance(items[0], tuple | list) else {kind.__name__}
        return Failed(
            f"items of {', '.join(sorted(inner))} cannot be put together to a batch ({one_line(error)}): "
            "pass collate_fn=, or a transform that makes tensors of one shape",
            setting=True,
        )


@dataclass
class Reading:
    """A pass over chosen items, asked for a stretch of it: what it holds depends on the stretch alone.

    Where the first batches that this process reads draw nothing at random, the following ones are read without seeds.
    """

    items: Any
    places: Indices
    seed: int
    """Of this pass on this rank."""
    collate: Collate | None
    _without_draws: int = 0

    def __getitem__(self, stretch: tuple[int, int]) -> Any:
        start, count = stretch
        places = self.places[start : start + count]
        if self.collate is None and type(self.items) is TensorDataset:
            return read_batch(self.items, places, 0, None)
        if self._without_draws >= SEEDED_AT_FIRST:
            return read_plainly(self.items, places, self.collate)
        seed = mixed_seed(self.seed, start)
        with seeded(seed):
            batch = read_plainly(self.items, places, self.collate)
            if self._without_draws >= 0:  # as long as none drew
                self._without_draws = self._without_draws + 1 if untouched(seed) else -1
        return batch


def as_it_is(thing: Any) -> Any:
    """For a DataLoader that is to put nothing together."""
    return thing


class BatchReader:
    """Reads a pass in batches of any size, in this process or ahead in reading processes.

    Reading processes are given whole batches of the sizes that are expected to follow. Where another size is asked for
    they begin anew from there, so that a new size holds from the very next batch.

    Args:
        reading: the pass.
        workers: reading processes; 0 reads in this one.
        pin: let the device fetch batches beside training.
    """

    def __init__(self, reading: Reading, workers: int, *, pin: bool) -> None:
        plain = reading.collate is None and type(reading.items) is TensorDataset
        self._reading, self._pin = reading, pin
        self._workers = 0 if plain else workers  # tensors are picked sooner than they are passed on
        self._loader: DataLoader[Any] | None = None
        self._batches: Iterator[Any] = iter(())
        self._stretches = _Stretches()

    def read(self, start: int, count: int, coming: Callable[[], Iterator[int]]) -> Any:
        """The batch of `count` samples from `start` on.

        Args:
            start: place in the pass.
            count: samples.
            coming: makes the sizes that will follow, this one first, as far as they are known.

        Raises:
            DataError: an item that cannot be read.
            ConfigError: items that cannot be put together.
        """
        batch = self._ahead(start, count, coming) if self._workers else self._reading[start, count]
        if isinstance(batch, Failed):
            raise batch.error()
        return batch

    def _ahead(self, start: int, count: int, coming: Callable[[], Iterator[int]]) -> Any:
        try:
            if not self._stretches.due or self._stretches.due[0] != (start, count):
                if self._loader is None:
                    self._loader = self._open()
                self._stretches.aim(start, coming())
                self._batches = iter(self._loader)
            batch = next(self._batches)
        except Exception as error:
            raise dead_worker(error) from error
        self._stretches.due.popleft()
        return batch

    def _open(self) -> DataLoader[Any]:
        return DataLoader(
            self._reading,  # type: ignore[arg-type]  # map-style by its __getitem__
            batch_size=None,
            sampler=self._stretches,
            num_workers=self._workers,
            persistent_workers=True,  # they stay for the pass, however often the batch changes
            collate_fn=as_it_is,
            pin_memory=self._pin,
            generator=torch.Generator(),  # of its own: a reader that begins anew must not draw from training's
        )

    def close(self) -> None:
        """End reading processes."""
        self._loader, self._batches = None, iter(())
        self._stretches.due.clear()


def dead_worker(error: Exception) -> Exception:
    """The error of a reading process, in one line."""
    gone = isinstance(error, ConnectionError | EOFError)  # it died while it handed a tensor over
    if gone or "exited unexpectedly" in str(error) or "is killed by signal" in str(error):
        return DataError(
            f"a reading process died ({one_line(error)}): workers=0 shows its own error; often memory has run out"
        )
    if "pickle" in str(error):
        return DataError(
            f"the data set or collate_fn cannot be sent to reading processes ({one_line(error)}): "
            "define it at a module's top level, or take workers=0"
        )
    return DataError(f"reading failed: {one_line(error)}")


class _Stretches(torch.utils.data.Sampler[tuple[int, int]]):
    """Stretches of a pass, one a batch; `due` are those that were asked for and have not come."""

    def __init__(self) -> None:
        self.due: deque[tuple[int, int]] = deque()
        self._start = 0
        self._sizes: Iterator[int] = iter(())

    def aim(self, start: int, sizes: Iterator[int]) -> None:
        """Have the next iteration begin at `start`, with stretches of these sizes."""
        self._start, self._sizes = start, sizes
        self.due.clear()

    def __iter__(self) -> Iterator[tuple[int, int]]:
        start = self._start
        for size in self._sizes:
            self.due.append((start, size))
            yield start, size
            start += size
