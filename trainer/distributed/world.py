"""The world: who this rank is, on which device, and the process group's life."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.config.config import WorldConfig
from trainer.distributed.board import Board, told
from trainer.distributed.epoch_groups import LOOK_S as LOOK_AT_MEMBERS_S
from trainer.distributed.launcher import Launch, read_launch
from trainer.distributed.members import Epoch, Members
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
    group: Any = None
    """The process group of these ranks; None is torch's default group."""
    nodes: tuple[tuple[int, ...], ...] = ()
    """The ranks of every node, where averages have two levels."""
    board: Board = field(default_factory=Board, compare=False)
    """Where a rank says why it leaves."""
    members: Members | None = field(default=None, compare=False)
    """Whom this rank meets, where ranks come and go."""

    @staticmethod
    def current(device: torch.device, group: Any = None) -> World:
        """The world of a process group, for a replica on `device`; a world of one where there is no group.

        Args:
            device: of the replica.
            group: the ranks that train together, this one among them; None is torch's default group.

        Raises:
            ConfigError: several ranks without a group, or a group without this rank.
        """
        launch = read_launch()
        if not dist.is_initialized():
            if launch.size > 1:  # else each would train alone and nobody would notice
                raise ConfigError(
                    f"{launch.size} ranks were launched, but there is no process group: call "
                    "torch.distributed.init_process_group() before LocalSGD"
                )
            return World(device=device)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ConfigError(f"group = {group!r}: rank {dist.get_rank()} is not in it; use LocalSGD on its ranks only")
        if (launch.rank, launch.size) != (rank, size):  # a group that no launcher's variables describe
            launch = Launch(rank, size, rank, size)
        options = (group or dist.distributed_c10d._get_default_group())._get_backend(device).options
        timeout_s = options._timeout.total_seconds()
        place = launch.local_rank, launch.local_size, launch.node
        return World(rank, size, *place, device, timeout_s, group, board=Board.open(rank, size, group))

    def new_group(self, ranks: Sequence[int] | None = None) -> Any:
        """A further group of these ranks, or of all, with this world's time-out, since torch's default is another.

        Every rank that is to be in it must call it.
        """
        if self.members is not None and ranks is None:
            return self.members.new_group()
        timeout = timedelta(seconds=self.timeout_s)
        if self.group is None and ranks is None:
            return dist.new_group(timeout=timeout)
        everyone = dist.get_process_group_ranks(self.group or dist.group.WORLD)
        chosen = everyone if ranks is None else [everyone[rank] for rank in ranks]
        return dist.new_group(chosen, timeout=timeout, use_local_synchronization=True)

    @staticmethod
    def elastic(members: Members, device: torch.device | None = None) -> World:
        """A world whose ranks come and go, for `LocalSGD(..., world=)`; it is of one rank until the members meet.

        Args:
            members: of which this process is one.
            device: of the replica: a CPU's, whose groups can be made anew.

        Raises:
            ConfigError: another kind of device.
        """
        device = device or torch.device("cpu")
        if device.type != "cpu":
            raise ConfigError(
                f"device = {device}: an elastic world needs gloo on a CPU; on GPUs restart from the newest checkpoint, "
                "with torchrun --max-restarts"
            )
        return World(device=device, timeout_s=members.timeout_s, members=members)

    def of_epoch(self, epoch: Epoch) -> World:
        """The elastic world of an epoch, in a group of its own; all its members call this."""
        assert self.members is not None
        rank, size = epoch.members.index(self.members.number), len(epoch.members)
        board = Board(rank, size, self.members.store, self.members.prefix)
        group = self.members.new_group() if size > 1 else None
        return replace(self, rank=rank, size=size, group=group, board=board)

    def new_levels(self) -> tuple[Any, Any]:
        """Groups of this rank's node, and of the ranks at its place on every node; every rank must call it."""
        row = self.nodes[self.node]
        column = [ranks[self.local_rank] for ranks in self.nodes]
        return self.new_group(row), self.new_group(column)

    def with_nodes_of(self, ranks: int) -> World:
        """This world with nodes of so many consecutive ranks, whatever the launcher said.

        Raises:
            ConfigError: it does not divide the number of ranks.
        """
        if self.size % ranks:
            raise ConfigError(f"ranks_per_node = {ranks}: must divide the number of ranks ({self.size})")
        return self.with_nodes([rank // ranks for rank in range(self.size)])

    def with_nodes(self, names: Sequence[Any]) -> World:
        """This world with the nodes that ranks named; `names` has every rank's, by rank.

        Raises:
            ConfigError: nodes with different numbers of ranks.
        """
        by_name: dict[Any, list[int]] = {}
        for rank, name in enumerate(names):
            by_name.setdefault(name, []).append(rank)
        nodes = tuple(tuple(ranks) for ranks in by_name.values())
        if len({len(ranks) for ranks in nodes}) > 1:
            counts = ", ".join(f"{len(ranks)} on {name}" for name, ranks in by_name.items())
            raise ConfigError(f"node_period_steps needs as many ranks on every node, and there are {counts}")
        node = next(number for number, ranks in enumerate(nodes) if self.rank in ranks)
        place = nodes[node].index(self.rank)
        return replace(self, nodes=nodes, node=node, local_rank=place, local_size=len(nodes[node]))

    @contextmanager
    def collective(self, operation: str) -> Iterator[None]:
        """Something that ranks do together: a failure in it names the operation, and the rank that left.

        Raises:
            PeerError: instead of the backend's own error.
        """
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, PeerError | MismatchError):
                raise
            raise PeerError(self._told(operation, error)) from error

    def wait(self, work: Any, operation: str) -> None:
        """Wait for a collective; what a peer says on the board ends the wait at once.

        Raises:
            PeerError: a peer left or did not answer in time.
        """
        if self.device.type == "cuda":  # the stream waits, not this thread
            with self.collective(operation):
                work.wait()
            return
        deadline = time.monotonic() + self.timeout_s
        look_s = LOOK_S if self.members is None else LOOK_AT_MEMBERS_S
        while True:
            try:
                work.wait(timedelta(seconds=min(look_s, self.timeout_s)))
                return
            except RuntimeError as error:
                late = time.monotonic() >= deadline
                failed = work.is_completed() or "timed out" not in str(error).lower()
                if late or failed or self._is_broken() or self.board.gone():
                    raise PeerError(self._told(operation, error)) from error

    def _is_broken(self) -> bool:
        return self.members is not None and self.members.broken() is not None

    def _told(self, operation: str, error: RuntimeError) -> str:
        """One line: the operation, this rank, and who left and why, or what the backend says."""
        failed = f"{operation} failed on rank {self.rank} of {self.size}"
        if self.members is not None:  # who is gone is found out when the others meet
            return f"{failed}: {self.members.broken() or 'a peer went away'}"
        gone = self.board.gone(patience_s=LOOK_S)
        if gone:
            return f"{failed}: {'; '.join(f'rank {rank} {reason}' for rank, reason in gone.items())}"
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{failed}: a peer went away, or did not answer in {self.timeout_s:g} s ({cause})"


LOOK_S = 1.0
"""Seconds between two looks at what peers say, while a collective is waited for."""


@contextmanager
def open_world(config: WorldConfig, job: str = "") -> Iterator[World]:
    """Join the process group, and leave it whatever happens; a world of one needs none. On the CPU freed memory is kept
    for the steps to come.

    Args:
        config: which world.
        job: what all ranks of an elastic world must run alike; of another world, `compare_ranks` compares it.
    """
    if config.elastic is not None:
        with _elastic_world(config, job) as world:
            yield world
        return
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
    world = replace(world, board=Board.open(world.rank, world.size))
    try:
        yield world
    except BaseException as error:
        world.board.say(told(error))
        # No goodbye: peers may be waiting in a collective that this rank will never enter, and an orderly shutdown
        # would wait with them. Closed connections tell them at once; the launcher ends the rest.
        if cuda:
            dist.distributed_c10d._abort_process_group()
        raise
    else:
        dist.barrier()
        dist.destroy_process_group()


@contextmanager
def _elastic_world(config: WorldConfig, job: str) -> Iterator[World]:
    """Of one rank, until the members meet."""
    assert config.elastic is not None
    keep_freed_memory()
    members = Members(
        config.elastic,
        ranks=config.begins_with,
        min_ranks=config.min_ranks,
        max_ranks=config.max_ranks,
        timeout_s=config.timeout_s,
        job=" ".join([job, *(f"{name} {version}" for name, version in versions().items())]),
    )
    try:
        yield World.elastic(members)
    except BaseException as error:
        members.leave(told(error))
        raise
    finally:
        members.close()


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
    """Versions that figures were made with, and that ranks must have in common."""
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
