"""The world: who this rank is, on which device, and the process group's life."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from trainer.config.config import WorldConfig
from trainer.distributed.launcher import Launch, read_launch
from trainer.errors import ConfigError, MismatchError, PeerError
from trainer.memory import keep_freed_memory
from trainer.version import __version__


@dataclass(frozen=True)
class World:
    """This process among all: ranks 0 .. size - 1, each with one device."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node: int = 0
    device: torch.device = torch.device("cpu")
    timeout_s: float = 300.0

    @staticmethod
    def current(device: torch.device) -> World:
        """The world of the process group that is there, else a world of one, for a replica on `device`."""
        launch = read_launch()
        if not dist.is_initialized():
            if launch.size > 1:  # else each would train alone and nobody would notice
                raise ConfigError(
                    f"{launch.size} ranks were launched, but there is no process group: call "
                    "torch.distributed.init_process_group() before LocalSGD"
                )
            return World(device=device)
        rank, size = dist.get_rank(), dist.get_world_size()
        if (launch.rank, launch.size) != (rank, size):  # a group that no launcher's variables describe
            launch = Launch(rank, size, rank, size)
        options = dist.group.WORLD._get_backend(device).options  # type: ignore[union-attr]  # there is a group
        timeout_s = options._timeout.total_seconds()
        return World(rank, size, launch.local_rank, launch.local_size, launch.node, device, timeout_s)

    def new_group(self, ranks: Sequence[int] | None = None) -> Any:
        """A further group of these ranks, or of all, with this world's time-out: torch's own default is another. Every
        rank of the world must call it."""
        return dist.new_group(ranks, timeout=timedelta(seconds=self.timeout_s))

    def new_levels(self) -> tuple[Any, Any]:
        """Groups of this rank's node and of its place on every node; every rank must call it."""
        local, mine = self.local_size, []
        rows = [list(range(start, start + local)) for start in range(0, self.size, local)]
        for level in (rows, [list(column) for column in zip(*rows, strict=True)]):
            groups = [self.new_group(ranks) for ranks in level]  # every rank makes every group
            mine += [group for ranks, group in zip(level, groups, strict=True) if self.rank in ranks]
        return mine[0], mine[1]

    def with_nodes_of(self, ranks: int) -> World:
        """This world with nodes of so many consecutive ranks, whatever the launcher said.

        Raises:
            ConfigError: it does not divide the number of ranks.
        """
        if self.size % ranks:
            raise ConfigError(f"ranks_per_node = {ranks}: must divide the number of ranks ({self.size})")
        return replace(self, local_rank=self.rank % ranks, local_size=ranks, node=self.rank // ranks)

    @contextmanager
    def collective(self, operation: str) -> Iterator[None]:
        """What ranks do together: a failure in it names the operation and this rank.

        Raises:
            PeerError: instead of the backend's own error.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, PeerError):
                raise
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PeerError(
                f"{operation} failed on rank {self.rank} of {self.size}: a peer went away, or did not answer in "
                f"{self.timeout_s:g} s ({cause})"
            ) from error

    @cached_property
    def mesh(self) -> DeviceMesh:
        """Ranks as a (node, local) mesh, with a process group along each dimension; every rank must ask for it.

        Raises:
            ConfigError: nodes with different numbers of ranks.
        """
        if self.size % self.local_size:
            raise ConfigError(f"{self.size} ranks, {self.local_size} on node {self.node}: every node needs as many")
        within, between = self.new_levels()
        ranks = torch.arange(self.size).view(-1, self.local_size)
        return DeviceMesh.from_group([between, within], self.device.type, ranks, mesh_dim_names=("node", "local"))


@contextmanager
def open_world(config: WorldConfig) -> Iterator[World]:
    """Join the process group, and leave it whatever happens; a world of one needs none. On the CPU freed memory is kept
    for the steps to come."""
    launch = read_launch()
    cuda = torch.cuda.is_available() and config.backend != "gloo"
    if config.backend == "nccl" and not cuda:
        raise ConfigError("world.backend = 'nccl': this host has no CUDA device; choose gloo")
    device = _device_of(launch) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        keep_freed_memory()
    world = World(launch.rank, launch.size, launch.local_rank, launch.local_size, launch.node, device, config.timeout_s)
    if world.size == 1:
        yield world
        return
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        timeout=timedelta(seconds=config.timeout_s),
        device_id=device if cuda else None,
    )
    try:
        yield world
    except BaseException:
        # No goodbye: peers may be waiting in a collective that this rank will never enter, and an orderly shutdown
        # would wait with them. Closed connections tell them at once; the launcher ends the rest.
        if cuda:
            dist.distributed_c10d._abort_process_group()
        raise
    else:
        dist.barrier()
        dist.destroy_process_group()


def _device_of(launch: Launch) -> torch.device:
    """The CUDA device of this rank: its own, or where the user lets NCCL share devices, one in turn."""
    found = torch.cuda.device_count()
    if launch.local_size > found and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        raise ConfigError(
            f"{launch.local_size} ranks on a host of {found} CUDA devices: mend --nproc-per-node, or let ranks share "
            "devices with NCCL_MULTI_RANK_GPU_ENABLE=1 (NCCL 2.30 or later)"
        )
    return torch.device("cuda", launch.local_rank % found)


def versions() -> dict[str, str]:
    """What the figures were made with, and what ranks must have in common."""
    return {"ebbtide": __version__, "torch": torch.__version__, "python": platform.python_version()}


def compare_ranks(world: World, digest: str) -> None:
    """Make sure that every rank runs the same job.

    Raises:
        MismatchError: names the ranks that differ, and in what.
    """
    if world.size == 1:
        return
    mine = {"world size": str(world.size), "configuration": digest, **versions()}
    everyone: list[dict[str, str]] = [{}] * world.size
    dist.all_gather_object(everyone, mine)
    differences = list(_differences(everyone))
    if differences:
        raise MismatchError("ranks do not run the same job: " + "; ".join(differences))


def _differences(everyone: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for fact in everyone[0]:
        by_value: dict[Any, list[int]] = {}
        for rank, facts in enumerate(everyone):
            by_value.setdefault(facts[fact], []).append(rank)
        if len(by_value) > 1:
            sides = [
                f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                for value, ranks in by_value.items()
            ]
            yield f"{fact} is {' but '.join(sides)}"
