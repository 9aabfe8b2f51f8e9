"""How many samples each rank trains in its next step, and a batch sampler that follows it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from torch.utils.data import Sampler

from trainer.data.partition import Indices, shard_of
from trainer.errors import ConfigError

Uneven = Literal["stop", "go_on"]


def step_sizes(left: Sequence[int], planned: int, uneven: Uneven = "stop") -> list[int]:
    """Samples that each rank trains in its next step, by those that each has left; none where the pass ends.

    Shards differ by one sample at most. Where that one would cost a step of its own, the last two steps share what is
    left, so that all ranks train all of their samples in as many steps.
    """
    fewest, most = min(left), max(left)
    if (fewest if uneven == "stop" else most) <= 0:
        return []
    if fewest == planned and most == planned + 1 and planned > 1:
        return [(each + 1) // 2 for each in left]
    return [min(planned, each) for each in left]


def shard_sizes(samples: int, ranks: int) -> list[int]:
    """Samples of each rank's share of a data set."""
    return [len(part) for part in np.array_split(np.arange(samples), ranks)]


def pass_order(size: int, seed: int, rank: int, number: int) -> Indices:
    """The order of a shard's samples in one pass."""
    return np.random.default_rng([seed, 3, rank, number]).permutation(size).astype(np.int64)


Worlds = Sequence[Sequence[Any]]
"""The worlds that a pass has gone through, the first one first: ranks, and the samples left on each as it ended."""


def dealt_order(samples: int, rank: int, ranks: int, seed: int, number: int, past: Worlds = ()) -> Indices:
    """A rank's samples of a pass over a data set that is shared out, in their order.

    Args:
        samples: of the data set.
        rank: of so many `ranks`.
        seed: of sharding and order.
        number: of the pass.
        past: worlds before; what was left is dealt anew, so that each sample is read once.
    """

    def whole(rank: int, ranks: int) -> Indices:
        mine = shard_of("iid", samples, ranks, rank, seed) if ranks > 1 else np.arange(samples, dtype=np.int64)
        return mine[pass_order(len(mine), seed, rank, number)]

    if not past:
        return whole(rank, ranks)
    counts = [*(world[0] for world in past), ranks]
    orders: Sequence[Indices] = [whole(each, counts[0]) for each in range(counts[0])]
    for turn, (_, left) in enumerate(past):
        rest = np.concatenate([order[len(order) - kept :] for order, kept in zip(orders, left, strict=True)])
        mixed = rest[np.random.default_rng([seed, 17, number, turn]).permutation(len(rest))]
        orders = np.array_split(mixed, counts[turn + 1])
    return orders[rank]


class PlannedBatches(Sampler[list[int]]):
    """Lists of this rank's samples, as many as the Plan says when a list is drawn; a new order in each pass.

    For `DataLoader(dataset, batch_sampler=...)`. Reading processes draw ahead, so a new Plan's size holds some batches
    later. Pass the loader to `LocalSGD.batches`, or iterate over it and tell `step` the samples.

    Args:
        samples: of the whole data set.
        rank: this one.
        ranks: all.
        seed: of sharding and order.
        planned: the Plan's batch now.
        next_pass: the number of a pass that begins.
    """

    def __init__(
        self,
        samples: int,
        rank: int,
        ranks: int,
        *,
        seed: int,
        planned: Callable[[], int],
        next_pass: Callable[[], int],
    ) -> None:
        self.samples, self.seed = samples, seed
        self._rank, self._planned, self._next_pass = rank, planned, next_pass
        shard_of("iid", samples, ranks, rank, seed)  # refuses a data set that is too small
        self._sizes = shard_sizes(samples, ranks)
        self._begins: tuple[int, list[int], Indices] | None = None
        self.drawn: deque[list[int]] = deque()
        """Samples of each rank in the lists that were drawn and not yet trained."""

    def begin(
        self, number: int, left: Sequence[int] | None, place: tuple[int, int] | None = None, past: Worlds = ()
    ) -> list[int]:
        """Have the next iteration be this pass; what is left of it on each rank.

        Args:
            number: of the pass.
            left: on each rank; None: all.
            place: this rank, and how many there are, where that has changed.
            past: worlds that this pass has gone through.
        """
        if place is not None and place != (self._rank, len(self._sizes)):
            self._rank, ranks = place
            self._sizes = shard_sizes(self.samples, ranks)
        ranks = len(self._sizes)
        order = dealt_order(self.samples, self._rank, ranks, self.seed, number, past)
        rest = sum(past[-1][1]) if past else self.samples
        told = list(left or shard_sizes(rest, ranks))
        self._begins = number, told, order
        return told

    def __iter__(self) -> Iterator[list[int]]:
        if self._begins is None:
            self.begin(self._next_pass(), None)
        assert self._begins is not None
        _, left, order = self._begins
        self._begins = None
        self.drawn.clear()
        while sizes := step_sizes(left, self._planned()):
            start = len(order) - left[self._rank]
            left = [each - size for each, size in zip(left, sizes, strict=True)]
            self.drawn.append(sizes)
            yield order[start : start + sizes[self._rank]].tolist()

    def __len__(self) -> int:
        """Batches of a pass by the present Plan."""
        return count_steps(self._sizes, self._planned())


def count_steps(left: Sequence[int], planned: int, uneven: Uneven = "stop") -> int:
    """Steps that a pass takes under one Plan."""
    count, left = 0, list(left)
    whole = max(0, (min(left) if uneven == "stop" else max(left)) // planned - 2)  # all but the last two or three
    left = [max(0, each - whole * planned) for each in left]
    while sizes := step_sizes(left, planned, uneven):
        left = [each - size for each, size in zip(left, sizes, strict=True)]
        count += 1
    return whole + count


def length_of(data: Any) -> int:
    """The length of a data set, or the number itself.

    Raises:
        ConfigError: there is none.
    """
    try:
        return data if isinstance(data, int) else len(data)
    except TypeError:
        raise ConfigError(
            f"dataset = {type(data).__name__}: has no len(), so it cannot be sampled by index; "
            "pass it to LocalSGD.batches as it is"
        ) from None
