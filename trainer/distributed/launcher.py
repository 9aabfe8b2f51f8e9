"""The launcher's variables, read here and nowhere else. Imports no torch."""

from __future__ import annotations

import os
import platform
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


LOCAL = {
    "local_rank": ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID"),
    "local_size": ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS"),
}
"""By what names launchers tell a rank's place on its host; the first that is set counts."""


def node_name() -> str:
    """This process's name for its node: its host, and the agent that started it, where one did."""
    return f"{platform.node()}/{os.environ.get('GROUP_RANK', '')}"


def read_launch() -> Launch:
    """The place of this process; a world of one where no launcher started it.

    RANK and WORLD_SIZE are enough. Without a word of the place on the host, all ranks are taken to be on one host.

    Raises:
        ConfigError: a launcher's variables that do not fit together.
    """
    given = {"rank": os.environ.get("RANK"), "size": os.environ.get("WORLD_SIZE")}
    if given["rank"] is None and given["size"] is None:
        return Launch()
    for field, name in (("rank", "RANK"), ("size", "WORLD_SIZE")):
        if given[field] is None:
            raise ConfigError(f"{name} is not set though a launcher set others: start with torchrun")
    for field, names in LOCAL.items():
        given[field] = next((os.environ[name] for name in names if name in os.environ), None)
    try:
        numbers = {field: int(value) for field, value in given.items() if value is not None}
    except ValueError as error:
        raise ConfigError(f"the launcher's variables {given}: must be whole numbers ({error})") from None
    if "local_rank" not in numbers:
        numbers.setdefault("local_size", numbers["size"])
        numbers["local_rank"] = numbers["rank"] % max(numbers["local_size"], 1)
    numbers.setdefault("local_size", numbers["local_rank"] + 1)  # at least so many are here
    node = int(os.environ.get("GROUP_RANK", numbers["rank"] // max(numbers["local_size"], 1)))
    launch = Launch(node=node, **numbers)
    if not (0 <= launch.rank < launch.size and 0 <= launch.local_rank < launch.local_size):
        raise ConfigError(f"the launcher's variables {given}: a rank must lie below its world's size")
    return launch
