"""Averages in fewer bytes: encoded values, with what encoding loses kept for the next time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from trainer.distributed.collectives import Collectives
from trainer.wire.exchange import Exchange, Fresh, chunks
from trainer.wire.flat import piece_values, pieces
from trainer.wire.formats import BLOCK, Format

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
AHEAD = 1  # chunks under way while one is decoded


@dataclass(frozen=True)
class Sending:
    """A chunk whose collective is under way."""

    chunk: slice
    coded: torch.Tensor
    """Rows of bytes that arrive."""
    work: Any


class Coding:
    """One exchange of encoded values: what its chunks have in common. Scratch is taken once for all of them, since a
    training thread beside this one would break memory up."""

    def __init__(
        self, format: Format, values: torch.Tensor, fresh: Fresh | None, weights: Sequence[float], via: Collectives
    ) -> None:
        self._format, self._values, self._fresh, self.via = format, values, fresh, via
        columns = _whole_blocks(min(len(values), piece_values(values.device)))
        work_type = torch.promote_types(values.dtype, torch.float32)
        self.scratch = values.new_empty(2, columns, dtype=work_type)
        """For the mean of a piece, and a row that is added to it; for what is encoded, and its numbers."""
        self.shares = torch.tensor(weights, dtype=work_type, device=values.device)
        self._silent = weights[via.rank] == 0

    def encode(self, place: slice, coded: torch.Tensor, first: int, width: int, *, leave_lost: bool) -> None:
        """Encode a place of the values, and zeros behind it, as the `width` values that follow `first` in all rows of
        `coded`; with `leave_lost` the place becomes what that lost, else it stays."""
        count = place.stop - place.start
        values, room = self.scratch[:, : len(coded) * width]
        values[count:] = 0
        some = values[:count]
        if not self._silent:
            some.copy_(self._values[place])
        if self._silent:
            some.zero_()  # whatever the values are, nothing is added
        elif self._fresh is not None:
            some.add_(self._fresh(place))  # faster than one operation on two types
        self._format.encode(values.view(-1, width), coded, room.view(-1, width), first)
        if leave_lost and not self._silent:
            self._values[place].copy_(some)

    def rows(self, count: int, size: int) -> torch.Tensor:
        """Room for encoded values, (count, size) bytes."""
        return self._values.new_empty(count, size, dtype=torch.uint8)

    def pieces_of(self, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
        """The pieces of these values, as places after `start` and as places in the whole."""
        for piece in pieces(stop - start, self._values.device):
            yield piece, slice(start + piece.start, start + piece.stop)


class PairExchange(Exchange):
    """Two ranks show one another their encoded values: as many bytes as by way of a summing rank, and one rounding."""

    lossy = True

    def __init__(self, chunk_values: int, format: Format) -> None:
        self._format, self._chunk = format, max(1, chunk_values // BLOCK) * BLOCK

    def means(
        self, values: torch.Tensor, weights: Sequence[float], via: Collectives, fresh: Fresh | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`values` becomes what was lost."""
        coding = Coding(self._format, values, fresh, weights, via)
        columns = _whole_blocks(min(self._chunk, len(values)))
        places = list(chunks(len(values), self._chunk))
        room = coding.rows(min(AHEAD + 1, len(places)), 2 * self._format.row_bytes(columns))
        begun: deque[Sending] = deque()
        for number, chunk in enumerate(places):
            begun.append(self._show(coding, chunk, room[number % len(room)]))
            if len(begun) > AHEAD:
                yield from self._means(coding, begun.popleft())
        while begun:
            yield from self._means(coding, begun.popleft())

    def _show(self, coding: Coding, chunk: slice, room: torch.Tensor) -> Sending:
        """Begin to send a chunk and to receive the other's, and leave in its place what was lost."""
        rank, size = coding.via.rank, self._format.row_bytes(_whole_blocks(chunk.stop - chunk.start))
        both = room[: 2 * size].view(2, size)
        coded = both[rank : rank + 1]
        for piece, place in coding.pieces_of(chunk.start, chunk.stop):
            coding.encode(place, coded, piece.start, _whole_blocks(piece.stop - piece.start), leave_lost=True)
        return Sending(chunk, both, coding.via.begin_swap(both[1 - rank], both[rank]))

    def _means(self, coding: Coding, begun: Sending) -> Iterator[tuple[slice, torch.Tensor]]:
        """The means of what both showed."""
        coding.via.wait(begun.work)
        for piece, place in coding.pieces_of(begun.chunk.start, begun.chunk.stop):
            count = piece.stop - piece.start
            scratch = coding.scratch[:, : _whole_blocks(count)]
            yield place, self._format.mean(begun.coded, coding.shares, scratch, piece.start)[:count]


class CodedExchange(Exchange):
    """Encoded parts go to the rank that sums them in float32 or more, and its encoded mean goes back to all.

    A rank sends 2 (N - 1) / N of the encoded values, as in a ring, and every value is rounded twice however many ranks
    there are. With feedback what each rounding lost is kept by the rank that did it and added the next time.
    """

    def __init__(self, count: int, ranks: int, chunk_values: int, format: Format, *, feedback: bool) -> None:
        self.lossy = feedback
        self._format, self._ranks = format, ranks
        self._chunk = max(1, chunk_values // (ranks * BLOCK)) * ranks * BLOCK
        self._count = count
        self._owed: torch.Tensor | None = None

    def means(
        self, values: torch.Tensor, weights: Sequence[float], via: Collectives, fresh: Fresh | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`values` becomes what was lost, where there is feedback; else it stays."""
        coding = Coding(self._format, values, fresh, weights, via)
        if self._owed is not None:
            self._owed = self._owed.to(values.device)  # it may come from a checkpoint
        elif self.lossy:
            self._owed = values.new_zeros(self._owner_values(self._count), dtype=coding.scratch.dtype)
        stages = partial(self._scatter, coding), partial(self._reduce, coding), partial(self._finish, coding)
        for means in pipeline(chunks(len(values), self._chunk), *stages):
            yield from means

    def _scatter(self, coding: Coding, chunk: slice) -> Sending:
        """Begin to send each rank what it sums of a chunk."""
        columns = self._columns(chunk)
        coded, received = (coding.rows(self._ranks, self._format.row_bytes(columns)) for _ in range(2))
        coded.zero_()  # the last chunk may have rows without values
        together = max(1, coding.scratch.shape[1] // columns)  # short rows are encoded at once
        for row in range(0, self._ranks, together):
            start = chunk.start + row * columns
            for piece, place in coding.pieces_of(start, min(start + together * columns, chunk.stop)):
                width = columns if together > 1 else _whole_blocks(place.stop - place.start)
                some = coded[row : row + together]
                coding.encode(place, some, piece.start, width, leave_lost=self.lossy)
        return Sending(chunk, received, coding.via.begin_all_to_all(received, coded))

    def _reduce(self, coding: Coding, begun: Sending) -> Sending:
        """Sum what arrived, and begin to send the mean to all."""
        coding.via.wait(begun.work)
        columns, before = self._columns(begun.chunk), self._owner_values(begun.chunk.start)
        coded = coding.rows(1, self._format.row_bytes(columns))
        for piece, place in coding.pieces_of(before, before + columns):
            scratch = coding.scratch[:, : piece.stop - piece.start]
            mean = self._format.mean(begun.coded, coding.shares, scratch, piece.start)
            if self._owed is not None:
                mean += self._owed[place]
            self._format.encode(mean.unsqueeze(0), coded, scratch[1:], piece.start)
            if self._owed is not None:
                self._owed[place] = mean
        return Sending(begun.chunk, begun.coded, coding.via.begin_all_gather(begun.coded, coded))

    def _finish(self, coding: Coding, begun: Sending) -> Iterator[tuple[slice, torch.Tensor]]:
        """The means that arrived."""
        coding.via.wait(begun.work)
        columns = self._columns(begun.chunk)
        for row in range(self._ranks):
            start = begun.chunk.start + row * columns
            for piece, place in coding.pieces_of(start, min(start + columns, begun.chunk.stop)):
                count = piece.stop - piece.start
                mean = coding.scratch[:1, : _whole_blocks(count)]
                self._format.decode(begun.coded[row : row + 1], mean, piece.start)
                yield place, mean[0, :count]

    def _columns(self, chunk: slice) -> int:
        """Values of a chunk that one rank sums."""
        return self._owner_values(chunk.stop - chunk.start)

    def _owner_values(self, count: int) -> int:
        """Values that one rank sums of `count`."""
        return -(-count // (self._ranks * BLOCK)) * BLOCK

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Loss of the means that this rank encoded."""
        return {} if self._owed is None else {"owed": self._owed}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""
        self._owed = state.get("owed")

    def forget(self) -> None:
        """Nothing is owed any more."""
        self._owed = None


def pipeline(
    items: Iterable[A], first: Callable[[A], B], second: Callable[[B], C], third: Callable[[C], D]
) -> Iterator[D]:
    """Three stages over items, each stage begun for the next item while the one before is under way, in one order."""
    begun: deque[B] = deque()
    reduced: deque[C] = deque()
    for item in items:
        begun.append(first(item))
        if len(begun) > 1:
            reduced.append(second(begun.popleft()))
        if len(reduced) > 1:
            yield third(reduced.popleft())
    while begun:
        reduced.append(second(begun.popleft()))
    while reduced:
        yield third(reduced.popleft())


def _whole_blocks(count: int) -> int:
    """So many values and what fills their last block."""
    return -(-count // BLOCK) * BLOCK
