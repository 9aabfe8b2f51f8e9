"""The layout of a model: what all ranks must have alike before values can be averaged, and what cannot be averaged."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from trainer.distributed.collectives import Collectives
from trainer.errors import ConfigError, MismatchError
from trainer.wire.flat import real_view

Described = tuple[str, tuple[int, ...], tuple[int, ...], str, bool, bool]
FACTS = ("name", "shape", "strides", "type", "requires_grad", "in the optimizer")


@dataclass(frozen=True)
class Layout:
    """Names, shapes, strides, types, `requires_grad` and the optimizer's membership of a model's parameters."""

    parameters: tuple[Described, ...]
    identities: tuple[tuple[int, bool], ...]

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer) -> Layout:
        """As the model is now."""
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        described, identities = [], []
        for name, p in model.named_parameters():
            strides = tuple(torch.empty_like(p, device="meta").stride())
            described.append((name, tuple(p.shape), strides, str(p.dtype), p.requires_grad, id(p) in stepped))
            identities.append((id(p), p.requires_grad))
        return cls(tuple(described), tuple(identities))

    def differs(self, model: nn.Module) -> bool:
        """Whether the model has other parameters by now, or others that require a gradient; quickly told."""
        return tuple((id(p), p.requires_grad) for p in model.parameters()) != self.identities

    @cached_property
    def digest(self) -> int:
        """Fingerprint of all but identities, which are each process's own."""
        return zlib.crc32(repr(self.parameters).encode())

    @staticmethod
    def compare(mine: Layout, via: Collectives) -> None:
        """Make sure that all ranks have one layout.

        Raises:
            MismatchError: names the first parameter that differs, and its ranks.
        """
        digests = {rank["digest"] for rank in via.gather({"digest": mine.digest})}
        if len(digests) > 1:
            raise MismatchError(_first_difference(via.gather_objects(mine.parameters)))


def _first_difference(everyone: Sequence[Sequence[Described]]) -> str:
    """The first parameter in which ranks differ, in one line."""
    for number in range(max(len(theirs) for theirs in everyone)):
        rows = [theirs[number] if number < len(theirs) else None for theirs in everyone]
        if len(set(rows)) == 1:
            continue
        missing = [rank for rank, row in enumerate(rows) if row is None]
        if missing:
            name = next(row[0] for row in rows if row is not None)
            return f"models differ: parameter {name!r} is missing on rank {_list(missing)}; build one on all ranks"
        for place, fact in enumerate(FACTS):
            values: dict[Any, list[int]] = {}
            for rank, row in enumerate(rows):
                values.setdefault(row[place] if row else None, []).append(rank)
            if len(values) > 1:
                sides = " but ".join(f"{value} on rank {_list(ranks)}" for value, ranks in values.items())
                named = fact != "name" and rows[0] is not None
                what = f"parameter {rows[0][0]!r}: {fact}" if named and rows[0] else f"parameter {number}: name"
                return f"models differ: {what} is {sides}; build one model and one optimizer on all ranks"
    return "models differ; build one model on all ranks"


def _list(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def refuse_model(model: nn.Module) -> None:
    """Refuse what cannot be averaged.

    Raises:
        ConfigError: names the parameter or module, and the mend.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp is not None else ()
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | DataParallel):
            where = f"module {name!r} of the model" if name else "model"
            raise ConfigError(
                f"{where} is under {type(module).__name__}: pass the model itself, LocalSGD averages its gradients"
            )
        if sharded and isinstance(module, sharded):
            raise ConfigError(f"model is sharded ({type(module).__name__}): not supported yet; pass an unsharded model")
    for name, parameter in model.named_parameters():
        _refuse_parameter(name, parameter)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("model has no parameter that requires a gradient: set requires_grad before LocalSGD")


def _refuse_parameter(name: str, parameter: torch.Tensor) -> None:
    if isinstance(parameter, UninitializedParameter | UninitializedBuffer):
        raise ConfigError(f"parameter {name!r} is lazy and has no shape yet: run one forward pass before LocalSGD")
    if parameter.is_meta:
        raise ConfigError(f"parameter {name!r} is on meta and has no values: move the model to a device with to_empty")
    if hasattr(parameter, "device_mesh") or type(parameter).__name__ == "DTensor":
        raise ConfigError(
            f"parameter {name!r} is sharded (a DTensor, of fully_shard or tensor parallel): not supported yet; pass an "
            "unsharded model"
        )
    if parameter.layout != torch.strided:
        raise ConfigError(f"parameter {name!r} is stored as {parameter.layout}: make it dense before LocalSGD")
    if parameter.requires_grad and parameter.dtype not in _AVERAGED:
        raise ConfigError(f"parameter {name!r} is of type {parameter.dtype}, which no backend can average; freeze it")


_AVERAGED = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128),
)


def refuse_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that trains something else than the model.

    Raises:
        ConfigError: names the first parameter that is not the model's.
    """
    own = {id(parameter) for parameter in model.parameters()}
    every = [(n, place, p) for n, group in enumerate(optimizer.param_groups) for place, p in enumerate(group["params"])]
    others = [each for each in every if id(each[2]) not in own]
    total = len(every)
    if others and len(others) == total:
        raise ConfigError("optimizer has none of the model's parameters: build it over model.parameters()")
    if others:
        number, place, parameter = others[0]
        raise ConfigError(
            f"optimizer has {len(others)} parameter{'s' * (len(others) > 1)} that the model has not (first: group "
            f"{number}, place {place}, shape {tuple(parameter.shape)}): they would not be averaged; pass one module "
            "that holds them all, such as nn.ModuleList([model, head])"
        )


def movable(buffer: torch.Tensor) -> bool:
    """Whether a buffer can differ between ranks in a way that could be seen and mended."""
    return buffer.layout == torch.strided and not buffer.is_meta and buffer.numel() > 0


def fingerprint(tensor: torch.Tensor) -> int:
    """A number that changes when the tensor's bits do, or its shape or type.

    Two sums over the bits, the second weighted by place in blocks, so that values that swap places are noticed.
    """
    flat = real_view(tensor.detach()).contiguous().view(-1)
    bits = flat.view(_WHOLE[flat.element_size()]) if flat.element_size() in _WHOLE else flat.view(torch.uint8)
    total = int(bits.sum(dtype=torch.int64))
    return zlib.crc32(repr((total, *_block_sums(bits), tuple(tensor.shape), str(tensor.dtype))).encode())


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SUMS = 8


def _block_sums(bits: torch.Tensor) -> Iterator[int]:
    """Sums of every eighth value, from each of the first eight on."""
    if len(bits) >= _SUMS:
        whole = bits[: len(bits) // _SUMS * _SUMS].view(-1, _SUMS)
        yield from whole.sum(dim=0, dtype=torch.int64).tolist()
