"""Which exchange serves: by wire format, number of ranks, and levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from trainer.distributed.collectives import Collectives
from trainer.distributed.world import World
from trainer.wire.encoded import CodedExchange, PairExchange
from trainer.wire.exchange import Exchange, Fresh, WholeExchange
from trainer.wire.flat import piece_values
from trainer.wire.formats import FORMATS, Cast

CHUNKS, LEAST_CHUNK_VALUES = 16, 2**17
HIDDEN_PIECES = 8  # of a chunk whose transfer nobody waits for: each collective costs compute
HALVES = (torch.float16, torch.bfloat16)


class NodesExchange(Exchange):
    """Between nodes whose replicas are one: each rank averages a share, and a node puts its shares together."""

    def __init__(self, between: Exchange, count: int, world: World) -> None:
        self.lossy = between.lossy
        self._between, self._count, self._world = between, count, world
        self._share = share_of(count, world)

    def means(
        self, values: torch.Tensor, weights: Sequence[float], via: Collectives, fresh: Fresh | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`values` becomes what this rank's own share lost; other shares are other ranks' concern."""
        assert via.within is not None
        assert via.between is not None
        local = self._world.local_size
        place = self._world.local_rank
        nodes = sorted(self._world.nodes, key=lambda ranks: ranks[place])  # as a group orders its ranks
        shares_of_nodes = [sum(weights[rank] for rank in ranks) for ranks in nodes]
        mine = slice(self._world.local_rank * self._share, min((self._world.local_rank + 1) * self._share, self._count))
        work_type = torch.promote_types(values.dtype, torch.float32) if self.lossy else values.dtype
        shares = torch.zeros(local, self._share, dtype=work_type, device=values.device)

        def fresh_of_mine(place: slice) -> torch.Tensor:
            assert fresh is not None
            return fresh(slice(mine.start + place.start, mine.start + place.stop))

        new = None if fresh is None else fresh_of_mine
        for chunk, mean in self._between.means(values[mine], shares_of_nodes, via.between, new):
            shares[self._world.local_rank, chunk] = mean
        if self.lossy:
            values[: mine.start].zero_()
            values[mine.stop :].zero_()
        whole = torch.empty_like(shares)
        via.within.wait(via.within.begin_all_gather(whole, shares[self._world.local_rank].unsqueeze(0)))
        yield slice(0, self._count), whole.view(-1)[: self._count]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Loss of this rank's share."""
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
