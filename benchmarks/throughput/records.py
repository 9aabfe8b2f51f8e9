"""A folder of measurements: a JSON file a run and a world's transfers, each whole or absent. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.throughput.suite import Case, Task, case_of
from trainer.errors import ConfigError

FORMAT = 1
"""Of the records. One of another format is refused."""


@dataclass(frozen=True)
class Run:
    """One measurement of one case."""

    case: Case
    repeat: int
    figures: Mapping[str, Any]
    """By name; only `error` where the case could not be measured."""
    provenance: Mapping[str, Any]

    @property
    def error(self) -> str | None:
        """Why there are no figures."""
        return self.figures.get("error")


@dataclass(frozen=True)
class Measured:
    """All that a folder holds."""

    folder: Path
    task: Task
    runs: tuple[Run, ...]
    links: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Transfers by level, of the largest world that was measured: `ranks`, and `points` of bytes and seconds."""

    @property
    def good(self) -> list[Run]:
        """The runs that have figures."""
        return [run for run in self.runs if run.error is None]

    @property
    def by_case(self) -> dict[Case, list[Run]]:
        """The runs that have figures, by what they measured, in order."""
        found: dict[Case, list[Run]] = {}
        for run in sorted(self.good, key=lambda run: (run.case, run.repeat)):
            found.setdefault(run.case, []).append(run)
        return found


def path_of(folder: Path, case: Case, repeat: int) -> Path:
    """The file of one run."""
    return folder / "runs" / f"{case.name}-{repeat}.json"


def is_done(folder: Path, case: Case, repeat: int) -> bool:
    """Whether there is a run with figures; one that failed is tried again."""
    path = path_of(folder, case, repeat)
    return path.exists() and "error" not in _read(path)["figures"]


def keep_run(folder: Path, task: Task, run: Run) -> None:
    """Write a run's record."""
    kept = {"case": asdict(run.case), "repeat": run.repeat, "figures": run.figures, "provenance": run.provenance}
    write(path_of(folder, run.case, run.repeat), {"format": FORMAT, "task": asdict(task), **kept})


def keep_links(folder: Path, world_size: int, levels: Mapping[str, Any]) -> None:
    """Write the transfers of a world of so many ranks."""
    write(folder / "links" / f"{world_size}.json", {"format": FORMAT, "world_size": world_size, "levels": levels})


def has_links(folder: Path, world_size: int) -> bool:
    """Whether this world's transfers were measured."""
    return (folder / "links" / f"{world_size}.json").exists()


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is whole or absent.

    Raises:
        ConfigError: a folder that cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(table, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise ConfigError(
            f"out = {str(path.parent)!r}: cannot be written ({error.strerror}); choose another"
        ) from error


def refuse_other_task(folder: Path, task: Task) -> None:
    """A folder goes on with its own task only.

    Raises:
        ConfigError: it holds runs of another.
    """
    for path in sorted((folder / "runs").glob("*.json"))[:1]:
        task.refuse_other(Task(**_read(path)["task"]), "these flags", f"out = {str(folder)!r}")


def load(folder: Path) -> Measured:
    """What a folder holds.

    Raises:
        ConfigError: nothing, records of another format, or of several tasks.
    """
    tables = [(path, _read(path)) for path in sorted((folder / "runs").glob("*.json"))]
    if not tables:
        raise ConfigError(
            f"{folder}: holds no measurements; run torchrun --nproc-per-node=2 -m benchmarks.throughput --out {folder}"
        )
    task = Task(**tables[0][1]["task"])
    runs = []
    for path, table in tables:
        task.refuse_other(Task(**table["task"]), str(tables[0][0]), str(path))
        runs.append(Run(case_of(table["case"]), table["repeat"], table["figures"], table["provenance"]))
    links: dict[str, Any] = {}
    for path in sorted((folder / "links").glob("*.json"), key=lambda path: int(path.stem)):
        links |= _read(path)["levels"]
    return Measured(folder, task, tuple(runs), links)


def _read(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
        found = table["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no record of benchmarks.throughput ({error}); move it aside") from None
    if found != FORMAT:
        raise ConfigError(f"{path}: is of format {found}, and this version reads {FORMAT}; measure again elsewhere")
    return dict(table)
