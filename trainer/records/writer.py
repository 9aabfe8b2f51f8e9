"""What a run leaves behind while it goes: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trainer.config.config import Config
from trainer.control.controller import Phase
from trainer.plan import plain

LINE_EVERY_S = 5.0


class Records:
    """The records of rank 0; the base class is every other rank's, and writes nothing."""

    def write(self, kind: str, figures: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, flushed, and the same figures in TensorBoard."""

    def phase(self, phase: Phase) -> None:
        """A phase begins."""
        self.write("phase", {"number": phase.number, "name": phase.name, "plan": plain(phase.plan), "why": phase.why})

    def event(self, what: str, **figures: Any) -> None:
        """Something worth knowing: a checkpoint, a stop, a warning."""
        self.write("event", {"what": what} | figures)

    def say(self, line: str) -> None:
        """A line for whoever looks on, which is no record."""

    def say_start(self, facts: Mapping[str, Any]) -> None:
        """What is trained, for whoever looks on."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The end's figures, as `end` and as summary.json."""

    @property
    def offset(self) -> int:
        """Bytes of metrics.jsonl so far: a resume cuts it back to here."""
        return 0

    def sync(self) -> None:
        """Make sure that metrics.jsonl is on the disk."""


class RunRecords(Records):
    """Writes `runs/NAME/` as the ranks go. What cannot be written is lost, and said; training goes on."""

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder = folder
        self._config = config
        self._lines = _Lines(folder / "metrics.jsonl")
        self._board: Any = None
        self._draws = config.record.tensorboard
        self._bar = _Progress(config.run.samples, config.record.progress)

    @property
    def offset(self) -> int:
        return self._lines.offset

    def sync(self) -> None:
        self._lines.sync()

    def write(self, kind: str, figures: Mapping[str, Any]) -> None:
        self._lines.add({"kind": kind} | {name: _finite(value) for name, value in figures.items()})
        if self._draws:
            try:
                self._tensorboard(kind, figures)
            except OSError as error:
                self._draws = False
                _warn(f"no more TensorBoard events: {error.strerror}")
        self._bar.show(kind, figures)

    def event(self, what: str, **figures: Any) -> None:
        if what == "started":
            self.say_start(figures)
        super().event(what, **figures)

    def say(self, line: str) -> None:
        self._bar.say(line)

    def say_start(self, facts: Mapping[str, Any]) -> None:
        for line in start_lines(self._folder, facts):
            self._bar.say(line)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.write("end", summary)
        path = self._folder / "summary.json"
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps({name: _finite(value) for name, value in summary.items()}, indent=2) + "\n")
            partial.replace(path)
        except OSError as error:
            _warn(f"no summary.json: {error.strerror}")

    def close(self) -> None:
        self._bar.close()
        self._lines.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()

    def _tensorboard(self, kind: str, figures: Mapping[str, Any]) -> None:
        if "local_step" not in figures or kind == "end":
            return
        if self._board is None:  # imported late: it takes seconds
            from torch.utils.tensorboard import SummaryWriter

            purge = figures["local_step"]
            self._board = SummaryWriter(str(self._folder / "tb"), purge_step=purge)
        numbers = dict(figures) | {f"plan/{name}": value for name, value in figures.get("plan", {}).items()}
        for name, value in numbers.items():
            if isinstance(value, int | float) and math.isfinite(value) and name != "local_step":
                self._board.add_scalar(f"{kind}/{name}", value, figures["local_step"])


class _Lines:
    """A file of JSON lines, all of them whole: one that cannot be written is taken back, and counted."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self.offset = self._file.tell()
        self._lost = 0

    def add(self, line: Mapping[str, Any]) -> None:
        lost = {"kind": "event", "what": "warning", "message": f"{self._lost} records could not be written"}
        text = (json.dumps(lost) + "\n" if self._lost else "") + json.dumps(line) + "\n"
        try:
            coded = text.encode()
            if self._file.write(coded) != len(coded):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.offset += len(coded)
            self._lost = 0
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self.offset)
            self._lost += 1
            if self._lost == 1:
                _warn(f"records cannot be written: {error.strerror}")

    def sync(self) -> None:
        if not self._file.closed:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _warn(message: str) -> None:
    """A warning for whoever looks on, where the records themselves cannot hold it."""
    with contextlib.suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


class _Progress:
    """A bar on a terminal, a plain line every few seconds elsewhere."""

    def __init__(self, samples: int, shown: bool) -> None:
        self._shown = shown
        self._total = samples
        self._state: dict[str, str] = {}
        self._told = time.monotonic()
        self._bar = (
            tqdm(total=samples, unit="sample", unit_scale=True, dynamic_ncols=True, smoothing=0.1)
            if shown and sys.stderr.isatty()
            else None
        )

    def show(self, kind: str, figures: Mapping[str, Any]) -> None:
        if not self._shown:
            return
        if kind == "phase":
            plan = figures["plan"]
            self._state["phase"] = f"{figures['number']} {figures['name']}"
            self._say(f"phase {figures['number']}: {figures['name']}, {plan_words(plan)}")
        elif kind == "eval":
            self._state["accuracy"] = f"{figures['test_accuracy']:.4f}"
            self._say(
                f"{figures['samples']:,} samples, {figures['elapsed_s']:.1f} s: "
                f"test accuracy {figures['test_accuracy']:.4f}, loss {figures['test_loss']:.4f}"
            )
        elif kind == "round":
            self._round(figures)
        elif kind == "event":
            self._event(figures)

    def _event(self, figures: Mapping[str, Any]) -> None:
        what, *rest = figures.values()
        if "message" in figures:
            self._say(f"{what}: {figures['message']}")
        elif what != "started":  # that is said at length
            self._say(f"{what}: " + ", ".join(f"{n} {v}" for n, v in zip(list(figures)[1:], rest, strict=True)))

    def say(self, line: str) -> None:
        """A line of its own, where progress is shown."""
        if self._shown:
            self._say(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _round(self, figures: Mapping[str, Any]) -> None:
        self._state["loss"] = f"{figures['train_loss']:.4f}"
        if self._bar is not None:
            self._bar.set_postfix(self._state, refresh=False)
            self._bar.update(figures["samples"] - self._bar.n)
        elif time.monotonic() - self._told > LINE_EVERY_S:
            rate = figures["samples"] / max(figures["elapsed_s"], 1e-9)
            left = max(0, self._total - figures["samples"]) / rate
            state = ", ".join(f"{name} {value}" for name, value in self._state.items())
            self._say(
                f"{figures['samples']:,} of {self._total:,} samples, {rate:,.0f} samples/s, {state}, {left:.0f} s left"
            )

    def _say(self, line: str) -> None:
        self._told = time.monotonic()
        if self._bar is not None:
            self._bar.write(line)
        else:
            with contextlib.suppress(OSError):  # a log on a disk that is full
                print(line, flush=True)


@contextmanager
def open_records(folder: Path, config: Config, *, rank: int) -> Iterator[Records]:
    """This rank's records, closed at the end; only rank 0's write anything."""
    if rank != 0:
        yield Records()
        return
    records = RunRecords(folder, config)
    try:
        yield records
    finally:
        records.close()


def start_lines(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """The facts of a run in words: what is trained, on what, and what is planned."""
    ranks = facts["world_size"]
    named = (f"{plan['name']} {plan_words(plan)}".strip() for plan in facts["plans"])
    return [
        f"run {folder.name}: {facts['data']} ({facts['data_samples']:,} samples), {facts['model']} "
        f"({facts['parameters']:,} parameters), {facts['planned_samples']:,} samples to train",
        f"on {ranks} rank{'s' * (ranks != 1)} ({facts['device']}), recorded in {folder}",
        f"policy {facts['policy']}: {'; '.join(named)}",
    ]


def plan_words(plan: Mapping[str, Any]) -> str:
    """Batch and period of a Plan."""
    period = plan["sync_period_steps"]
    return f"batch {plan['batch_per_rank']} a rank, {f'period {period}' if period else 'averaged at the end'}"


def append_event(folder: Path, what: str, **figures: Any) -> None:
    """An event of a run whose records are closed; said to whoever looks on, also where it cannot be written."""
    print(f"{what}: " + ", ".join(map(str, figures.values())), file=sys.stderr, flush=True)
    with contextlib.suppress(OSError), open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"kind": "event", "what": what} | figures) + "\n")


def _finite(value: Any) -> Any:
    """JSON knows no NaN or infinity: what was not measured is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return value
