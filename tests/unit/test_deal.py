"""Samples dealt anew where the number of ranks changes: none lost, none read twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.data.deal import Deal, permuted


def read_by(deal: Deal, rank: int, count: int, seed: int) -> list[tuple[int, int]]:
    """The epoch and index of the first samples that a rank reads."""
    found = [(epoch, int(index)) for epoch, part in deal.leads[rank] for index in part]
    shard, epoch = deal.shards[rank], deal.first_epoch
    while len(found) < count:
        found += [(epoch, int(index)) for index in shard[permuted(len(shard), seed, rank, epoch)]]
        epoch += 1
    return found[:count]


@settings(max_examples=150, deadline=None)
@given(
    samples=st.integers(8, 60),
    worlds=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 40)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
@example(samples=720, worlds=[(4, 100), (2, 70), (3, 300)], seed=0)
def test_every_sample_of_an_epoch_is_read_once_whatever_the_ranks(
    samples: int, worlds: list[tuple[int, int]], seed: int
) -> None:
    counts: Counter[tuple[int, int]] = Counter()
    past: list[tuple[int, int]] = []
    for ranks, count in worlds:
        deal = Deal.of(samples, ranks, seed, past)
        for rank in range(ranks):
            counts.update(read_by(deal, rank, count, seed))
        past.append((ranks, count))
    assert set(counts.values()) <= {1}, "a sample was read twice in an epoch"
    # what the next world of one rank has yet to read completes every epoch that has begun
    left = Deal.of(samples, 1, seed, past)
    counts.update((epoch, int(index)) for epoch, part in left.leads[0] for index in part)
    whole = {(epoch, index) for epoch in range(left.first_epoch) for index in range(samples)}
    assert counts == Counter(whole)


def test_without_a_change_shards_and_orders_are_as_ever() -> None:
    deal = Deal.of(50, 3, 7, [])
    assert deal.leads == [[], [], []]
    assert deal.first_epoch == 0
    assert sorted(np.concatenate(deal.shards).tolist()) == list(range(50))
