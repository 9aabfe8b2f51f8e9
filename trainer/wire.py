"""Number formats of averaged values on the network: how many bytes a value takes there, and what is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

BLOCK = 128
"""Values that share one scale; every row that is encoded holds a multiple of it."""


class Format(Protocol):
    """Rows of values, (rows, count) of a floating type, as rows of bytes, (rows, row_bytes(count)) uint8, and back.

    Encoding and decoding may take a row piece by piece: `values` are then (rows, some), and `first`, a multiple of
    BLOCK, says how many values of the row come before them.
    """

    def row_bytes(self, count: int) -> int:
        """Bytes of a row of `count` values, a multiple of BLOCK."""

    def encode(self, values: torch.Tensor, coded: torch.Tensor, first: int = 0) -> None:
        """Write `values` into `coded`."""

    def decode(self, coded: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        """Write what `coded` says into `values`."""


@dataclass(frozen=True)
class Cast:
    """Values rounded to another floating type."""

    dtype: torch.dtype

    def row_bytes(self, count: int) -> int:
        """`dtype`'s own bytes."""
        return count * self.dtype.itemsize

    def encode(self, values: torch.Tensor, coded: torch.Tensor, first: int = 0) -> None:
        """Round to nearest."""
        coded.view(self.dtype)[:, first : first + values.shape[1]].copy_(values)

    def decode(self, coded: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        """Exact."""
        values.copy_(coded.view(self.dtype)[:, first : first + values.shape[1]])


@dataclass(frozen=True)
class Blocks:
    """Whole numbers of -levels .. levels times a float32 scale a block: off by at most half a scale.

    A block's scale is its largest magnitude over `levels`. A value that is not finite makes its whole block NaN.
    Four-bit numbers are packed in twos, a block's first half beside its second.
    """

    bits: int

    @property
    def levels(self) -> int:
        """The largest whole number."""
        return int(2 ** (self.bits - 1) - 1)

    def row_bytes(self, count: int) -> int:
        """The numbers, then the scales."""
        return self._code_bytes(count) + count // BLOCK * 4

    def encode(self, values: torch.Tensor, coded: torch.Tensor, first: int = 0) -> None:
        """Round to nearest."""
        blocks = values.reshape(len(values), -1, BLOCK).float()
        codes, kept = self._views(coded, first, blocks.shape[1])
        scales = blocks.abs().amax(dim=2).div_(self.levels)
        inverse = torch.where(scales > 0, scales.reciprocal(), 0.0)
        numbers = (blocks * inverse.unsqueeze(2)).round_()
        kept.copy_(scales)
        if self.bits == 8:
            codes.view(torch.int8).copy_(numbers)
        else:
            low, high = numbers.tensor_split(2, dim=2)
            codes.copy_(high.add_(8).mul_(16).add_(low.add_(8)))

    def decode(self, coded: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        """Number times scale."""
        blocks = values.view(len(values), -1, BLOCK)
        codes, scales = self._views(coded, first, blocks.shape[1])
        if self.bits == 8:
            blocks.copy_(codes.view(torch.int8))
        else:
            low, high = blocks.tensor_split(2, dim=2)
            low.copy_(codes & 15).sub_(8)
            high.copy_(codes >> 4).sub_(8)
        blocks.mul_(scales.unsqueeze(2))

    def _code_bytes(self, count: int) -> int:
        return count * self.bits // 8

    def _views(self, coded: torch.Tensor, first: int, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (rows, blocks, bytes of a block) and scales (rows, blocks) of the blocks that follow `first` values."""
        width, start = BLOCK * self.bits // 8, first // BLOCK
        codes, scales = coded.tensor_split([coded.shape[1] // (width + 4) * width], dim=1)
        codes = codes[:, start * width : (start + blocks) * width].view(len(coded), blocks, width)
        return codes, scales.view(torch.float32)[:, start : start + blocks]


FORMATS: dict[str, Format] = {"bf16": Cast(torch.bfloat16), "int8": Blocks(8), "int4": Blocks(4)}
"""The formats that lose something, by name."""
