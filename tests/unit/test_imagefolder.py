"""A folder of pictures: classes that differ and files that are broken are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trainer.config.config import DataConfig
from trainer.data import ShardStream, open_part
from trainer.distributed.world import World
from trainer.errors import ConfigError, DataError


def folder(root: Path, train: str, val: str) -> DataConfig:
    for part, kinds in (("train", train), ("val", val)):
        for kind in kinds:
            (root / part / kind).mkdir(parents=True)
            Image.new("RGB", (20, 20)).save(root / part / kind / "0.jpg")
    return DataConfig(name="imagefolder", root=str(root), image_size=16, workers=0)


def test_classes_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    config = folder(tmp_path, "ab", "bc")
    for train in (True, False):
        with pytest.raises(ConfigError, match=r"the same classes \(val/ lacks a; train/ lacks c\)"):
            open_part(config, train, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named(tmp_path: Path, workers: int) -> None:
    config = folder(tmp_path, "ab", "ab")
    (tmp_path / "train" / "b" / "0.jpg").write_bytes(b"no picture")
    part = open_part(config, True, 0)
    stream = ShardStream(part, DataConfig(name="imagefolder", root=str(tmp_path), workers=workers), World(), 0)
    with pytest.raises(DataError, match=r"train/b/0\.jpg: cannot be read as a picture") as raised:
        stream.take(2)
    stream.close()
    assert "\n" not in str(raised.value)
