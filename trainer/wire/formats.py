"""Number formats of averaged values on the network: how many bytes a value takes there, and what is lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

BLOCK = 128
"""Values that share one scale; every row that is encoded holds a multiple of it."""


class Format(Protocol):
    """Rows of values, (rows, count) of float32 or wider, as rows of bytes, (rows, row_bytes(count)) uint8, and back.

    All may take a row piece by piece: `values` are then (rows, some), and `first`, a multiple of BLOCK, says how many
    values of the row come before them.
    """

    def row_bytes(self, count: int) -> int:
        """Bytes of a row of `count` values, a multiple of BLOCK."""

    def encode(self, values: torch.Tensor, coded: torch.Tensor, room: torch.Tensor, first: int = 0) -> None:
        """Write `values` into `coded`; they become what that lost. `room`, like `values`, is written over."""

    def decode(self, coded: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        """Write what `coded` says into `values`."""

    def mean(self, coded: torch.Tensor, shares: torch.Tensor, scratch: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The sum over the rows that `coded` (rows, bytes) says, each times its share (rows,): the first row of
        `scratch` (2, some). The same bits wherever the same is summed."""


@dataclass(frozen=True)
class Cast:
    """Values rounded to another floating type."""

    dtype: torch.dtype

    def row_bytes(self, count: int) -> int:
        """`dtype`'s own bytes."""
        return count * self.dtype.itemsize

    def encode(self, values: torch.Tensor, coded: torch.Tensor, room: torch.Tensor, first: int = 0) -> None:
        """Round to nearest."""
        numbers = self._numbers(coded, first, values.shape[1]).copy_(values)
        values.sub_(room.copy_(numbers))

    def decode(self, coded: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        """Exact."""
        values.copy_(self._numbers(coded, first, values.shape[1]))

    def mean(self, coded: torch.Tensor, shares: torch.Tensor, scratch: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Summed in `scratch`'s type."""
        numbers = self._numbers(coded, first, scratch.shape[1])
        total = scratch[0].copy_(numbers[0]).mul_(shares[0])
        for row, share in zip(numbers[1:], shares[1:], strict=True):
            total.addcmul_(scratch[1].copy_(row), share)
        return total

    def _numbers(self, coded: torch.Tensor, first: int, count: int) -> torch.Tensor:
        return coded.view(self.dtype)[:, first : first + count]


LEAST = 1e-30
"""The least magnitude that a block's largest counts as, so that a block of zeros has a scale to divide by."""


@dataclass(frozen=True)
class Blocks:
    """Whole numbers of -levels .. levels times a float32 scale a block: off by at most half a scale.

    A block's scale is its largest magnitude over `levels`. A value that is not finite makes its whole block NaN.
    Four-bit numbers are packed in twos, a block's first half beside its second.

    Few operations, in place where that can be: most of what hidden averages cost is memory gone cold.
    """

    bits: int

    @property
    def levels(self) -> int:
        """The largest whole number."""
        return int(2 ** (self.bits - 1) - 1)

    def row_bytes(self, count: int) -> int:
        """The numbers, then the scales."""
        return self._code_bytes(count) + count // BLOCK * 4

    def encode(self, values: torch.Tensor, coded: torch.Tensor, room: torch.Tensor, first: int = 0) -> None:
        """Round to nearest."""
        blocks = values.view(len(values), -1, BLOCK)
        codes, kept = self._views(coded, first, blocks.shape[1])
        largest = torch.maximum(blocks.amax(dim=2), blocks.amin(dim=2).neg_())
        kept.copy_(largest.clamp_min_(LEAST).div_(self.levels))
        scales = kept.to(values.dtype).unsqueeze(2)
        numbers = torch.mul(blocks, scales.reciprocal(), out=room.view(blocks.shape)).round_()
        if self.bits == 8:
            codes.view(torch.int8).copy_(numbers)
        else:
            low, high = numbers.to(torch.int8).add_(8).tensor_split(2, dim=2)
            codes.view(torch.int8).copy_(high.bitwise_left_shift_(4).bitwise_or_(low))
        blocks.addcmul_(numbers, scales, value=-1)

    def decode(self, coded: torch.Tensor, values: torch.Tensor, first: int = 0) -> None:
        """Number times scale."""
        blocks = values.view(len(values), -1, BLOCK)
        codes, scales = self._views(coded, first, blocks.shape[1])
        torch.mul(self._numbers(codes), scales.to(values.dtype).unsqueeze(2), out=blocks)

    def mean(self, coded: torch.Tensor, shares: torch.Tensor, scratch: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Numbers times scales that hold the shares."""
        total, row = scratch.view(2, -1, BLOCK)
        codes, scales = self._views(coded, first, total.shape[0])
        scales = (scales * shares.unsqueeze(1)).to(scratch.dtype).unsqueeze(2)
        torch.mul(self._numbers(codes[0]), scales[0], out=total)
        for numbers, scale in zip(codes[1:], scales[1:], strict=True):
            total.addcmul_(row.copy_(self._numbers(numbers)), scale)
        return scratch[0]

    def _numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """Whole numbers (..., BLOCK) int8 of codes (..., bytes of a block)."""
        if self.bits == 8:
            return codes.view(torch.int8)
        numbers = codes.new_empty(*codes.shape[:-1], BLOCK)
        low, high = numbers.tensor_split(2, dim=-1)
        torch.bitwise_and(codes, 15, out=low)
        torch.bitwise_right_shift(codes, 4, out=high)
        return numbers.view(torch.int8).sub_(8)

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
