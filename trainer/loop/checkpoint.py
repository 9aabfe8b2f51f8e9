"""Checkpoints by torch.distributed.checkpoint: each whole or absent, each enough for a bit-exact resume."""

from __future__ import annotations

import os
import random
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.utils._pytree import tree_map

from trainer.distributed.world import World
from trainer.errors import ConfigError

PARTIAL = ".partial"
AS_GIVEN = {"flatten_state_dict": False, "flatten_sharded_tensors": False}  # flattening loses empty tables


@dataclass(frozen=True)
class Checkpoints:
    """The newest checkpoints of one run.

    A checkpoint is written under another name and renamed once every rank's part is on the disk; so what bears a
    checkpoint's name is whole, whenever the run was killed. Each rank's replica is its own: between averagings they
    differ.
    """

    folder: Path
    keep: int
    world: World

    def save(
        self, local_step: int, model: nn.Module, optimizer: torch.optim.Optimizer, rest: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint of all ranks, then delete the oldest beyond `keep`. All ranks call it at one step."""
        path = self.folder / f"step-{local_step:010d}"
        partial = path.with_name(path.name + PARTIAL)
        if self.world.rank == 0:
            for left in self.folder.glob(f"*{PARTIAL}"):  # of a run that was killed while it wrote
                if left.name < partial.name:  # another rank may have begun this one
                    shutil.rmtree(left, ignore_errors=True)
        mine: dict[str, Any] = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        state = optimizer.state_dict()
        for index, values in state["state"].items():
            mine |= {f"optimizer.{index}.{name}": value for name, value in values.items() if torch.is_tensor(value)}
        plain = {
            index: {k: v for k, v in values.items() if not torch.is_tensor(v)}
            for index, values in state["state"].items()
        }
        mine["rest"] = {
            "groups": state["param_groups"],
            "plain": plain,
            "world_size": self.world.size,
            "random": _random_state(self.world.device),
            # a device's number is a matter of the start that wrote it
            **tree_map(lambda leaf: leaf.cpu() if torch.is_tensor(leaf) else leaf, dict(rest)),
        }
        writer = FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
        planner = DefaultSavePlanner(**AS_GIVEN)
        named = {f"rank{self.world.rank}.{name}": value for name, value in mine.items()}
        with self._together(f"writing {path}"):
            save(named, storage_writer=writer, planner=planner, no_dist=self.world.size == 1)
        if self.world.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            _sync_folder(self.folder)
            for old in self._whole()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        return path

    def find(self, resume: str | None) -> Path | None:
        """The checkpoint that `run.resume` means: None where none is asked for, or `auto` finds none.

        Raises:
            ConfigError: a path that holds no whole checkpoint.
        """
        if resume is None:
            return None
        if resume == "auto":
            return next(reversed(self._whole()), None)
        path = Path(resume)
        if not (path / ".metadata").is_file():
            raise ConfigError(
                f"run.resume = {resume!r}: holds no checkpoint; give auto, or a folder checkpoints/step-N"
            )
        return path

    def load(self, path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Load this rank's replica, optimizer and random state; returns what else was saved.

        Raises:
            ConfigError: the checkpoint is of another number of ranks.
        """
        reader = FileSystemReader(path)
        prefix = f"rank{self.world.rank}."
        found = reader.read_metadata().state_dict_metadata
        ranks = {name.partition(".")[0] for name in found}
        if len(ranks) != self.world.size:
            raise ConfigError(f"run.resume = {str(path)!r}: was written by {len(ranks)} ranks; start as many")
        wanted: dict[str, Any] = {
            name: torch.empty(kind.size, dtype=kind.properties.dtype)
            if isinstance(kind, TensorStorageMetadata)
            else None
            for name, kind in found.items()
            if name.startswith(prefix)
        }
        planner = DefaultLoadPlanner(**AS_GIVEN)
        with self._together(f"reading {path}"):
            load(wanted, storage_reader=reader, planner=planner, no_dist=self.world.size == 1)
        mine = {name.removeprefix(prefix): value for name, value in wanted.items()}
        rest: dict[str, Any] = mine.pop("rest")
        weights = {name.removeprefix("model."): value for name, value in mine.items() if name.startswith("model.")}
        model.load_state_dict(weights)
        state: dict[int, dict[str, Any]] = rest.pop("plain")
        for name, value in mine.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".", 2)
                state[int(index)][key] = value
        optimizer.load_state_dict({"state": state, "param_groups": rest.pop("groups")})
        _restore_random_state(rest.pop("random"), self.world.device)
        return rest

    @contextmanager
    def _together(self, operation: str) -> Iterator[None]:
        """What ranks do together, so that any rank's failure is said as an error of ours."""
        with warnings.catch_warnings(), self.world.collective(operation):
            # a world of one has no process group, which the library would warn of
            warnings.filterwarnings("ignore", message=".*assuming the intent is to", category=UserWarning)
            try:
                yield
            except CheckpointException as error:  # no Exception, and its text is a traceback a rank
                causes = {rank: failure[0] for rank, failure in error.failures.items()}
                raise OSError(f"{operation} failed, by rank: {causes}") from error

    def _whole(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != PARTIAL)


def _random_state(device: torch.device) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def _restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
