"""Batches of any nested kind: their length, their bytes, and their way to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def put(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor in it on `device`; what has a method `to` of its own is moved by it."""
    if device.type == "cpu":
        return batch  # read on the host, it is there

    def move(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return _pinned(leaf, device).to(device, non_blocking=True)
        return leaf.to(device) if callable(getattr(leaf, "to", None)) else leaf

    return mapped(batch, move)


def _pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor that the device can fetch beside training."""
    on_host = device.type == "cuda" and tensor.device.type == "cpu" and tensor.layout == torch.strided
    return tensor.pin_memory() if on_host else tensor  # one that is pinned already is returned as it is


def mapped(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A batch with every leaf changed; tuples, named tuples, lists and mappings keep their kind."""
    if isinstance(batch, torch.Tensor | str | bytes):
        return change(batch)
    if isinstance(batch, Mapping):
        if callable(getattr(batch, "to", None)):  # a tokenizer's batch
            return change(batch)
        changed = {name: mapped(value, change) for name, value in batch.items()}
        return changed if type(batch) is dict else _of_kind(batch, changed)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, change) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(mapped(value, change) for value in batch)
    return change(batch)


def _of_kind(batch: Any, changed: dict[Any, Any]) -> Any:
    try:
        return type(batch)(changed)
    except TypeError:  # a mapping that wants other arguments
        return changed


def leaves(batch: Any) -> Iterator[Any]:
    """The values at the bottom of a nested batch, in order."""
    if isinstance(batch, Mapping):
        for value in batch.values():
            yield from leaves(value)
    elif isinstance(batch, tuple | list) and not _of_samples(batch):
        for value in batch:
            yield from leaves(value)
    else:
        yield batch


def _of_samples(batch: Any) -> bool:
    """Whether a list holds one plain value a sample (strings, as they are put together by default)."""
    return bool(batch) and all(isinstance(value, str | bytes | int | float) for value in batch)


def length(batch: Any) -> int | None:
    """Samples of a batch: the length of its first tensor, else of its first value that has one; None without any."""
    found = list(leaves(batch))
    for leaf in found:
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return len(leaf)
    for leaf in found:
        if not isinstance(leaf, torch.Tensor | str | bytes) and hasattr(leaf, "__len__"):
            try:
                return len(leaf)
            except TypeError:  # a numpy array without dimensions
                continue
    return None


def nbytes(thing: Any) -> int:
    """Bytes of the tensors and arrays in a nested thing."""
    return sum(int(getattr(leaf, "nbytes", 0)) for leaf in leaves(thing))
