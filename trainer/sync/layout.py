"""The layout of a model: what all ranks must have alike before values can be averaged, and what cannot be averaged."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from trainer.distributed.collectives import Collectives
from trainer.errors import ConfigError, MismatchError
from trainer.wire.flat import pieces, real_view

Described = tuple[str, tuple[int, ...], tuple[int, ...], str, bool, int | None]
FACTS = ("name", "shape", "strides", "type", "requires_grad", "place in the optimizer")


@dataclass(frozen=True)
class Layout:
    """Facts of a model and its optimizer that ranks must have alike, besides values.

    Of every parameter its name, shape, strides, type, `requires_grad` and place in the optimizer; of every buffer that
    is saved its name, shape and type; and the optimizer's class.
    """

    parameters: tuple[Described, ...]
    buffers: tuple[tuple[str, tuple[int, ...], str], ...]
    optimizer: str
    seen: tuple[tuple[Mapping[str, Any], tuple[tuple[int, bool], ...]], ...] = field(compare=False)
    """Every module's own parameters, as its table and as they were."""
    inside: tuple[tuple[Mapping[str, Any], tuple[int, ...]], ...] = field(compare=False)
    """Every module's own modules, likewise."""

    @classmethod
    def of(cls, model: nn.Module, optimizer: Optimizer, trained: Container[str] | None = None) -> Layout:
        """As the model is now; where names are given, as if these parameters and no others required a gradient."""
        stepped = (parameter for group in optimizer.param_groups for parameter in group["params"])
        places = {id(parameter): place for place, parameter in enumerate(stepped)}
        described = []
        for name, p in model.named_parameters():
            strides = tuple(torch.empty_like(p, device="meta").stride())
            needs = p.requires_grad if trained is None else name in trained
            described.append((name, tuple(p.shape), strides, str(p.dtype), needs, places.get(id(p))))
        modules = list(model.modules())
        flags = {id(p): row[4] for p, row in zip(model.parameters(), described, strict=True)}
        seen = tuple((module._parameters, _identities(module._parameters, flags)) for module in modules)
        inside = tuple((module._modules, tuple(map(id, module._modules.values()))) for module in modules)
        return cls(tuple(described), tuple(_saved_buffers(model)), type(optimizer).__name__, seen, inside)

    def differs(self) -> bool:
        """Whether the model has other parameters by now, or others that require a gradient; quickly told."""
        return any(_identities(table) != before for table, before in self.seen) or any(
            tuple(map(id, table.values())) != before for table, before in self.inside
        )

    @cached_property
    def digest(self) -> int:
        """Fingerprint of all that is compared."""
        return zlib.crc32(repr((self.parameters, self.buffers, self.optimizer)).encode())

    def described(self) -> dict[str, str]:
        """By name, what a rank that comes later must have alike; which layers are frozen it takes from the others."""
        told = {"optimizer": self.optimizer}
        for name, shape, strides, kind, _, place in self.parameters:
            told[f"parameter {name!r}"] = f"{shape} in strides {strides} of {kind} at place {place} in the optimizer"
        return told | {f"buffer {name!r}": f"{shape} of {kind}" for name, shape, kind in self.buffers}

    @staticmethod
    def compare(mine: Layout, via: Collectives) -> None:
        """Make sure that all ranks have one layout.

        Raises:
            MismatchError: names the first parameter that differs, and its ranks.
        """
        digests = {rank["digest"] for rank in via.gather({"digest": mine.digest})}
        if len(digests) == 1:
            return
        optimizers = via.gather_objects(mine.optimizer)
        if len(set(optimizers)) > 1:
            raise MismatchError(f"optimizers differ: {_sides(optimizers)}; build one optimizer on all ranks")
        said = _first_difference(via.gather_objects(mine.parameters))
        if not said:
            said = _first_buffer(via.gather_objects(mine.buffers))
        raise MismatchError(said)


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
            values = [row[place] if row else None for row in rows]
            if len(set(values)) > 1:
                sides = _sides(values)
                named = fact != "name" and rows[0] is not None
                what = f"parameter {rows[0][0]!r}: {fact}" if named and rows[0] else f"parameter {number}: name"
                return f"models differ: {what} is {sides}; build one model and one optimizer on all ranks"
    return ""


def _first_buffer(everyone: Sequence[Sequence[tuple[Any, ...]]]) -> str:
    """The first saved buffer in which ranks differ, in one line."""
    tables = [{name: (shape, kind) for name, shape, kind in theirs} for theirs in everyone]
    names = dict.fromkeys(name for table in tables for name in table)
    name = next(name for name in names if len({table.get(name) for table in tables}) > 1)
    sides = _sides(["missing" if name not in table else " ".join(map(str, table[name])) for table in tables])
    return f"models differ: buffer {name!r} is {sides}; build one model on all ranks"


def _sides(values: Sequence[Any]) -> str:
    """Which ranks have which value."""
    by_value: dict[Any, list[int]] = {}
    for rank, value in enumerate(values):
        by_value.setdefault(value, []).append(rank)
    return " but ".join(f"{value} on rank {_list(ranks)}" for value, ranks in by_value.items())


def _identities(table: Mapping[str, Any], flags: Mapping[int, bool] | None = None) -> tuple[tuple[int, bool], ...]:
    """A module's own parameters, and whether each requires a gradient, now or by these flags."""
    own = (p for p in table.values() if p is not None)
    return tuple((id(p), p.requires_grad if flags is None else flags[id(p)]) for p in own)


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], str]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}".lstrip("."), tuple(buffer.shape), str(buffer.dtype)


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
    _refuse_aliases(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("model has no parameter that requires a gradient: set requires_grad before LocalSGD")


def _refuse_aliases(model: nn.Module) -> None:
    """Refuse a buffer or frozen parameter that lies in a trained parameter's memory, which is to move.

    Raises:
        ConfigError: names both.
    """
    trained = {p.untyped_storage().data_ptr(): name for name, p in model.named_parameters() if _moves(p)}
    frozen = ((name, p) for name, p in model.named_parameters() if not p.requires_grad and p.layout == torch.strided)
    for name, tensor in (*frozen, *model.named_buffers()):
        if tensor.layout == torch.strided and not tensor.is_meta and tensor.numel():
            other = trained.get(tensor.untyped_storage().data_ptr())
            if other is not None:
                raise ConfigError(
                    f"{name!r} shares memory with the trained parameter {other!r}: register a copy, or the Parameter"
                )


def _moves(parameter: torch.Tensor) -> bool:
    return parameter.requires_grad and parameter.numel() > 0 and not isinstance(parameter, UninitializedParameter)


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


def movable(tensor: torch.Tensor) -> bool:
    """Whether a tensor has values of its own that can be written: no expanded, conjugate, empty or meta tensor."""
    plain = tensor.layout == torch.strided and not tensor.is_meta and tensor.numel() > 0
    return plain and not tensor.is_conj() and not tensor.is_neg() and torch._debug_has_internal_overlap(tensor) != 1


def fingerprint(tensor: torch.Tensor) -> int:
    """A number that changes when the tensor's bits do, or their order, or its shape or type."""
    flat = real_view(tensor.detach()).contiguous().view(-1)
    bits = flat.view(_WHOLE.get(flat.element_size(), torch.uint8))
    whole: Any = bits.numpy() if bits.device.type == "cpu" else None
    total = _weighted_sum(bits) if whole is None else zlib.crc32(whole)
    return zlib.crc32(repr((total, tuple(tensor.shape), str(tensor.dtype))).encode())


_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = 0x9E3779B97F4A7C15 - 2**64
"""An odd number that a place is multiplied by, so that each place counts differently."""


def _weighted_sum(bits: torch.Tensor) -> int:
    """On a device, where reading all values back would take long: whole numbers, each times its place's number."""
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for place in pieces(len(bits), bits.device):
        numbers = torch.arange(place.start, place.stop, dtype=torch.int64, device=bits.device).mul_(_ODD).bitwise_or_(1)
        total += (bits[place].to(torch.int64) * numbers).sum()
    return int(total)
