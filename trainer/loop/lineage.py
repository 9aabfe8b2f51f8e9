"""A run's folder at the start: what an earlier run or a later part of this one left is moved aside, never lost."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from trainer.log import LOG
from trainer.loop.lock import NAME as LOCK
from trainer.loop.lock import RunLock
from trainer.loop.manifest import PARTIAL
from trainer.loop.saving import whole

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Prepared:
    """What was done to make a folder ready."""

    aside: Path | None = None
    """Where an old run of this name is now."""
    abandoned: Path | None = None
    """Where the later checkpoints of this run and its later records are now."""
    warning: str | None = None


def begin_afresh(folder: Path, lock: RunLock) -> Prepared:
    """An empty folder: an old run of the name is moved aside."""
    if not any(path.name != LOCK for path in folder.iterdir()):
        return Prepared()
    aside = _free(folder)
    folder.rename(aside)
    lock.moved(aside)
    LOG.debug("%s was moved to %s", folder, aside)
    return Prepared(aside=aside)


def go_on(folder: Path, lock: RunLock, checkpoint: Path, metrics_bytes: int) -> Prepared:
    """A folder as it was at a checkpoint: this run's own, or another's, whose records up to there are copied."""
    for left in folder.glob(f"checkpoints/*{PARTIAL}"):  # of a run that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    if checkpoint.resolve().parent == (folder / "checkpoints").resolve():
        return _cut_back(folder, checkpoint, metrics_bytes)
    prepared = begin_afresh(folder, lock)
    source = checkpoint.parent.parent / METRICS
    warning = None
    if source.exists():
        shutil.copyfile(source, folder / METRICS)
        _, warning = _cut(folder / METRICS, metrics_bytes)
    return Prepared(aside=prepared.aside, warning=warning)


def _cut_back(folder: Path, checkpoint: Path, metrics_bytes: int) -> Prepared:
    later = [path for path in whole(folder / "checkpoints") if path.name > checkpoint.name]
    tail, warning = _cut(folder / METRICS, metrics_bytes)
    if not later:
        return Prepared(warning=warning)
    abandoned = _free(folder / "abandoned")
    abandoned.mkdir()
    for path in later:
        path.rename(abandoned / path.name)
    (abandoned / METRICS).write_bytes(tail)
    return Prepared(abandoned=abandoned, warning=warning)


def _cut(metrics: Path, size: int) -> tuple[bytes, str | None]:
    """Cut records to what they were at a checkpoint, always at a line's end; what was cut off, and a warning."""
    there = metrics.read_bytes() if metrics.exists() else b""
    kept = there[:size] if there[:size].endswith(b"\n") else there[: there[:size].rfind(b"\n") + 1]
    with open(metrics, "ab") as file:
        file.truncate(len(kept))
    if len(kept) == size:
        return there[size:], None
    lost = f"{metrics} holds {len(kept):,} bytes of the {size:,} that the checkpoint tells of: records are missing"
    return there[len(kept) :], lost


def _free(path: Path) -> Path:
    """The first of NAME.1, NAME.2, ... that is not there."""
    paths = (path.with_name(f"{path.name}.{number}") for number in range(1, 10**6))
    return next(each for each in paths if not each.exists())
