"""Figures in words, the same in the terminal, on the page and in the pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from trainer.records.reader import Run
from trainer.report.speedups import Speedup

NONE = "—"


def number(value: float | None, form: str = ",.0f", unit: str = "") -> str:
    """A figure in a format, with its unit; a dash where it was not measured."""
    return NONE if value is None else f"{value:{form}}{unit}"


def accuracy(value: float | None) -> str:
    """A fraction of the test set to four places."""
    return number(value, ".4f")


def seconds(value: float | None) -> str:
    """A time in seconds, three figures or whole seconds."""
    if value is None:
        return NONE
    return f"{value:,.0f} s" if value >= 100 else f"{value:.1f} s" if value >= 1 or value == 0 else f"{value:.2g} s"


def size(value: float | None) -> str:
    """A size in bytes with a decimal prefix."""
    if value is None:
        return NONE
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1_000:
            return f"{value:.3g} {unit}"
        value /= 1_000
    return f"{value:,.3g} TB"


def speedup(found: Speedup | None) -> str:
    """A time-to-accuracy speedup, with the sign of a bound."""
    if found is None:
        return NONE
    return ("" if found.bound == "=" else f"{found.bound} ") + f"{found.ratio:.2f}"


def plain(value: Any) -> str:
    """Any value of a record, in words."""
    if value is None:
        return NONE
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return json.dumps(value)


def pairs(table: Any) -> str:
    """The entries of a table in one line."""
    return ", ".join(f"{name} {plain(value)}" for name, value in table.items()) or NONE


def moment(value: Any) -> str:
    """A time of day in UTC from its ISO form; anything else as it stands."""
    try:
        return f"{datetime.fromisoformat(value).astimezone(UTC):%Y-%m-%d %H:%M} UTC"
    except (TypeError, ValueError):
        return plain(value)


def duration(value: float) -> str:
    """A time in hours, minutes and seconds."""
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


def about(run: Run) -> list[tuple[str, str]]:
    """Lines of (word, figures) that say what was trained, with what and when; gaps in the record are left out."""
    figures, ranks = run.figures, run.number("world_size")
    trained = [_with(figures.get("data"), run.number("data_samples"), "samples")]
    trained.append(_with(figures.get("model"), run.number("parameters"), "parameters"))
    means = [] if ranks is None else [f"{ranks:.0f} rank{'s' * (ranks != 1)}"]
    means += [plain(figures["device"])] if figures.get("device") else []
    versions = figures.get("versions")
    means += [f"{name} {plain(value)}" for name, value in versions.items()] if isinstance(versions, dict) else []
    when = [moment(figures["started_at"])] if figures.get("started_at") else []
    wall_s = run.number("wall_s")
    when += [] if wall_s is None else [f"{duration(wall_s)} in all"]
    told = [("trained", trained), ("policy", [plain(figures.get("policy"))]), ("on", means), ("started", when)]
    lines = [(word, ", ".join(each for each in parts if each)) for word, parts in told]
    return [(word, line) for word, line in lines if line]


def _with(name: Any, count: float | None, unit: str) -> str:
    """A name, and how many of what it has."""
    return "" if name is None else plain(name) + ("" if count is None else f" ({count:,.0f} {unit})")


def plan(table: Any) -> str:
    """The batch and the period of a plan, short enough for a picture."""
    return f"b {plain(table.get('batch_per_rank'))}, H {plain(table.get('sync_period_steps'))}"


def headline(run: Run) -> list[tuple[str, str, str]]:
    """The run's results: (figure, its name, what it is beside)."""
    best = run.number("best_test_accuracy")
    return [
        (accuracy(run.number("test_accuracy")), "test accuracy", f"best {accuracy(best)}"),
        (number(run.number("scaling_speedup"), ".2f"), "scaling speedup", _against_ranks(run)),
        (number(run.number("samples_per_s")), "samples/s", f"{number(run.number('samples'))} samples"),
        (seconds(run.number("elapsed_s")), "training clock", f"evaluation beside it {seconds(run.number('eval_s'))}"),
    ]


def _against_ranks(run: Run) -> str:
    ranks = run.number("world_size")
    return "over one rank alone" if ranks is None else f"{ranks:.0f} rank{'s' * (ranks != 1)}, over one alone"


def columns(rows: Sequence[Sequence[str]], words: Sequence[int]) -> str:
    """Text in columns: these to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.ljust(widths[i]) if i in words else cell.rjust(widths[i]) for i, cell in enumerate(row)] for row in rows
    ]
    return "\n".join("  ".join(row).rstrip() for row in aligned)
