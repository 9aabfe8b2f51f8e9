"""The mean of a flat tensor over the ranks, chunk by chunk, in one wire format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from trainer.collectives import Collectives
from trainer.flat import piece_values, pieces
from trainer.wire import BLOCK, FORMATS, Cast, Format
from trainer.world import World

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
CHUNKS, LEAST_CHUNK_VALUES = 16, 2**17
HIDDEN_PIECES = 4  # of a chunk whose transfer nobody waits for: each collective costs compute
AHEAD = 1  # chunks under way while one is decoded
HALVES = (torch.float16, torch.bfloat16)


class Exchange(ABC):
    """Averages tensors of one length, over and over."""

    lossy: bool
    """What the wire format loses stays in the values, for the next time (error feedback)."""

    @abstractmethod
    def means(
        self, values: torch.Tensor, weights: Sequence[float], via: Collectives, fresh: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Places and their means over the ranks, the same bits on every rank; together they are all of `values`.

        `values` (1-d, the rank's own) is consumed: it becomes the mean, or what was lost, or stays. `fresh`, of the
        same length, is added to it first, and stays. `weights` are all ranks' shares (they sum to 1). The caller takes
        every place, and a mean before it asks for the next.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What is lost and not yet made good, besides what stays in the values: by default nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:  # noqa: B027  # nothing by default
        """Go on from a checkpoint."""

    def forget(self) -> None:  # noqa: B027  # nothing by default
        """Nothing is owed any more."""


class WholeExchange(Exchange):
    """One all-reduce a chunk, in the values' own type and place."""

    lossy = False

    def __init__(self, chunk_values: int) -> None:
        self._chunk = chunk_values

    def means(
        self, values: torch.Tensor, weights: Sequence[float], via: Collectives, fresh: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`values` becomes the mean."""
        sent = []
        for chunk in _chunks(len(values), self._chunk):
            part = values[chunk] if fresh is None else values[chunk].add_(fresh[chunk])
            part.mul_(weights[via.rank])
            sent.append((chunk, part, via.begin_sum_(part)))
        for chunk, part, work in sent:
            via.wait(work)
            yield chunk, part


class PairExchange(Exchange):
    """Two ranks show one another their encoded values: as many bytes as by way of a summing rank, and one rounding."""

    lossy = True

    def __init__(self, chunk_values: int, format: Format) -> None:
        self._format, self._chunk = format, max(1, chunk_values // BLOCK) * BLOCK

    def means(
        self, values: torch.Tensor, weights: Sequence[float], via: Collectives, fresh: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`values` becomes what was lost."""
        # memory is taken once for all chunks: a training thread beside this one would break it up
        columns = _whole_blocks(min(self._chunk, len(values)))
        codes = values.new_empty(AHEAD + 1, 2 * self._format.row_bytes(columns), dtype=torch.uint8)
        scratch = _scratch(values)
        shares = torch.tensor(weights, dtype=scratch.dtype, device=values.device)
        begun: deque[tuple[slice, torch.Tensor, Any]] = deque()
        for number, chunk in enumerate(_chunks(len(values), self._chunk)):
            new = None if fresh is None else fresh[chunk]
            begun.append(self._show(values[chunk], new, chunk, codes[number % len(codes)], via))
            if len(begun) > AHEAD:
                yield from self._mean(begun.popleft(), shares, scratch, via)
        while begun:
            yield from self._mean(begun.popleft(), shares, scratch, via)

    def _show(
        self, part: torch.Tensor, fresh: torch.Tensor | None, chunk: slice, codes: torch.Tensor, via: Collectives
    ) -> tuple[slice, torch.Tensor, Any]:
        """Begin to send a chunk and to receive the other's, in `codes`, and leave in `part` what was lost."""
        size = self._format.row_bytes(_whole_blocks(len(part)))
        both = codes[: 2 * size].view(2, size)
        coded = both[via.rank : via.rank + 1]
        for piece in pieces(len(part), part.device):
            some = part[piece] if fresh is None else part[piece].add_(fresh[piece])
            whole, rest = some.tensor_split([len(some) // BLOCK * BLOCK])
            if len(whole):
                self._format.encode(whole.unsqueeze(0), coded, piece.start, leave_lost=True)
            if len(rest):
                last = rest.new_zeros(1, BLOCK)
                last[0, : len(rest)] = rest
                self._format.encode(last, coded, piece.start + len(whole), leave_lost=True)
                rest.copy_(last[0, : len(rest)])
        return chunk, both, via.begin_swap(both[1 - via.rank], both[via.rank])

    def _mean(
        self, begun: tuple[slice, torch.Tensor, Any], shares: torch.Tensor, scratch: torch.Tensor, via: Collectives
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        chunk, both, work = begun
        via.wait(work)
        for piece in pieces(chunk.stop - chunk.start, scratch.device):
            count = piece.stop - piece.start
            mean = self._format.mean(both, shares, scratch[:, : _whole_blocks(count)], piece.start)
            yield slice(chunk.start + piece.start, chunk.start + piece.stop), mean[:count]


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
        self, values: torch.Tensor, weights: Sequence[float], via: Collectives, fresh: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`values` becomes what was lost, where there is feedback; else it stays."""
        scratch = _scratch(values)
        shares = torch.tensor(weights, dtype=scratch.dtype, device=values.device)
        if self.lossy and self._owed is None:
            self._owed = values.new_zeros(self._owner_values(self._count), dtype=scratch.dtype)

        def coded_rows(count: int, chunk: slice) -> torch.Tensor:
            size = self._format.row_bytes(self._owner_values(chunk.stop - chunk.start))
            return values.new_empty(count, size, dtype=torch.uint8)

        def scatter(chunk: slice) -> tuple[slice, torch.Tensor, Any]:
            part = values[chunk] if fresh is None else values[chunk].add_(fresh[chunk])
            columns = self._owner_values(chunk.stop - chunk.start)
            rows = part
            if len(part) < self._ranks * columns:  # a row for each rank that sums; the last chunk's end is zero
                rows = part.new_zeros(self._ranks * columns)
                rows[: len(part)] = part
            rows, coded, received = rows.view(self._ranks, columns), *(coded_rows(self._ranks, chunk) for _ in range(2))
            for piece in pieces(columns, values.device):
                self._format.encode(rows[:, piece], coded, piece.start, leave_lost=self.lossy)
            if self.lossy and len(part) < rows.numel():
                part.copy_(rows.view(-1)[: len(part)])
            return chunk, received, via.begin_all_to_all(received, coded)

        def reduce(begun: tuple[slice, torch.Tensor, Any]) -> tuple[slice, torch.Tensor, Any]:
            chunk, received, work = begun
            via.wait(work)
            coded, before = coded_rows(1, chunk), self._owner_values(chunk.start)
            for piece in pieces(self._owner_values(chunk.stop - chunk.start), values.device):
                place = slice(before + piece.start, before + piece.stop)
                mean = self._format.mean(received, shares, scratch[:, : piece.stop - piece.start], piece.start)
                if self._owed is not None:
                    mean += self._owed[place]
                self._format.encode(mean.unsqueeze(0), coded, piece.start, leave_lost=self.lossy)
                if self._owed is not None:
                    self._owed[place] = mean
            return chunk, received, via.begin_all_gather(received, coded)

        def finish(begun: tuple[slice, torch.Tensor, Any]) -> Iterator[tuple[slice, torch.Tensor]]:
            chunk, gathered, work = begun
            via.wait(work)
            columns = self._owner_values(chunk.stop - chunk.start)
            for row in range(self._ranks):
                whole = slice(chunk.start + row * columns, min(chunk.start + (row + 1) * columns, chunk.stop))
                for piece in pieces(whole.stop - whole.start, values.device):
                    count = piece.stop - piece.start
                    mean = scratch[:1, : _whole_blocks(count)]
                    self._format.decode(gathered[row : row + 1], mean, piece.start)
                    yield slice(whole.start + piece.start, whole.start + piece.stop), mean[0, :count]

        for chunk in pipeline(_chunks(len(values), self._chunk), scatter, reduce, finish):
            yield from chunk

    def _owner_values(self, count: int) -> int:
        """Values that one rank sums of `count`."""
        return -(-count // (self._ranks * BLOCK)) * BLOCK

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What this rank's means lost."""
        return {} if self._owed is None else {"owed": self._owed}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""
        self._owed = state.get("owed")

    def forget(self) -> None:
        """Nothing is owed any more."""
        self._owed = None


class NodesExchange(Exchange):
    """Between nodes whose replicas are one: each rank averages a share, and a node puts its shares together."""

    def __init__(self, between: Exchange, count: int, world: World) -> None:
        self.lossy = between.lossy
        self._between, self._count, self._world = between, count, world
        self._share = share_of(count, world)

    def means(
        self, values: torch.Tensor, weights: Sequence[float], via: Collectives, fresh: torch.Tensor | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`values` becomes what this rank's own share lost; other shares are other ranks' concern."""
        assert via.within is not None
        assert via.between is not None
        local = self._world.local_size
        nodes = [sum(weights[start : start + local]) for start in range(0, len(weights), local)]
        mine = slice(self._world.local_rank * self._share, min((self._world.local_rank + 1) * self._share, self._count))
        work_type = torch.promote_types(values.dtype, torch.float32) if self.lossy else values.dtype
        shares = torch.zeros(local, self._share, dtype=work_type, device=values.device)
        new = None if fresh is None else fresh[mine]
        for chunk, mean in self._between.means(values[mine], nodes, via.between, new):
            shares[self._world.local_rank, chunk] = mean
        if self.lossy:
            values[: mine.start].zero_()
            values[mine.stop :].zero_()
        whole = torch.empty_like(shares)
        via.within.wait(via.within.begin_all_gather(whole, shares[self._world.local_rank].unsqueeze(0)))
        yield slice(0, self._count), whole.view(-1)[: self._count]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What this rank's share lost."""
        return self._between.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a checkpoint."""
        self._between.load_state_dict(state)

    def forget(self) -> None:
        """Nothing is owed any more."""
        self._between.forget()


def share_of(count: int, world: World) -> int:
    """Values that each rank of a node averages between nodes."""
    return -(-count // world.local_size)


def make_exchange(
    wire_format: str, values: torch.Tensor, count: int, ranks: int, bucket_bytes: int, *, hidden: bool = False
) -> Exchange:
    """The exchange of `count` values of the type and on the device of `values`; where it is `hidden` beside training
    it takes little compute and memory rather than little time.

    float32 sends values in their own type; halves are summed in float32 all the same, since a backend's own sum would
    round at every hop.
    """
    dtype, chunk_values = values.dtype, max(1, bucket_bytes // 4)
    if wire_format != "float32":
        # enough chunks that one's encoding hides another's transfer, each large enough to be worth a collective
        least = max(count // CHUNKS, LEAST_CHUNK_VALUES)
        chunk_values = min(chunk_values, HIDDEN_PIECES * piece_values(values.device) if hidden else least)
    if ranks == 1:
        return WholeExchange(chunk_values)
    if wire_format != "float32" and ranks == 2:
        return PairExchange(chunk_values, FORMATS[wire_format])
    if wire_format != "float32":
        return CodedExchange(count, ranks, chunk_values, FORMATS[wire_format], feedback=True)
    if dtype in HALVES:
        return CodedExchange(count, ranks, chunk_values, Cast(dtype), feedback=False)
    return WholeExchange(chunk_values)


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


def _scratch(values: torch.Tensor) -> torch.Tensor:
    """Room for a mean of a piece, and for a row that is added to it."""
    count = _whole_blocks(min(len(values), piece_values(values.device)))
    return values.new_empty(2, count, dtype=torch.promote_types(values.dtype, torch.float32))


def _whole_blocks(count: int) -> int:
    """So many values and what fills their last block."""
    return -(-count // BLOCK) * BLOCK


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
