"""Pictures on the device, a batch at a time: scale, normalise, pad and crop, flip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from trainer.config.config import DataConfig
from trainer.data.sets import DataPart


@dataclass
class Transform:
    """From stored inputs to the model's.

    uint8 pictures [B, C, H, W] become normalised float32; inputs of any other type are left as they are, since their
    data set has prepared them itself. Augmentation draws from a seed of the caller's, so it repeats exactly.
    """

    device: torch.device
    mean: torch.Tensor
    inverse_std: torch.Tensor
    crop_padding: int = 0
    flip: bool = False

    @classmethod
    def of(cls, part: DataPart, config: DataConfig, device: torch.device, *, train: bool) -> Transform:
        """The transform of a data set's training or test part."""
        mean = 255 * torch.tensor(part.mean or (0.5,), device=device)
        std = 255 * torch.tensor(part.std or (0.5,), device=device)
        augment = (config.crop_padding, config.flip) if train else (0, False)
        return cls(device, mean.view(1, -1, 1, 1), 1 / std.view(1, -1, 1, 1), *augment)

    def __call__(self, inputs: torch.Tensor, seed: tuple[int, ...] | None = None) -> torch.Tensor:
        """Without a seed nothing is drawn: the pictures are only normalised."""
        if inputs.dtype == torch.uint8:
            inputs = inputs.to(torch.float32).sub_(self.mean).mul_(self.inverse_std)
        if seed is None or not (self.crop_padding or self.flip):
            return inputs
        mixed = int(np.random.SeedSequence([5, *seed]).generate_state(1, np.uint64)[0] >> np.uint64(1))
        draw = torch.Generator(self.device).manual_seed(mixed)
        if self.crop_padding:
            inputs = self._crop(inputs, draw)
        if self.flip:
            mirrored = torch.rand(len(inputs), 1, 1, 1, generator=draw, device=self.device) < 0.5
            inputs = torch.where(mirrored, inputs.flip(3), inputs)
        return inputs

    def _crop(self, inputs: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        count, channels, height, width = inputs.shape
        padded = F.pad(inputs, [self.crop_padding] * 4)
        top, left = torch.randint(2 * self.crop_padding + 1, (2, count, 1), generator=draw, device=self.device)
        rows = top + torch.arange(height, device=self.device)
        columns = left + torch.arange(width, device=self.device)
        each = torch.arange(count, device=self.device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=self.device).view(1, -1, 1, 1)
        return padded[each, channel, rows[:, None, :, None], columns[:, None, None, :]]
