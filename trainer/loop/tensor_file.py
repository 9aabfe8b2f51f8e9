"""Files of named tensors in the safetensors format: a JSON header, then bytes, and nothing that runs.

Written here, not by the package of that name, because a checkpoint needs what the package does not do: one pass that
writes, takes the checksum and ends on the disk, without a copy of the model in memory; and types that the format lacks.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KINDS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Types that every reader of the format knows."""
DTYPES = {name: dtype for dtype, name in KINDS.items()}
MOST_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Checksum:
    """What a file must be."""

    bytes: int
    blake2b: str

    @classmethod
    def of(cls, path: Path) -> Checksum:
        """Of a file as it is now."""
        with open(path, "rb") as file:
            return cls(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, _hash).hexdigest())


def _hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def digest(tensor: torch.Tensor) -> str:
    """The same for tensors of the same type, shape and bits."""
    hashed = _hash()
    hashed.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    hashed.update(as_bytes(tensor))
    return str(hashed.hexdigest())


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's bytes in row-major order."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1)
    whole: Any = flat.view(torch.uint8).numpy() if flat.numel() else b""
    return memoryview(whole)


def write_bytes(path: Path, parts: Iterable[bytes | memoryview]) -> Checksum:
    """Write a file that is on the disk when this returns; its checksum."""
    hashed, count = _hash(), 0
    with open(path, "wb") as file:
        for part in parts:
            file.write(part)
            hashed.update(part)
            count += len(part)
        file.flush()
        os.fsync(file.fileno())
    return Checksum(count, hashed.hexdigest())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str] | None = None) -> Checksum:
    """Write CPU tensors of the types of `KINDS`; `about` is the file's metadata."""
    wide_first = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(about)} if about else {}
    start = 0
    for name, tensor in wide_first.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    coded = json.dumps(header).encode()
    coded += b" " * (-len(coded) % 8)
    return write_bytes(path, _parts(coded, wide_first.values()))


def _parts(header: bytes, tensors: Iterable[torch.Tensor]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    yield from map(as_bytes, tensors)


def read_tensors(path: Path, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
    """Tensors of a file by name, all or these.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such file, or lacks one of these tensors.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
            raise ValueError(f"{path.name} has no header")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name in header if names is None else names:
            if name not in header:
                raise ValueError(f"{path.name} holds no {name!r}")
            dtype, shape, (start, end) = (header[name][key] for key in ("dtype", "shape", "data_offsets"))
            tensor = torch.empty(shape, dtype=DTYPES[dtype])
            if not 0 <= start <= end <= size - 8 - length or end - start != tensor.nbytes:
                raise ValueError(f"{path.name}: {name!r} lies outside the file")
            file.seek(8 + length + start)
            if tensor.numel() and file.readinto(as_bytes(tensor)) != tensor.nbytes:
                raise ValueError(f"{path.name} ends within {name!r}")
            found[name] = tensor
        return found


def as_stored(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or its bytes where the format does not know its type."""
    if tensor.dtype in KINDS:
        return tensor
    return torch.frombuffer(bytearray(as_bytes(tensor)), dtype=torch.uint8) if tensor.numel() else torch.empty(0)


def as_it_was(stored: torch.Tensor, dtype: str, shape: list[int]) -> torch.Tensor:
    """A tensor of this type and shape from what `as_stored` made of it."""
    kind = getattr(torch, dtype)
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=kind)
    return stored.view(kind).view(shape)
