"""How a data set is shared out: partitioners by name, each from labels to one index array a rank."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from trainer.errors import ConfigError

Indices = npt.NDArray[np.int64]
Partitioner = Callable[[int, int, int], list[Indices]]
PARTITIONERS: dict[str, Partitioner] = {}


def register_partition(name: str) -> Callable[[Partitioner], Partitioner]:
    """Decorator: make a partitioner `(samples, shards, seed) -> index arrays` known to `data.partition`.

    The arrays are disjoint and together hold every index; each rank computes all of them and keeps its own.
    """

    def add(partitioner: Partitioner) -> Partitioner:
        PARTITIONERS[name] = partitioner
        return partitioner

    return add


@register_partition("iid")
def iid(samples: int, shards: int, seed: int) -> list[Indices]:
    """A seeded shuffle cut into shards whose sizes differ by at most one."""
    order = np.random.default_rng([seed, 1]).permutation(samples).astype(np.int64)
    return np.array_split(order, shards)


def shard_of(name: str, samples: int, shards: int, rank: int, seed: int) -> Indices:
    """The samples of one global rank.

    Raises:
        ConfigError: no such partitioner, or a rank left without samples.
    """
    if name not in PARTITIONERS:
        raise ConfigError(f"data.partition = {name!r}: choose one of {', '.join(sorted(PARTITIONERS))}")
    if shards > samples:
        raise ConfigError(f"data set of {samples} samples: too few for {shards} ranks; start fewer ranks")
    shard = PARTITIONERS[name](samples, shards, seed)[rank]
    if not len(shard):
        raise ConfigError(f"data.partition = {name!r}: leaves rank {rank} without samples; start fewer ranks")
    return shard
