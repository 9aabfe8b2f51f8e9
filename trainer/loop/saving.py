"""Writing checkpoints of all ranks beside training: each becomes whole or is absent, and all ranks know which."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.data.reading import one_line
from trainer.distributed.background import Background, Task
from trainer.distributed.meeting import Meeting
from trainer.distributed.world import World
from trainer.errors import PeerError
from trainer.loop.manifest import PARTIAL, Manifest, files_of
from trainer.loop.snapshot import Snapshot
from trainer.loop.tensor_file import Checksum, as_stored, digest, write_bytes, write_tensors

Owner = tuple[int, str]
"""The rank that writes a tensor, and the tensor's name there."""


@dataclass
class Saving:
    """The newest checkpoints of one run. A checkpoint is copied at once, and written by a thread beside training.

    It is written under another name, and renamed once every rank's files are on the disk. What cannot be written, or
    holds parameters that are not finite, is a trouble to be told; the checkpoints before it stay.
    """

    folder: Path
    keep: int
    world: World
    _under_way: Task[None] | None = None

    def __post_init__(self) -> None:
        self._meeting = Meeting(self.world)
        self._thread = Background(torch.device("cpu"))
        self._troubles: list[str] = []

    def begin(
        self,
        about: Manifest,
        state: Mapping[str, Any],
        trained: Container[str],
        sync_records: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy a state and begin to write it; all ranks call it at one step. The one before it is finished first.

        Args:
            about: what it is; rank 0's counts.
            state: this rank's.
            trained: names of what must be finite, as paths in the state.
            sync_records: makes sure that the records before it are on the disk.
        """
        self.wait()
        snapshot, problem = Snapshot(None, {}), None
        try:
            snapshot = Snapshot.of(state)
        except (TypeError, MemoryError) as error:
            problem = str(error) or type(error).__name__
        self._under_way = self._thread.submit(lambda: self._save(about, snapshot, trained, problem, sync_records))

    def regroup(self, world: World) -> None:
        """The ranks are others now; what is under way waits for nobody any more."""
        self._meeting.close()
        self.world, self._meeting = world, Meeting(world)

    def wait(self) -> None:
        """Wait until what is under way is written, or was given up."""
        if self._under_way is not None:
            self._under_way.result()
            self._under_way = None

    def troubles(self) -> list[str]:
        """What went wrong since this was last asked, a line each."""
        told, self._troubles = self._troubles, []
        return told

    def close(self, patience_s: float) -> None:
        """Give what is under way so long, and end the thread."""
        if self._under_way is not None:
            with suppress(Exception):
                self._under_way.future.result(patience_s)
        self._meeting.close()
        self._thread.close()

    # ---- in the thread

    def _save(
        self,
        about: Manifest,
        snapshot: Snapshot,
        trained: Container[str],
        problem: str | None,
        sync_records: Callable[[], None],
    ) -> None:
        path = self.folder / f"step-{about.local_step:010d}"
        partial = path.with_name(path.name + PARTIAL)
        what = f"the checkpoint of step {about.local_step}"
        try:
            problem = problem or _not_finite(snapshot, trained)
            mine = {name: digest(tensor) for name, tensor in snapshot.tensors.items()}
            told = self._meeting.gather(f"{path.name}/digests", {"digests": mine, "problem": problem})
            if self._has_trouble(told, what):
                return
            written = self._write_own(partial, snapshot, _owners([each["digests"] for each in told]), mine)
            told = self._meeting.gather(f"{path.name}/files", written)
            is_whole = not self._has_trouble(told, what)
            if is_whole and self.world.rank == 0:
                files = {name: Checksum(**each) for rank in told for name, each in rank["files"].items()}
                is_whole = self._publish(partial, replace(about, files=files), what, sync_records)
            if not all(self._meeting.gather(f"{path.name}/whole", is_whole)):
                shutil.rmtree(partial, ignore_errors=True)  # on every rank: the folder may not be one that all share
        except Exception as error:  # of a peer that left, the training thread says it too
            said = str(error) if isinstance(error, PeerError) else one_line(error)
            self._troubles.append(f"{what} was not written, the one before it stays: {said}")

    def _has_trouble(self, told: Sequence[Mapping[str, Any]], what: str) -> bool:
        problems = [f"rank {rank}: {each['problem']}" for rank, each in enumerate(told) if each["problem"]]
        if problems:
            self._troubles.append(f"{what} was not written, the one before it stays: {problems[0]}")
        return bool(problems)

    def _write_own(
        self, partial: Path, snapshot: Snapshot, owners: Mapping[str, Owner], mine: Mapping[str, str]
    ) -> dict[str, Any]:
        """Write this rank's files; their checksums, or the problem."""
        rank = self.world.rank
        own = {n: as_stored(tensor) for n, tensor in snapshot.tensors.items() if owners[mine[n]] == (rank, n)}
        elsewhere = {name: owners[mine[name]] for name in mine if name not in own}
        state, tensors = files_of(rank)
        try:
            partial.mkdir(parents=True, exist_ok=True)
            coded = json.dumps({"state": snapshot.tree, "elsewhere": elsewhere}, allow_nan=False).encode()
            files = {state: write_bytes(partial / state, [coded]), tensors: write_tensors(partial / tensors, own)}
        except OSError as error:
            return {"files": {}, "problem": error.strerror or str(error)}
        return {"files": {name: vars(each) for name, each in files.items()}, "problem": None}

    def _publish(self, partial: Path, about: Manifest, what: str, sync_records: Callable[[], None]) -> bool:
        """Give it its name, now that all files are there, and delete the oldest beyond `keep`."""
        missing = [name for name in about.files if not (partial / name).exists()]
        if missing:
            where = f"{partial} lacks {missing[0]}"
            self._troubles.append(f"{what} was not written: {where}; run.root must be a folder that all hosts share")
            return False
        path = partial.with_suffix("")
        try:
            sync_records()
            about.write(partial)
            sync_folder(partial)
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            sync_folder(self.folder)
        except OSError as error:
            self._troubles.append(f"{what} was not written, the one before it stays: {error.strerror or error}")
            return False
        for old in whole(self.folder)[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return True


def whole(folder: Path) -> list[Path]:
    """The checkpoints in a folder, by step."""
    return sorted(path for path in folder.glob("step-*") if path.suffix != PARTIAL)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_finite(snapshot: Snapshot, trained: Container[str]) -> str | None:
    """Words for values that no checkpoint may hold."""
    for name, tensor in snapshot.tensors.items():
        checked = name in trained or name.startswith("optimizer.")
        if checked and (tensor.is_floating_point() or tensor.is_complex()) and not bool(torch.isfinite(tensor).all()):
            return f"{name} holds values that are not finite"
    return None


def _owners(everyone: Sequence[Mapping[str, str]]) -> dict[str, Owner]:
    """Who writes each tensor, by its digest: the first that has it."""
    owners: dict[str, Owner] = {}
    for rank, digests in enumerate(everyone):
        for name, each in digests.items():
            owners.setdefault(each, (rank, name))
    return owners
