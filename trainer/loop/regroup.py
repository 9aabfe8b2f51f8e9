"""A checkpoint of another number of ranks: the consensus of its replicas, for each of the ranks that there are now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.config.sync import StatePolicy
from trainer.loop.manifest import files_of, load_rank
from trainer.sync.regroup import weights_of_replicas


def consensus(folder: Path, ranks: int, policy: StatePolicy) -> dict[str, Any]:
    """Rank 0's state with the model that is the mean of all replicas, and the optimizer's state as `sync.state` says:
    the mean of all ranks', or none.

    Args:
        folder: the checkpoint.
        ranks: that wrote it.
        policy: `sync.state`.
    """
    trees = [json.loads((folder / files_of(rank)[0]).read_text())["state"] for rank in range(ranks)]
    weights = weights_of_replicas([tree["sync"]["timetable"] for tree in trees])
    first = load_rank(folder, 0)
    model, optimizer = Mean(first["model"], weights[0]), Mean(_flat(first["optimizer"]), 1 / ranks)
    places = {first["consumed"]}
    for rank in range(1, ranks):
        state = load_rank(folder, rank)
        model.add(state["model"], weights[rank])
        optimizer.add(_flat(state["optimizer"]), 1 / ranks)
        places.add(state["consumed"])
    assert len(places) == 1, "ranks of one run read as many samples"
    groups = first["optimizer"]["param_groups"]
    state = {} if policy == "reset" else _nested(optimizer.result())
    return {**first, "model": model.result(), "optimizer": {"state": state, "param_groups": groups}}


class Mean:
    """Means of tables of tensors: weighted means of floating-point ones, the largest of counts, else the first.

    What is the same on all stays as it is, to the bit.
    """

    def __init__(self, first: Mapping[Any, Any], weight: float) -> None:
        self._first = dict(first)
        self._sums: dict[Any, tuple[torch.Tensor, float]] = {}
        self._given: dict[Any, float] = dict.fromkeys(first, weight)

    def add(self, other: Mapping[Any, Any], weight: float) -> None:
        """One more, by its weight."""
        for key, value in other.items():
            if key not in self._first:
                self._first[key], self._given[key] = value, weight
            elif torch.is_tensor(value) and (value.is_floating_point() or value.is_complex()):
                self._add(key, value, weight)
            elif torch.is_tensor(value) and value.dtype != torch.bool:
                self._first[key] = torch.maximum(self._first[key], value)
            elif isinstance(value, int | float):
                self._first[key] = max(self._first[key], value)

    def _add(self, key: Any, value: torch.Tensor, weight: float) -> None:
        mine = self._first[key]
        if key not in self._sums:
            if torch.equal(mine, value):
                self._given[key] += weight
                return
            self._sums[key] = wide(mine) * self._given[key], self._given[key]
        total, given = self._sums[key]
        self._sums[key] = total.add_(wide(value), alpha=weight), given + weight

    def result(self) -> dict[Any, Any]:
        """The means."""
        means = {}
        for key, (total, given) in self._sums.items():
            means[key] = (total / given).to(self._first[key].dtype) if given else self._first[key]
        return {**self._first, **means}


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _flat(optimizer: Mapping[str, Any]) -> dict[Any, Any]:
    return {(number, key): value for number, held in optimizer["state"].items() for key, value in held.items()}


def _nested(flat: Mapping[Any, Any]) -> dict[Any, Any]:
    nested: dict[Any, dict[str, Any]] = {}
    for (number, key), value in flat.items():
        nested.setdefault(number, {})[key] = value
    return nested
