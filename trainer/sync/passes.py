"""One pass over a user's data: every rank is given a batch at each step, or all end together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import TYPE_CHECKING, Any, get_args

from trainer.data.nested import put
from trainer.data.planned import Uneven, step_sizes
from trainer.data.reading import Collate
from trainer.data.supply import UNKNOWN, PlannedLoader, Supply
from trainer.errors import DataError, PeerError, require

if TYPE_CHECKING:
    from trainer.sync.feed import Feed

KINDS = ("data set", "stream", "generator", "DataLoader", "DataLoader of batch_sampler")
Key = tuple[Any, ...]
"""By which a resumed run knows a data set again: kind, length, seed, whether it is shared out."""
Sizes = list[int | None]
"""Samples of every rank's next batch, by rank: UNKNOWN for a batch without a length, None without a batch."""


@dataclass(frozen=True)
class Options:
    """The arguments of `LocalSGD.batches`, besides the data."""

    samples: int | None = None
    seed: int = 0
    collate_fn: Collate | None = None
    workers: int = 0
    uneven: Uneven = "stop"
    shard: bool = True

    def __post_init__(self) -> None:
        for name, kinds in (("samples", (int, NoneType)), ("seed", int), ("workers", int), ("shard", bool)):
            value = getattr(self, name)
            fits = isinstance(value, kinds) and (name == "shard" or not isinstance(value, bool))
            require(name, value, fits, "must be true or false" if name == "shard" else "must be a whole number")
        require("uneven", self.uneven, self.uneven in get_args(Uneven), f"choose one of {', '.join(get_args(Uneven))}")
        require("workers", self.workers, self.workers >= 0, "must be at least 0")
        require("seed", self.seed, self.seed >= 0, "must be at least 0")
        require("samples", self.samples, self.samples is None or self.samples >= 1, "must be at least 1")


@dataclass
class Cursor:
    """How far a pass is."""

    number: int
    """Of the pass among those over its data set, from 0: it decides the order."""
    kind: str
    length: int
    seed: int
    shard: bool
    consumed: int = 0
    """Read by this rank: samples, or batches of a DataLoader."""
    last: int = 0
    """Of those, the last batch."""
    left: list[int] | None = None
    """Samples left on each rank, for a DataLoader of `batch_sampler`."""
    past: list[list[Any]] = field(default_factory=list)
    """Of a data set that is shared out, the worlds that the pass went through: ranks, and samples left on each."""
    live: bool = field(default=False, compare=False)
    """Its loop is running."""

    @property
    def key(self) -> Key:
        """Of its data set."""
        return self.kind, self.length, self.seed, self.shard

    @property
    def is_dealt(self) -> bool:
        """Its samples are shared out to the ranks, and can be dealt anew."""
        return self.kind == KINDS[-1] or (self.kind == KINDS[0] and self.shard)


class Pass(ABC):
    """One pass: every rank is given a batch at each step, or all end together.

    Args:
        feed: the ranks, the Plan, and this rank's progress.
        supply: this rank's, begun at the cursor.
        cursor: moves as batches are handed out.
        options: of the call.
        done: samples that all ranks had trained when it began.
        going: the same pass in the world before, where the ranks have changed.
    """

    def __init__(
        self, feed: Feed, supply: Supply, cursor: Cursor, options: Options, done: int, going: Pass | None
    ) -> None:
        self.feed, self.supply, self.cursor, self.options = feed, supply, cursor, options
        self.done = done
        self.last: Any = None if going is None else going.last
        """The last batch, to be repeated by a rank that has no more."""
        self.worlds = 0
        """How many the feed had gone on to when it began."""
        self._problem: Exception | None = None

    def lefts(self) -> list[int]:
        """Samples left on each rank, where they can be dealt anew."""
        return []

    def spare(self) -> Any:
        """A batch of this rank's, which need not be read in its turn.

        Raises:
            PeerError: there is none.
        """
        raise PeerError(f"ranks went on without this one while it began to read the {self.cursor.kind}")

    @property
    def limit_reached(self) -> bool:
        """All ranks together have trained the samples asked for."""
        return self.options.samples is not None and self.done >= self.options.samples

    @abstractmethod
    def next(self) -> tuple[Any, Sizes] | None:
        """The next batch and every rank's size; None on every rank where the pass ends."""

    def _take(self, mine: int | None, consumed: int, coming: Callable[[], Iterator[int]]) -> Any:
        """This rank's batch, or the last one again."""
        if mine is None:
            return self.last
        with self.feed.clock.waiting("input_wait"):
            batch = put(self.supply.take(mine, coming), self.feed.via.world.device)
        if self.options.uneven == "go_on":
            self.last = batch
        self.cursor.consumed += consumed
        self.cursor.last = consumed
        return batch

    def _again(self, size: int) -> None:
        """Read the last batch of an interrupted pass again, in case that it is to be repeated."""
        if self.options.uneven == "go_on" and self.cursor.last:
            batch = self.supply.take(size, lambda: iter((size,)))
            self.last = put(batch, self.feed.via.world.device)

    def _look_ahead(self, steps: int, planned: int) -> None:
        """Read ahead; what goes wrong is told at the next vote, so that all ranks raise it together."""
        if self._problem is not None:
            return
        try:
            with self.feed.clock.waiting("input_wait"):
                self.supply.look_ahead(steps, planned)
        except DataError as error:
            self._problem = error

    def _vote(self, facts: Mapping[str, float]) -> list[dict[str, float]]:
        told = self.feed.via.gather(
            {"failed": self._problem is not None, "trained": self.feed.progress.samples, **facts}
        )
        self.feed.together(told, self._problem)
        self.done = int(max(rank["trained"] for rank in told))
        return told

    def _count(self, sizes: Sizes) -> None:
        self.done += sum(max(size or 0, 0) for size in sizes)


class BySamples(Pass):
    """Batches cut from samples as the Plan says. Ranks know how many samples each has: of a data set all, so that
    nothing more is sent; of a stream those that were read ahead, after which they vote again."""

    def __init__(
        self,
        feed: Feed,
        supply: Supply,
        cursor: Cursor,
        options: Options,
        done: int,
        going: Pass | None,
        told: Sequence[Mapping[str, float]],
    ) -> None:
        super().__init__(feed, supply, cursor, options, done, going)
        self._ahead = feed.ahead(), feed.plan.batch_per_rank
        if going is None:
            self._again(cursor.last)
        self._hear(told)
        if not cursor.consumed and not cursor.past:
            feed.refuse_nothing(self._left, cursor.kind)

    def _hear(self, told: Sequence[Mapping[str, float]]) -> None:
        self._left = [int(rank["left"]) for rank in told]
        self._ended = [bool(rank["ended"]) for rank in told]

    def lefts(self) -> list[int]:
        return list(self._left)

    def spare(self) -> Any:
        count = min(self.feed.plan.batch_per_rank, sum(self.supply.left))
        if not count:
            return super().spare()
        return put(self.supply.take(count, lambda: iter((count,))), self.feed.via.world.device)

    def _planned(self, done: int, planned: int) -> int:
        """The Plan's batch, less where the samples asked for end."""
        if self.options.samples is None:
            return planned
        return min(planned, max(0, -(-(self.options.samples - done) // self.feed.via.size)))

    def next(self) -> tuple[Any, Sizes] | None:
        planned = self._planned(self.done, self.feed.plan.batch_per_rank)
        if any(not ended and left < planned for ended, left in zip(self._ended, self._left, strict=True)):
            self._ahead = self.feed.ahead(), planned
            self._look_ahead(*self._ahead)
            self._hear(self._vote({"left": sum(self.supply.left), "ended": self.supply.ended}))
        sizes = self._sizes(self._left, planned)
        if not sizes:
            return None
        mine = sizes[self.feed.via.rank]
        batch = self._take(mine or None, mine, self._coming)
        self._left = [left - size for left, size in zip(self._left, sizes, strict=True)]
        if not all(self._ended) and self.feed.via.size > 1:
            self._look_ahead(*self._ahead)  # as much as was trained, so that reading is spread over the steps
        told: Sizes = [size or None for size in sizes]
        self._count(told)
        return batch, told

    def _sizes(self, left: Sequence[int], planned: int) -> list[int]:
        if all(self._ended):
            return step_sizes(left, planned, self.options.uneven) if planned else []
        sizes = [min(planned, each) for each in left]
        goes_on = all(sizes) if self.options.uneven == "stop" else any(sizes)
        return sizes if goes_on else []

    def _coming(self) -> Iterator[int]:
        """This rank's sizes from the present step on, under the present Plan."""
        left, done, batch = list(self._left), self.done, self.feed.plan.batch_per_rank
        while sizes := self._sizes(left, self._planned(done, batch)):
            if not sizes[self.feed.via.rank]:
                return
            yield sizes[self.feed.via.rank]
            left = [each - size for each, size in zip(left, sizes, strict=True)]
            done += sum(sizes)


class ByBatches(Pass):
    """A DataLoader's own batches: at a vote each rank tells the sizes of those that it has read ahead."""

    def __init__(
        self, feed: Feed, supply: Supply, cursor: Cursor, options: Options, done: int, going: Pass | None
    ) -> None:
        super().__init__(feed, supply, cursor, options, done, going)
        self._ahead = feed.ahead()
        if going is None and options.uneven == "go_on" and cursor.last:
            self._look_ahead(1, 0)
            if self._problem is None and supply.left:
                self._again(1)
        self._rows: list[list[int]] = [[] for _ in range(feed.via.size)]
        self._ended = [False] * feed.via.size

    def spare(self) -> Any:
        self.supply.look_ahead(1, 0)
        if not self.supply.left:
            return super().spare()
        return put(self.supply.take(1, lambda: iter(())), self.feed.via.world.device)

    def _ask(self) -> None:
        self._ahead = self.feed.ahead()
        self._look_ahead(self._ahead, 0)
        mine = self.supply.left[: self._ahead]
        slots = [size + 2 for size in mine] + [0] * (self._ahead - len(mine))  # 0: no batch; 1: of unknown size
        ended = self.supply.ended and len(self.supply.left) <= self._ahead
        told = self._vote({"ended": ended, **{f"size{slot}": size for slot, size in enumerate(slots)}})
        rows = ([int(rank[f"size{slot}"]) - 2 for slot in range(self._ahead)] for rank in told)
        self._rows = [[size for size in row if size >= UNKNOWN] for row in rows]
        self._ended = [bool(rank["ended"]) for rank in told]
        if not self.cursor.consumed:
            self.feed.refuse_nothing([len(row) for row in self._rows], self.cursor.kind)
        if self.supply.left:
            self.feed.warn_of_size(self.supply.left[0])

    def next(self) -> tuple[Any, Sizes] | None:
        if any(not row and not ended for row, ended in zip(self._rows, self._ended, strict=True)):
            self._ask()
        sizes: Sizes = [row.pop(0) if row else None for row in self._rows]
        goes_on = None not in sizes if self.options.uneven == "stop" else any(size is not None for size in sizes)
        if not goes_on:
            return None
        batch = self._take(sizes[self.feed.via.rank], 1, lambda: iter(()))
        self._look_ahead(self._ahead, 0)
        self._count(sizes)
        return batch, sizes


class AsPlanned(Pass):
    """A DataLoader of `batch_sampler`, whose sizes every rank computes."""

    def lefts(self) -> list[int]:
        return list(self.cursor.left or ())

    def spare(self) -> Any:
        assert isinstance(self.supply, PlannedLoader)
        found = self.supply.next_batch()
        return super().spare() if found is None else put(found[0], self.feed.via.world.device)

    def next(self) -> tuple[Any, Sizes] | None:
        assert isinstance(self.supply, PlannedLoader)
        with self.feed.clock.waiting("input_wait"):
            found = self.supply.next_batch()
        if found is None:
            return None
        batch, sizes = found
        assert self.cursor.left is not None
        left = self.cursor.left
        self.cursor.left = [each - size for each, size in zip(left, sizes, strict=True)]
        self.cursor.consumed += sizes[self.feed.via.rank]
        told: Sizes = [*sizes]
        self._count(told)
        return put(batch, self.feed.via.world.device), told
