"""Reads a run's directory: records on disk become frozen dataclasses, and these give the time to an accuracy."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError

Figures = Mapping[str, Any]
FACTS = ("data", "data_samples", "model", "parameters", "world_size", "device", "versions", "started_at")
"""Names that a run's `started` event has facts under."""
Line = tuple[str, Figures]  # "PATH line 7", and what it holds


@dataclass(frozen=True)
class Eval:
    """One evaluation of the consensus model; the time is the training clock's, evaluation itself excluded."""

    local_step: int
    samples: int
    elapsed_s: float
    accuracy: float | None
    loss: float | None
    virtual_s: float | None = None
    """Of federated devices."""
    over_devices: tuple[float, ...] = ()
    """Eleven quantiles of the accuracy over devices, from the worst to the best; none without devices."""


@dataclass(frozen=True)
class Round:
    """One recorded averaging; samples are counted over all ranks, the loss is the mean since the record before."""

    local_step: int
    samples: int
    elapsed_s: float
    train_loss: float | None


@dataclass(frozen=True)
class Phase:
    """Consecutive rounds under one plan, from and to so many samples over all ranks; `why` is what decided it."""

    number: int
    name: str
    begin_samples: int
    end_samples: int
    plan: Figures
    why: Figures


@dataclass(frozen=True)
class Run:
    """A run as it is on disk. `figures` are summary.json's, or of an unfinished run those that its records hold."""

    folder: Path
    label: str
    finished: bool
    figures: Figures
    evals: tuple[Eval, ...]
    rounds: tuple[Round, ...]
    phases: tuple[Phase, ...]
    events: tuple[Figures, ...]
    config_text: str
    planned_samples: int | None

    def number(self, name: str) -> float | None:
        """A figure; None where it was not measured or is not there."""
        value = self.figures.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    def state(self) -> str:
        """finished, or how far it came."""
        if self.finished:
            return "finished"
        samples = self.number("samples") or 0
        return f"unfinished, {samples:,.0f}" + (f" of {self.planned_samples:,}" if self.planned_samples else "")


def load_run(folder: str | Path) -> Run:
    """Read a run's directory, finished or not.

    Raises:
        ConfigError: not a run's directory, or one whose records cannot be read; its text is one line.
    """
    folder = Path(folder)
    lines = list(read_lines(folder / "metrics.jsonl"))
    config_text, config = _config(folder / "config.toml")
    evals = tuple(_eval(line) for line in lines if line[1]["kind"] == "eval")
    rounds = tuple(_round(line) for line in lines if line[1]["kind"] == "round")
    phases = _phases(lines)
    summary = _summary(folder / "summary.json", lines)
    last = max([each.local_step for each in evals] + [each.local_step for each in rounds], default=0)
    # a run that went on past its end from a checkpoint still has the summary of its first end
    finished = summary is not None and (summary.get("local_steps") or last) >= last
    figures = summary if summary is not None and finished else _so_far(lines, evals, rounds, phases, config)
    figures = {**_facts(lines, config), **figures}
    return Run(
        folder=folder,
        label=str(figures.get("name") or folder.resolve().name),
        finished=finished,
        figures=figures,
        evals=evals,
        rounds=rounds,
        phases=phases,
        events=tuple({k: v for k, v in line.items() if k != "kind"} for _, line in lines if line["kind"] == "event"),
        config_text=config_text,
        planned_samples=config.get("run", {}).get("samples"),
    )


def read_lines(path: Path) -> Iterator[Line]:
    """The records of a metrics.jsonl, each with the words that name its line."""
    try:
        rows = [row for row in enumerate(path.read_bytes().split(b"\n"), 1) if row[1].strip()]
    except OSError as error:
        mend = "name a run's directory, which holds metrics.jsonl, such as runs/NAME"
        raise ConfigError(f"{path.parent}: not a run, or not readable ({error.strerror}): {mend}") from error
    for number, row in rows:
        where = f"{path} line {number}"
        try:
            record = json.loads(row.decode(), parse_constant=lambda _: None)
        except ValueError as error:
            if number == rows[-1][0]:
                return  # half written: the run was killed
            raise ConfigError(f"{where}: is not JSON ({error}); mend or delete that line") from error
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            raise ConfigError(f"{where}: is not a record with a kind; mend or delete that line")
        yield where, record


def _number(line: Line, name: str) -> float:
    where, record = line
    value = record.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{where}: {name} = {value!r} in a record of kind {record['kind']}; mend or delete that line")
    return value


def _optional(line: Line, name: str) -> float | None:
    return None if line[1].get(name) is None else _number(line, name)


def _table(line: Line, name: str) -> Figures:
    value = line[1].get(name) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{line[0]}: {name} = {value!r}: must be a table; mend or delete that line")
    return value


def _place(line: Line) -> tuple[int, int, float]:
    return int(_number(line, "local_step")), int(_number(line, "samples")), _number(line, "elapsed_s")


def _eval(line: Line) -> Eval:
    deciles = line[1].get("device_accuracy_deciles") or ()
    seen = _optional(line, "test_accuracy"), _optional(line, "test_loss"), _optional(line, "virtual_s")
    return Eval(*_place(line), *seen, tuple(deciles) if isinstance(deciles, list) else ())


def _round(line: Line) -> Round:
    return Round(*_place(line), _optional(line, "train_loss"))


def _phases(lines: Sequence[Line]) -> tuple[Phase, ...]:
    """A phase record says not where it begins: that is where the records before it had come to."""
    begun: list[tuple[Line, int]] = []
    samples = 0
    for line in lines:
        if line[1]["kind"] == "phase":
            begun.append((line, samples))
        elif line[1]["kind"] in ("round", "eval"):
            samples = int(_number(line, "samples"))
    ends = [at for _, at in (*begun[1:], (None, samples))]
    return tuple(_phase(line, at, end) for (line, at), end in zip(begun, ends, strict=False))


def _phase(line: Line, begin: int, end: int) -> Phase:
    name = str(line[1].get("name", ""))
    return Phase(int(_number(line, "number")), name, begin, end, _table(line, "plan"), _table(line, "why"))


def _summary(path: Path, lines: Sequence[Line]) -> Figures | None:
    """summary.json, or the `end` record where a run was killed between the two."""
    try:
        summary = json.loads(path.read_text(), parse_constant=lambda _: None)
    except FileNotFoundError:
        return next(
            ({k: v for k, v in line.items() if k != "kind"} for _, line in lines if line["kind"] == "end"), None
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); mend or delete that file") from error
    if not isinstance(summary, dict):
        raise ConfigError(f"{path}: is not a table of figures; mend or delete that file")
    return summary


def _config(path: Path) -> tuple[str, Mapping[str, Any]]:
    """The resolved configuration as text and as tables; empty where there is none."""
    try:
        text = path.read_text()
        return text, tomllib.loads(text)
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); mend or delete that file") from error


def _facts(lines: Sequence[Line], config: Figures) -> dict[str, Any]:
    """Data, model, ranks and versions, from the records or else the configuration; older runs recorded less."""
    started = [record for _, record in lines if record["kind"] == "event" and record.get("what") == "started"][-1:]
    told = {name: record[name] for record in started for name in FACTS if name in record}
    tables = (("data", "data", "name"), ("model", "task", "model"))
    known = {fact: table.get(name) for fact, section, name in tables if isinstance(table := config.get(section), dict)}
    return {name: value for name, value in known.items() if value is not None} | told


def _so_far(
    lines: Sequence[Line], evals: Sequence[Eval], rounds: Sequence[Round], phases: Sequence[Phase], config: Figures
) -> Figures:
    """The figures of summary.json that the last records hold; what they do not is left out."""
    newest = [line for line in lines if line[1]["kind"] == "round"][-1:]
    names = ("elapsed_s", "compute_s", "sync_wait_s", "input_wait_s", "wire_bytes")
    figures: dict[str, Any] = {name: _optional(line, name) for line in newest for name in names}
    for _, record in newest:
        figures["rounds"] = record.get("round")
    places = [(each.samples, each.local_step, each.elapsed_s) for each in rounds]
    places += [(each.samples, each.local_step, each.elapsed_s) for each in evals]
    if places:
        samples, local_steps, elapsed_s = max(places)
        figures |= {"local_steps": local_steps, "samples": samples, "elapsed_s": elapsed_s}
        figures["samples_per_s"] = samples / elapsed_s if elapsed_s > 0 else None
    accuracies = [each.accuracy for each in evals if each.accuracy is not None]
    if accuracies:
        figures |= {"test_accuracy": accuracies[-1], "best_test_accuracy": max(accuracies)}
    figures["policy"] = config.get("policy", {}).get("name")
    figures["phases"] = len(phases)
    return figures
