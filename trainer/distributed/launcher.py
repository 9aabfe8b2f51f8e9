"""The launcher's variables, read here and nowhere else. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from trainer.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """One process's place, as torchrun (or anything that sets the same variables) gives it."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0


def read_launch() -> Launch:
    """The place of this process; a world of one where no launcher started it.

    Raises:
        ConfigError: a launcher's variables that do not fit together.
    """
    names = {"rank": "RANK", "size": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_size": "LOCAL_WORLD_SIZE"}
    given = {field: os.environ.get(name) for field, name in names.items()}
    if given["rank"] is None and given["size"] is None:
        return Launch()
    missing = [names[field] for field, value in given.items() if value is None]
    if missing:
        raise ConfigError(f"{missing[0]} is not set though a launcher set others: start with torchrun")
    try:
        numbers = {field: int(str(value)) for field, value in given.items()}
    except ValueError as error:
        raise ConfigError(f"the launcher's variables {given}: must be whole numbers ({error})") from None
    node = int(os.environ.get("GROUP_RANK", numbers["rank"] // max(numbers["local_size"], 1)))
    launch = Launch(node=node, **numbers)
    if not (0 <= launch.rank < launch.size and 0 <= launch.local_rank < launch.local_size):
        raise ConfigError(f"the launcher's variables {given}: a rank must lie below its world's size")
    return launch
