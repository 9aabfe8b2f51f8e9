"""A data set of numbers, and a stream of one shard of it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

from trainer.config.config import DataConfig
from trainer.data import DataPart, ShardStream, shard_of
from trainer.distributed.world import World


class Numbers(Dataset[Any]):
    """Item i is i; notes which items were opened in this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.opened: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.opened.append(index)
        return torch.tensor([float(index)]), index


def stream(
    size: int, ranks: int, rank: int, *, workers: int = 0, tensors: bool = False, items: Any = None
) -> ShardStream:
    world = World(rank=rank, size=ranks)
    items = items or (
        TensorDataset(torch.arange(size).float()[:, None], torch.arange(size)) if tensors else Numbers(size)
    )
    shard = shard_of("iid", size, ranks, rank, seed=3)
    return ShardStream(DataPart(items, 10).subset(shard), DataConfig(workers=workers), world, seed=3)
