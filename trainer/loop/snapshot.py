"""A state as JSON values and tensors, and back, exactly: what a checkpoint writes, taken at one moment."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.loop.tensor_file import KINDS, as_it_was

Get = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """A state as it was: training may go on beside it."""

    tree: Any
    """JSON values. A table with one key that begins with $ stands for what JSON has not."""
    tensors: Mapping[str, torch.Tensor]
    """Copies on the CPU, by their path in the state."""

    @classmethod
    def of(cls, state: Any) -> Snapshot:
        """Copy a state of tables, lists, tuples, numbers, texts, bytes, None, arrays and tensors.

        Raises:
            TypeError: names the path of a value of another kind.
        """
        tensors: dict[str, torch.Tensor] = {}
        return cls(_coded(state, "", tensors), tensors)


def restored(tree: Any, get: Get) -> Any:
    """The state whose tree this is; `get` has its tensors by path."""
    if isinstance(tree, list):
        return [restored(each, get) for each in tree]
    if not isinstance(tree, dict):
        return tree
    kind = next(iter(tree), "")
    if len(tree) != 1 or not kind.startswith("$"):
        return {name: restored(each, get) for name, each in tree.items()}
    return _RESTORE[kind](tree[kind], get)


def _coded(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, torch.Tensor):
        return _coded_tensor(value, path, tensors)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufcSU":
        return _coded_array(value, path, tensors)
    if kind is bytes:
        return {"$bytes": base64.b64encode(value).decode()}
    if isinstance(value, list | tuple):
        items = [_coded(each, f"{path}.{place}", tensors) for place, each in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if isinstance(value, Mapping):
        return _coded_table(value, path, tensors)
    raise TypeError(f"state{path} is a {kind.__name__}, which a checkpoint cannot hold")


def _coded_table(table: Mapping[Any, Any], path: str, tensors: dict[str, torch.Tensor]) -> Any:
    plain = all(type(key) is str for key in table) and not (len(table) == 1 and next(iter(table)).startswith("$"))
    if plain:
        return {key: _coded(value, f"{path}.{key}", tensors) for key, value in table.items()}
    items = table.items()
    return {"$table": [[_coded(key, path, tensors), _coded(each, f"{path}.{key}", tensors)] for key, each in items]}


def _coded_tensor(value: torch.Tensor, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        raise TypeError(f"state{path} is a tensor stored as {value.layout}, which a checkpoint cannot hold")
    name = path.removeprefix(".")
    while name in tensors:  # two keys of one text, such as 1 and "1"
        name += "'"
    copied = torch.empty(value.shape, dtype=value.dtype)
    tensors[name] = copied.copy_(value.detach())
    if value.dtype in KINDS:
        return {"$tensor": name}
    return {"$typed": [name, str(value.dtype).removeprefix("torch."), list(value.shape)]}


def _coded_array(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    array = np.asarray(value)
    flat = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.size else torch.empty(0)
    coded = _coded_tensor(flat, path, tensors)["$tensor"]
    return {"$array": [coded, array.dtype.str, list(array.shape), isinstance(value, np.generic)]}


def _array(coded: Any, get: Get) -> Any:
    name, kind, shape, is_scalar = coded
    array = np.frombuffer(get(name).numpy().tobytes(), dtype=np.dtype(kind)).reshape(shape).copy()
    return array[()] if is_scalar else array


_RESTORE: dict[str, Callable[[Any, Get], Any]] = {
    "$float": lambda coded, get: float(coded),
    "$bytes": lambda coded, get: base64.b64decode(coded),
    "$tuple": lambda coded, get: tuple(restored(coded, get)),
    "$table": lambda coded, get: {restored(key, get): restored(value, get) for key, value in coded},
    "$tensor": lambda coded, get: get(coded),
    "$typed": lambda coded, get: as_it_was(get(coded[0]), coded[1], coded[2]),
    "$array": _array,
}
