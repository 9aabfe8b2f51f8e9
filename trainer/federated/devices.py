"""Federated devices as a loop of a user's own names them: which samples each has, and how they take part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self.shards: dict[int, npt.NDArray[np.int64]] = {
            int(device): _indices(device, indices)
            for device, indices in (shards.items() if isinstance(shards, Mapping) else enumerate(shards))
        }
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


def _indices(device: Any, given: Any) -> npt.NDArray[np.int64]:
    """A device's shard as an array.

    Raises:
        ConfigError: no list of whole numbers.
    """
    found = np.asarray(list(given) if isinstance(given, range | set) else given)
    if found.ndim != 1 or (len(found) and not np.issubdtype(found.dtype, np.integer)):
        raise ConfigError(
            f"shards: device {device} has {type(given).__name__} of shape {found.shape}, {found.dtype}; "
            "give the indices of its samples, a list of whole numbers"
        )
    if len(found) and found.min() < 0:
        raise ConfigError(f"shards: device {device} has the index {found.min()}; indices count from 0")
    return found.astype(np.int64)
