"""The mean of a flat tensor over the ranks, chunk by chunk, in one wire format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from trainer.distributed.collectives import Collectives

OWED = torch.bfloat16
"""Type of the loss that a rank keeps of its own encoding: half the memory, and rounding loses little of a little."""
Fresh = Callable[[slice], torch.Tensor]
"""Tells what is new of a place, in float32 or wider."""


class Exchange(ABC):
    """Averages tensors of one length, over and over."""

    lossy: bool
    """The loss of the wire format stays in the values, for the next time (error feedback)."""

    @abstractmethod
    def means(
        self, values: torch.Tensor, weights: Sequence[float], via: Collectives, fresh: Fresh | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """Places and their means over the ranks, the same bits on every rank; together they are all of `values`.

        `values` (1-d, the rank's own) is consumed: it becomes the mean, or what was lost, or stays. Each place of it is
        taken once, with what `fresh` says of that place added. `weights` are all ranks' shares (they sum to 1). The
        caller takes every place, and a mean before it asks for the next.
        """

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Losses that are not yet made good, besides those that stay in the values: by default none."""
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
        self, values: torch.Tensor, weights: Sequence[float], via: Collectives, fresh: Fresh | None = None
    ) -> Iterator[tuple[slice, torch.Tensor]]:
        """`values` becomes the mean."""
        sent = []
        for chunk in chunks(len(values), self._chunk):
            part = values[chunk]
            if fresh is not None:
                part += fresh(chunk)
            if weights[via.rank]:
                part.mul_(weights[via.rank])
            else:
                part.zero_()  # whatever the values are, nothing is added
            sent.append((chunk, part, via.begin_sum_(part)))
        for chunk, part, work in sent:
            via.wait(work)
            yield chunk, part


def chunks(count: int, size: int) -> Iterator[slice]:
    """The places of so many values at a time."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
