"""Federated devices as a loop of a user's own names them: which samples each has, and how they take part."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.config.federated import FederatedConfig
from trainer.errors import ConfigError
from trainer.fields import build, require_types

Shards = Sequence[Any] | Mapping[int, Any]


class Devices:
    """Devices that share the ranks: device k is trained by rank k modulo the ranks.

        shards = share_out("dirichlet", Sharing(len(dataset), 100, labels=labels_of(dataset), alpha=0.3))
        devices = Devices(shards, cohort=10, local_epochs=1, rule="fedprox")
        with LocalSGD(model, optimizer, "constant", devices=devices) as sync:
            for _ in range(rounds):
                for x, y in sync.batches(dataset):
                    ...

    Args:
        shards: indices of every device's samples in the data set; or a dict of this rank's own devices only, by
            number, where data may not leave the rank (the ranks then tell one another the sizes).
        seed: of cohorts, orders and random numbers.
        settings: fields of a FederatedConfig, besides `devices`.

    Raises:
        ConfigError: settings that cannot be.
    """

    def __init__(self, shards: Shards, *, seed: int = 0, **settings: Any) -> None:
        given = _numbered(shards)
        self.shards: dict[int, npt.NDArray[np.int64]] = {device: _indices(device, each) for device, each in given}
        self.all_known = not isinstance(shards, Mapping)
        """Whether `shards` has every device, not this rank's only."""
        self.seed = seed
        if not isinstance(seed, int) or seed < 0:
            raise ConfigError(f"seed = {seed!r}: must be a whole number, 0 or more")
        if self.all_known:
            settings = {"devices": len(self.shards)} | settings
        if settings.get("devices") is None:
            raise ConfigError("devices = None: say how many devices all ranks have together")
        if self.all_known and settings["devices"] != len(self.shards):
            raise ConfigError(f"devices = {settings['devices']}: there are {len(self.shards)} shards")
        self.config = build(FederatedConfig, settings)
        require_types(self.config)

    def alike(self) -> dict[str, Any]:
        """What all ranks must give alike, for a comparison."""
        found = {f"{name} of Devices": value for name, value in {"seed": self.seed, **asdict(self.config)}.items()}
        if self.all_known:
            found |= {f"shard of device {device}": _digest(each) for device, each in sorted(self.shards.items())}
        return found

    def require_within(self, samples: int) -> None:
        """Refuse shards of another data set.

        Raises:
            ConfigError: names a device with an index beyond these samples.
        """
        for device, indices in self.shards.items():
            if len(indices) and indices.max() >= samples:
                raise ConfigError(
                    f"shards: device {device} has the index {indices.max()}, and the data set has {samples} samples"
                )


def _digest(indices: npt.NDArray[np.int64]) -> str:
    return f"{len(indices)} samples with the fingerprint {zlib.crc32(indices.tobytes()):08x}"


def _numbered(shards: Any) -> list[tuple[int, Any]]:
    """Shards with the numbers of their devices.

    Raises:
        ConfigError: no shards, or devices without a number.
    """
    if isinstance(shards, str | bytes) or not isinstance(shards, Iterable):
        raise ConfigError(f"shards = {shards!r}: give a list with the indices of each device's samples, or a dict")
    if not isinstance(shards, Mapping):
        return [*enumerate(shards)]
    for device in shards:
        if not isinstance(device, int | np.integer) or isinstance(device, bool) or device < 0:
            raise ConfigError(f"shards: a device is called {device!r}; devices have numbers, from 0")
    return [(int(device), indices) for device, indices in shards.items()]


def _indices(device: int, given: Any) -> npt.NDArray[np.int64]:
    """A device's shard as an array. A Subset stands for its indices.

    Raises:
        ConfigError: no list of whole numbers.
    """
    inside = getattr(given, "indices", None)
    if inside is not None and hasattr(given, "dataset"):
        given = inside
    if isinstance(given, Iterable) and not isinstance(given, str | bytes) and not hasattr(given, "__array__"):
        given = list(given)
    try:
        found = np.asarray(given)
    except ValueError:  # of unequal lengths
        found = np.asarray(given, dtype=object)
    if found.ndim != 1 or (len(found) and not np.issubdtype(found.dtype, np.integer)):
        raise ConfigError(
            f"shards: device {device} has {type(given).__name__} of shape {found.shape}, {found.dtype}; "
            "give the indices of its samples, a list of whole numbers"
        )
    if len(found) and found.min() < 0:
        raise ConfigError(f"shards: device {device} has the index {found.min()}; indices count from 0")
    return found.astype(np.int64)
