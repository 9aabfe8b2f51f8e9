"""Transfers between ranks: seconds of an all-reduce by its size, inside a node and between nodes."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.collectives import Collectives
from trainer.distributed.launcher import node_name
from trainer.distributed.world import World
from trainer.errors import ConfigError

SIZES = tuple(2**power for power in (10, 14, 17, 20, 22, 24))
"""Bytes of the buffers."""
REPEATS = 5
BUDGET_S = 8.0
"""Seconds for one level, after which larger sizes are left out."""


def measure_links(world: World) -> dict[str, dict[str, Any]]:
    """The levels of this world, by name: `node` is one machine's ranks, `network` goes between machines."""
    via = Collectives(world, None, 2**20)
    names = via.gather_objects(node_name())
    if len(set(names)) == 1:
        return {"node": _level(world, via)}
    if len(set(names)) == world.size:
        return {"network": _level(world, via)}
    try:
        levelled = world.with_nodes(names)
    except ConfigError:  # nodes with different numbers of ranks have no levels, but a network
        return {"network": _level(world, via)}
    within, between = levelled.new_levels()
    groups = {"node": within, "network": between}
    return {name: _level(world, Collectives(world, None, 2**20, group)) for name, group in groups.items()}


def _level(world: World, via: Collectives) -> dict[str, Any]:
    """Bytes that a rank sends, and the median seconds, from small to large."""
    points: list[tuple[float, float]] = []
    began = time.perf_counter()
    for size in SIZES:
        values = torch.zeros(size // 4, device=world.device)
        _seconds(values, via)  # warm up
        seconds = statistics.median(_seconds(values, via) for _ in range(REPEATS))
        slowest, spent = via.most_numbers([seconds, time.perf_counter() - began])
        points.append((2 * (via.size - 1) / via.size * size, slowest))
        if spent > BUDGET_S:
            break
    return {"ranks": via.size, "points": points}


def _seconds(values: torch.Tensor, via: Collectives) -> float:
    """Of one all-reduce that all ranks begin together."""
    dist.barrier(via.group)
    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)
    began = time.perf_counter()
    dist.all_reduce(values, group=via.group)
    if values.device.type == "cuda":
        torch.cuda.synchronize(values.device)
    return time.perf_counter() - began
