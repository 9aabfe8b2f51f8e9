"""How samples are dealt to ranks, epoch after epoch, where the number of ranks has changed on the way.

Every rank computes it from what it knows: how many ranks there were, and how many samples each of them read. So it
needs no message, and a checkpoint holds two numbers for each change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.partition import Indices, shard_of

Past = Sequence[tuple[int, int | Sequence[int]]]
"""The worlds before, the first one first: ranks, and the samples that each rank read, or a number for every rank."""
Lead = list[tuple[int, Indices]]
"""Parts of epochs, each with its epoch's number."""


def permuted(size: int, seed: int, rank: int, epoch: int) -> Indices:
    """The order of a shard of so many samples in an epoch, as places within it."""
    return np.random.default_rng([seed, 3, rank, epoch]).permutation(size)


@dataclass(frozen=True)
class Deal:
    """What each rank reads, as indices of the data set: first its share of what was left of epochs that had begun, then
    its own shard, epoch after epoch."""

    shards: Sequence[Indices]
    leads: Sequence[Lead]
    first_epoch: int
    """The first that is dealt as a whole."""

    @classmethod
    def of(cls, samples: int, ranks: int, seed: int, past: Past) -> Deal:
        """The deal for so many ranks, after these worlds; `iid` shards."""
        leads, first = _nothing(ranks), 0
        counts = [*(count for count, _ in past), ranks]
        for number, (_, read) in enumerate(past):
            before = cls(_shards(samples, counts[number], seed), leads if number else _nothing(counts[0]), first)
            reads = [read] * counts[number] if isinstance(read, int) else list(read)
            left, first = before._left(reads, seed)
            leads = _dealt(left, counts[number + 1], seed, number)
        return cls(_shards(samples, ranks, seed), leads, first)

    def _left(self, reads: Sequence[int], seed: int) -> tuple[Lead, int]:
        """What is not read of all epochs that any rank has begun, once each has read so many samples; and the epoch
        after those."""
        ends, last = [], self.first_epoch - 1
        for rank, shard in enumerate(self.shards):
            led = sum(len(part) for _, part in self.leads[rank])
            begun = -(-max(0, reads[rank] - led) // len(shard)) if len(shard) else 0
            last = max(last, self.first_epoch + begun - 1)
            ends.append(led)
        left: dict[int, list[Indices]] = {}
        for rank, shard in enumerate(self.shards):
            position = 0
            whole = ((e, shard[permuted(len(shard), seed, rank, e)]) for e in range(self.first_epoch, last + 1))
            for epoch, part in (*self.leads[rank], *whole):
                left.setdefault(epoch, []).append(part[max(0, reads[rank] - position) :])
                position += len(part)
        return [(epoch, np.concatenate(parts)) for epoch, parts in sorted(left.items())], last + 1


def _shards(samples: int, ranks: int, seed: int) -> list[Indices]:
    return [shard_of("iid", samples, ranks, rank, seed) for rank in range(ranks)]


def _nothing(ranks: int) -> list[Lead]:
    return [[] for _ in range(ranks)]


def _dealt(left: Lead, ranks: int, seed: int, number: int) -> list[Lead]:
    """Shuffle what is left of each epoch, and share it out; who had one sample less has one more in the next."""
    leads, turn = _nothing(ranks), 0
    for epoch, samples in left:
        order = np.random.default_rng([seed, 13, number, epoch]).permutation(samples)
        for place in range(ranks):
            part = order[place::ranks]
            if len(part):
                leads[(turn + place) % ranks].append((epoch, part))
        turn += len(samples) % ranks
    return leads
