"""Tensors of a model as views into a few flat buffers, so that an average is a few large collectives in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch

from trainer.errors import ConfigError

ALIGNMENT_BYTES = 128
Kind = tuple[torch.dtype, torch.device]


class FlatTensors:
    """The non-empty tensors that `read()` lists, held in one 1-d buffer a dtype and device.

    A tensor keeps its shape and strides (channels_last too) and its identity, so an optimizer goes on with it. The
    space between two tensors is zero.

    Raises:
        ConfigError: two different tensors share memory.
    """

    def __init__(self, read: Callable[[], Iterable[torch.Tensor]]) -> None:
        self._read = read
        tensors = self._tensors()
        _refuse_overlap(tensors)
        self._described = [_describe(tensor) for tensor in tensors]
        ends: dict[Kind, int] = {}
        starts: list[int] = []
        for tensor in tensors:
            kind = (tensor.dtype, tensor.device)
            starts.append(ends.get(kind, 0))
            step = ALIGNMENT_BYTES // tensor.element_size()
            ends[kind] = -(-(starts[-1] + tensor.numel()) // step) * step
        self._flat = {
            (dtype, device): torch.zeros(end, dtype=dtype, device=device) for (dtype, device), end in ends.items()
        }
        self._views = []
        for tensor, start in zip(tensors, starts, strict=True):
            strides = torch.empty_like(tensor, device="meta").stride()  # dense, in the tensor's own order
            flat = self._flat[tensor.dtype, tensor.device]
            self._views.append(flat.as_strided(tensor.shape, strides, start))
        self._pointers = [view.data_ptr() for view in self._views]
        self.adopt()

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The flat buffers, real and 1-d, one a dtype and device, in an order that is the same on every rank."""
        return [real_view(flat).view(-1) for flat in self._flat.values()]

    def places(self) -> list[tuple[int, int, slice]]:
        """Each tensor's id, the number of its flat buffer, and its place there."""
        kinds, found = list(self._flat), []
        for tensor, view in zip(self._tensors(), self._views, strict=True):
            factor = 2 if view.is_complex() else 1
            start = view.storage_offset() * factor
            number = kinds.index((view.dtype, view.device))
            found.append((id(tensor), number, slice(start, start + view.numel() * factor)))
        return found

    def views_of(self, flats: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views into other flat buffers of these sizes, each shaped as the tensor that lies there in these."""
        kinds, found = list(self._flat), []
        for view in self._views:
            flat = flats[kinds.index((view.dtype, view.device))]
            values = torch.view_as_complex(flat.view(-1, 2)) if view.is_complex() else flat
            found.append(values.as_strided(view.shape, view.stride(), view.storage_offset()))
        return found

    @torch.no_grad()
    def release(self) -> None:
        """Give every tensor memory of its own, so that a part of the model can be saved by itself."""
        for tensor, view in zip(self._tensors(), self._views, strict=True):
            if tensor.data_ptr() == view.data_ptr():
                tensor.data = view.clone()

    @torch.no_grad()
    def adopt(self) -> list[torch.Tensor]:
        """The flat buffers, once every tensor is in its place: also one that its module has replaced or moved.

        Raises:
            ConfigError: the tensors are no longer of the shapes and types that they were.
        """
        tensors = self._tensors()
        if [tensor.data_ptr() for tensor in tensors] == self._pointers:
            return self.buffers
        if [_describe(tensor) for tensor in tensors] != self._described:
            raise ConfigError(_changed(self._described, tensors))
        for tensor, view in zip(tensors, self._views, strict=True):
            if tensor.data_ptr() != view.data_ptr():
                view.copy_(tensor)
                tensor.data = view
        return self.buffers

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in self._read() if tensor.numel()]


def real_view(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a complex one's real and imaginary parts in a last dimension of two, in the same memory."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def piece_values(device: torch.device) -> int:
    """So many values at a time: enough to be worth an operation's start, few enough that what is needed besides is a
    megabyte or so, however large the model is. Larger scratch is given back and faulted in again by many an allocator,
    which took longer than the operations."""
    return 2**22 if device.type == "cuda" else 2**18


def pieces(count: int, device: torch.device) -> Iterator[slice]:
    """The places of such pieces of `count` values, in turn."""
    size = piece_values(device)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _describe(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _changed(before: list[tuple[torch.Size, torch.dtype, torch.device]], tensors: list[torch.Tensor]) -> str:
    """How the tensors differ from what they were, in one line."""
    mend = "set up, cast and move the model before LocalSGD, or leave its block first"
    if len(tensors) != len(before):
        return f"the model has {len(tensors)} trained parameters where it had {len(before)}: {mend}"
    place = next(place for place, tensor in enumerate(tensors) if _describe(tensor) != before[place])
    was, now = ([*tuple(map(str, facts))] for facts in (before[place], _describe(tensors[place])))
    return f"trained parameter {place} is {' '.join(now)} where it was {' '.join(was)}: {mend}"


def _refuse_overlap(tensors: list[torch.Tensor]) -> None:
    spans = []
    for tensor in tensors:
        last = sum((size - 1) * abs(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        spans.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size()))
    spans.sort()
    for (device, _, end), (next_device, begin, _) in pairwise(spans):
        if device == next_device and begin <= end:
            raise ConfigError("model has two parameters or buffers that share memory: tie them as one Parameter")
