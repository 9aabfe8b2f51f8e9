"""Named data sets: torchvision's formats, folders of pictures, a seeded fake, or a user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torchvision.datasets
from torch.utils.data import Subset, TensorDataset
from torchvision.transforms import v2

from trainer.config.config import DataConfig
from trainer.errors import ConfigError, DataError, import_object

IMAGENET_STATS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STATS = {  # mean and standard deviation of the training pictures, by channel
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
TORCHVISION = {"fashion_mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}


@dataclass(frozen=True)
class DataPart:
    """The training or the test part of a data set."""

    items: Any
    """Map-style: items[i] is (input, label); a TensorDataset can be held on the device."""
    classes: int
    mean: tuple[float, ...] | None = None
    """Of uint8 pictures scaled to 0 .. 1, by channel; None: half."""
    std: tuple[float, ...] | None = None

    def __len__(self) -> int:
        return len(self.items)

    def subset(self, chosen: npt.NDArray[np.int64]) -> DataPart:
        """Only these samples: of tensors a copy, so that the rest can be let go."""
        items = (
            TensorDataset(*(tensor[chosen] for tensor in self.items.tensors))
            if isinstance(self.items, TensorDataset)
            else Subset(self.items, chosen.tolist())
        )
        return replace(self, items=items)


def open_part(config: DataConfig, train: bool, seed: int) -> DataPart:
    """The training or test part that `config.name` means.

    Raises:
        ConfigError: an unknown name, or files that are not there.
    """
    limit = config.train_limit if train else config.test_limit
    if config.name == "fake":
        return fake(8_192 if train else 2_048, train, limit)
    if config.name in TORCHVISION:
        part = _torchvision(config, train)
    elif config.name == "imagefolder":
        part = _imagefolder(config, train)
    elif ":" in config.name:
        part = _own(config, train)
    else:
        known = ", ".join(sorted([*TORCHVISION, "imagefolder", "fake"]))
        raise ConfigError(f"data.name = {config.name!r}: choose one of {known}, or module:callable")
    return _limited(part, limit, seed)


def fake(samples: int, train: bool, limit: int | None = None) -> DataPart:
    """Ten classes of 28x28 pictures: a fixed coarse pattern each, four pixels in five replaced by noise."""
    count = min(samples, limit or samples)
    noise = torch.Generator().manual_seed(1 if train else 2)
    coarse = torch.randint(0, 256, (10, 1, 7, 7), generator=torch.Generator().manual_seed(0))
    patterns = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
    labels = torch.randint(0, 10, (count,), generator=noise)
    hidden = torch.rand((count, 1, 28, 28), generator=noise) < 0.8
    other = torch.randint(0, 256, (count, 1, 28, 28), generator=noise)
    pictures = torch.where(hidden, other, patterns[labels]).to(torch.uint8)
    return DataPart(TensorDataset(pictures, labels), 10)


def _torchvision(config: DataConfig, train: bool) -> DataPart:
    try:
        found = getattr(torchvision.datasets, TORCHVISION[config.name])(config.root, train=train)
    except RuntimeError as error:
        raise ConfigError(
            f"data.root = {config.root!r}: holds no {config.name}; fetch it with "
            f"python -m trainer.data {config.name} --root {config.root}"
        ) from error
    pictures = torch.as_tensor(found.data)
    pictures = pictures.unsqueeze(1) if pictures.dim() == 3 else pictures.permute(0, 3, 1, 2)
    labels = torch.as_tensor(found.targets, dtype=torch.int64)
    mean, std = STATS[config.name]
    return DataPart(TensorDataset(pictures, labels), len(found.classes), mean, std)


def _imagefolder(config: DataConfig, train: bool) -> DataPart:
    size = config.image_size
    crop: list[Callable[..., Any]] = (
        [v2.RandomResizedCrop(size)] if train else [v2.Resize(size * 8 // 7), v2.CenterCrop(size)]
    )
    folder = Path(config.root) / ("train" if train else "val")
    try:
        found = torchvision.datasets.ImageFolder(
            str(folder), transform=v2.Compose([*crop, v2.PILToTensor()]), loader=_open_picture
        )
        _compare_classes(config.root)
    except FileNotFoundError as error:
        raise ConfigError(
            f"data.root = {config.root!r}: needs train/ and val/, a folder a class in each ({error})"
        ) from error
    return DataPart(found, len(found.classes), *IMAGENET_STATS)


def _open_picture(path: str) -> Any:
    """A picture file, read whole.

    Raises:
        DataError: names the file.
    """
    try:
        return torchvision.datasets.folder.pil_loader(path)
    except Exception as error:  # of any of the formats' readers
        raise DataError(f"{path}: cannot be read as a picture ({type(error).__name__}: {error})") from error


def _compare_classes(root: str) -> None:
    """Training and test part must have the same folders, since a class's number is its folder's place.

    Raises:
        ConfigError: names classes that one part lacks.
    """
    train, val = ({each.name for each in (Path(root) / part).iterdir() if each.is_dir()} for part in ("train", "val"))
    sides = [
        f"{part}/ lacks {', '.join(sorted(missing)[:5])}{', ...' if len(missing) > 5 else ''}"
        for part, missing in (("val", train - val), ("train", val - train))
        if missing
    ]
    if sides:
        raise ConfigError(f"data.root = {root!r}: train/ and val/ need the same classes ({'; '.join(sides)})")


def _own(config: DataConfig, train: bool) -> DataPart:
    found = import_object("data.name", config.name)(config.root, train)
    classes = getattr(found, "classes", None)
    if classes is None:
        raise ConfigError(
            f"data.name = {config.name!r}: give the data set an attribute `classes` (their number or names)"
        )
    return DataPart(found, classes if isinstance(classes, int) else len(classes))


def _limited(part: DataPart, limit: int | None, seed: int) -> DataPart:
    if limit is None or limit >= len(part):
        return part
    return part.subset(np.random.default_rng([seed, 2]).permutation(len(part))[:limit])
