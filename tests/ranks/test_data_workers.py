"""Data read by worker processes: the same stream as without them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from numbered import Numbers, stream

from trainer.config.config import DataConfig
from trainer.data import ShardStream, open_part, shard_of
from trainer.distributed.world import World


class Noisy(Numbers):
    """Draws from every global random state, as a user's transforms may."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(torch.rand(())), float(np.random.rand())]), index


def test_both_ways_of_reading_give_one_stream_and_open_only_the_shard() -> None:
    numbers = Numbers(50)
    held, read, worked = stream(50, 2, 1, tensors=True), stream(50, 2, 1, items=numbers), stream(50, 2, 1, workers=2)
    for size in (3, 20, 1, 30, 7):
        expected = held.take(size)[1].tolist()
        assert read.take(size)[1].tolist() == expected
        assert worked.take(size)[1].tolist() == expected  # a new size holds at once, prefetched batches included
    worked.close()
    assert set(numbers.opened) == set(shard_of("iid", 50, 2, 1, seed=3).tolist())


@pytest.mark.parametrize("workers", [0, 2])
def test_random_transforms_of_a_data_set_repeat_after_a_resume(workers: int) -> None:
    whole = stream(40, 1, 0, workers=workers, items=Noisy(40))
    parts = [whole.take(size)[0] for size in (5, 9, 30)]
    resumed = stream(40, 1, 0, workers=workers, items=Noisy(40))
    resumed.seek(5)
    assert torch.equal(resumed.take(9)[0], parts[1])
    assert torch.equal(resumed.take(30)[0], parts[2])
    whole.close()
    resumed.close()


def test_imagefolder_reads_pictures_through_workers(tmp_path: Any) -> None:
    from PIL import Image

    for part, kind, index in itertools.product(("train", "val"), ("cat", "dog"), range(3)):
        folder = tmp_path / part / kind
        folder.mkdir(parents=True, exist_ok=True)
        shade = 250 if kind == "dog" else 5
        Image.new("RGB", (50, 40), (shade, shade, shade)).save(folder / f"{index}.jpg")
    config = DataConfig(name="imagefolder", root=str(tmp_path), image_size=32, workers=1)
    part = open_part(config, True, 0)
    assert (len(part), part.classes) == (6, 2)
    reading = ShardStream(part, config, World(), 0)
    inputs, labels = reading.take(6)
    reading.close()
    assert inputs.shape == (6, 3, 32, 32)
    assert torch.equal(inputs.mean(dim=(1, 2, 3)) > 0, labels == 1)
