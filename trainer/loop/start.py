"""Where a run begins: afresh, or from the newest good checkpoint; all ranks decide alike."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from torch import nn

from trainer.config import recipes
from trainer.config.config import Config, to_dict
from trainer.distributed.collectives import Collectives
from trainer.errors import ConfigError
from trainer.loop.lineage import Prepared, begin_afresh, go_on
from trainer.loop.lock import RunLock
from trainer.loop.manifest import BadCheckpointError, Manifest, verify
from trainer.loop.saving import whole

T = TypeVar("T")
LAYS_OUT = {
    "optim": ("name",),
    "policy": ("name",),
    "sync": (
        *("fragments", "outer", "wire_format", "gradient_format", "delay_steps", "mixing", "bucket_bytes"),
        *("node_period_steps", "node_wire_format", "ranks_per_node"),
    ),
}
"""Settings that give a checkpoint's state its meaning."""
MAY_DIFFER = {"run": ("name", "root", "resume", "reference"), "data": ("root",), "world": (), "record": ()}
"""Settings of which a resume does not say that they changed; of a section with none, all."""


@dataclass
class Start:
    """Where a run begins; the same on every rank."""

    run: str = ""
    """The run's id."""
    checkpoint: Path | None = None
    manifest: Manifest | None = None
    changed: list[str] = field(default_factory=list)
    """Settings that are not the checkpoint's, a line each."""
    warnings: list[str] = field(default_factory=list)
    prepared: Prepared = Prepared()


def find_start(config: Config, folder: Path, model: nn.Module, via: Collectives) -> Start:
    """Choose what `run.resume` means; nothing is changed but that bad checkpoints of this run are moved aside.

    Raises:
        ConfigError: a path that holds no good checkpoint, or one that cannot be gone on with; the same on every rank.
    """
    start = Start(run=decided(via, lambda: uuid.uuid4().hex))
    resume = config.run.resume
    for path in _candidates(folder, resume, via):
        manifest, problem = _look(path, via)
        if problem is None:
            assert manifest is not None
            start.run, start.checkpoint, start.manifest = manifest.run, path, manifest
            _refuse(manifest, config, model, via.size)
            start.changed = list(_changed(manifest.config, to_dict(config)))
            if manifest.ranks != via.size:
                start.changed.append(f"there are {via.size} ranks now, and were {manifest.ranks}")
            break
        if resume != "auto":
            raise ConfigError(f"run.resume = {resume!r}: {problem}; give auto, or another folder checkpoints/step-N")
        aside = decided(via, lambda path=path: _move_aside(path))  # type: ignore[misc]  # a default binds the loop's path
        start.warnings.append(f"{path}: {problem}; it is now {aside.name}")
    if start.warnings:
        used = f"{start.checkpoint.name} is used instead" if start.checkpoint else "no good one is left: a fresh start"
        start.warnings[-1] += f", and {used}"
    return start


def prepare(start: Start, config: Config, folder: Path, lock: RunLock) -> Prepared:
    """Make the folder ready, on rank 0: records as they were, the earlier configuration beside the new one."""
    if start.checkpoint is None or start.manifest is None:
        prepared = begin_afresh(folder, lock)
    else:
        prepared = go_on(folder, lock, start.checkpoint, start.manifest.metrics_bytes)
        if start.changed:
            before = folder / f"config-before-step-{start.manifest.local_step}.toml"
            before.write_text(tomli_w.dumps(start.manifest.config))
    recipes.save(config, folder / "config.toml")
    return prepared


def decided(via: Collectives, work: Callable[[], T]) -> T:
    """What rank 0 finds by `work`, on every rank.

    Raises:
        ConfigError: rank 0's, on every rank.
    """
    found: tuple[Any, str | None] = None, None
    if via.rank == 0:
        try:
            found = work(), None
        except (ConfigError, OSError) as error:
            found = None, str(error)
    value, problem = via.gather_objects(found)[0]
    if problem is not None:
        raise ConfigError(problem)
    result: T = value
    return result


def _candidates(folder: Path, resume: str | None, via: Collectives) -> Iterator[Path]:
    if resume == "auto":
        yield from decided(via, lambda: whole(folder / "checkpoints")[::-1])
    elif resume is not None:
        yield Path(resume)


def _look(path: Path, via: Collectives) -> tuple[Manifest | None, str | None]:
    """A checkpoint's manifest, or what is wrong with the checkpoint; each rank reads a share of its files."""

    def read() -> tuple[Manifest | None, str | None]:
        try:
            return Manifest.read(path), None
        except BadCheckpointError as error:
            return None, str(error)

    manifest, problem = decided(via, read)
    if manifest is not None:
        with_problem: str | None = None
        try:
            verify(path, manifest.files, sorted(manifest.files)[via.rank :: via.size])
        except BadCheckpointError as error:
            with_problem = str(error)
        problem = next((each for each in via.gather_objects(with_problem) if each is not None), None)
    return manifest, problem


def _move_aside(path: Path) -> Path:
    taken = (path.with_name(f"bad-{path.name}{'' if n == 0 else f'.{n}'}") for n in range(10**6))
    aside = next(each for each in taken if not each.exists())
    with suppress(OSError):
        path.rename(aside)
    return aside


def _refuse(manifest: Manifest, config: Config, model: nn.Module, ranks: int) -> None:
    """Refuse a checkpoint whose state means something else than this configuration's.

    Raises:
        ConfigError: names the first setting.
    """
    where, mend = f"the checkpoint of step {manifest.local_step}", "set it back, or give another run.name"
    for section, names in LAYS_OUT.items():
        for name in names:
            before, now = manifest.config.get(section, {}).get(name), to_dict(config)[section].get(name)
            if before != now:
                raise ConfigError(f"{section}.{name} = {now!r}: {where} is of {before!r}; {mend}")
    ours = described(model)
    if ours != manifest.parameters:
        pairs = zip_longest(manifest.parameters, ours, fillvalue=["nothing"])
        before, now = (" ".join(map(str, each)) for each in next(pair for pair in pairs if pair[0] != pair[1]))
        raise ConfigError(f"task.model = {config.task.model!r}: {where} holds {before} where this has {now}; {mend}")
    private = config.federated.is_on or config.data.partition != "iid"
    if manifest.ranks != ranks and private:
        raise ConfigError(
            f"data.partition = {config.data.partition!r}: {where} was written by {manifest.ranks} ranks, and data is "
            "private to a rank or device; start as many"
        )


def described(model: nn.Module) -> list[list[Any]]:
    """Name, shape and type of every tensor that a model saves."""
    state = model.state_dict()
    return [[name, list(each.shape), str(each.dtype)] for name, each in state.items() if hasattr(each, "shape")]


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """A line a setting that differs."""
    for section in now:
        own = MAY_DIFFER.get(section)
        if own == ():
            continue
        yield from _differing(section, before.get(section, {}), now[section], own or ())


def _differing(path: str, before: Any, now: Any, leave: tuple[str, ...] = ()) -> Iterator[str]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in dict.fromkeys((*before, *now)):
            if name not in leave:
                yield from _differing(f"{path}.{name}", before.get(name), now.get(name))
    elif before != now:
        yield f"{path} is {now!r} now, and was {before!r}"
