"""The report as one HTML page that needs no network, and its pictures as files beside it."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.records.reader import Run
from trainer.report import figures, text
from trainer.report.drawing import COLORS, Picture
from trainer.report.seeds import Line, lines_of
from trainer.report.speedups import Speedup, speedups, with_distinct_labels
from trainer.report.style import CSS, SORT, SORT_HASH

Form = Callable[[Any], str]

# a figure of summary.json, its name on the page with its unit, and how it is written
FIGURES: tuple[tuple[str, str, Form], ...] = (
    ("data", "data", text.plain),
    ("data_samples", "training samples in the data", text.plain),
    ("model", "model", text.plain),
    ("parameters", "parameters", text.plain),
    ("policy", "policy", text.plain),
    ("world_size", "ranks", text.plain),
    ("device", "device", text.plain),
    ("started_at", "started", lambda value: text.moment(value)),
    ("wall_s", "duration, all in all", text.seconds),
    ("test_accuracy", "test accuracy (fraction)", text.accuracy),
    ("best_test_accuracy", "best test accuracy (fraction)", text.accuracy),
    ("scaling_speedup", "scaling speedup (times one rank)", lambda value: text.number(value, ".3f")),
    ("samples_per_s", "samples/s", text.number),
    ("reference_samples_per_s", "samples/s of one rank alone", text.number),
    ("samples", "samples (all ranks)", text.plain),
    ("local_steps", "local steps", text.plain),
    ("rounds", "rounds", text.plain),
    ("phases", "phases", text.plain),
    ("elapsed_s", "training clock", text.seconds),
    ("compute_s", "compute", text.seconds),
    ("sync_wait_s", "exposed communication", text.seconds),
    ("input_wait_s", "waiting for input", text.seconds),
    ("eval_s", "evaluation, off the clock", text.seconds),
    ("checkpoint_s", "checkpoints, off the clock", text.seconds),
    ("wire_bytes", "sent by rank 0", text.size),
    ("skipped_steps", "skipped steps", text.plain),
    ("peak_memory_bytes", "peak memory of rank 0", text.size),
    ("versions", "versions", lambda value: text.pairs(value) if isinstance(value, Mapping) else text.plain(value)),
)
OVER_DEVICES: tuple[tuple[str, str, Form], ...] = (
    ("device_accuracy", "accuracy over devices, mean", text.accuracy),
    ("device_accuracy_weighted", "accuracy over devices, by samples", text.accuracy),
    ("device_accuracy_std", "accuracy over devices, deviation", text.accuracy),
    ("worst_tenth_accuracy", "worst tenth of the devices", text.accuracy),
    ("best_tenth_accuracy", "best tenth of the devices", text.accuracy),
    ("new_devices", "devices that never took part", text.plain),
    ("new_device_accuracy", "accuracy on devices that never took part", text.accuracy),
    ("tuned_device_accuracy", "tuned on each device, mean", text.accuracy),
    ("tuned_worst_tenth_accuracy", "tuned, worst tenth", text.accuracy),
    ("virtual_s", "virtual seconds of the devices", text.seconds),
)
"""Figures of runs with federated devices."""


OWN_PICTURES = 4
"""Lines whose first run gets a picture of its phases: a page of thirty runs is for comparing them."""


def write_report(runs: Sequence[Run], out: str | Path | None = None) -> Path:
    """Write the page and its pictures; the first run is what the others' times are counted from.

    Without `out` one run's page is RUN/report.html with RUN/report/*.png, and several runs' are in the folder `report`
    beside them.

    Returns:
        The page's path.

    Raises:
        ConfigError: no runs, or a folder that cannot be written.
    """
    if not runs:
        raise ConfigError("RUN = []: name one run's directory or more")
    runs = with_distinct_labels(runs)
    page, folder = _places([run.folder for run in runs], None if out is None else Path(out))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shared = figures.comparison(runs)
        drawn = {line.runs[0].label for line in lines_of(runs)[:OWN_PICTURES]}
        own = [figures.phases(run, number) if run.label in drawn else None for number, run in enumerate(runs, 1)]
        for picture in (*shared, *(each for each in own if each)):
            (folder / f"{picture.name}.png").write_bytes(picture.png)
        page.write_text(html(runs, shared, own), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out = {str(folder)!r}: cannot be written ({error.strerror}); choose another") from error
    return page


def _places(runs: Sequence[Path], out: Path | None) -> tuple[Path, Path]:
    """The page's file and the pictures' folder."""
    if out is None and len(runs) == 1:
        return runs[0] / "report.html", runs[0] / "report"
    folder = out or Path(os.path.commonpath([run.resolve().parent for run in runs])) / "report"
    return folder / "report.html", folder


def html(runs: Sequence[Run], shared: Sequence[Picture], own: Sequence[Picture | None]) -> str:
    """The whole page."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    places = {run.label: i for i, line in enumerate(lines_of(runs)) for run in line.runs}  # by colour
    body = [
        f"<h1>{escape(title)}</h1>",
        _tiles(runs[0]) if len(runs) == 1 else _lead(runs),
        f'<div class="grid">{"".join(map(figure, shared))}</div>',
        "" if shared else '<p class="faint">No round and no evaluation is recorded yet.</p>',
        _time_to_accuracy([line.runs[0] for line in lines_of(runs)]) if len(runs) > 1 else "",
        *(_run(places[run.label], run, picture) for run, picture in zip(runs, own, strict=True)),
        "<h2>All figures</h2>",
        _all_figures(runs),
        *(_config(places[run.label], run) for run in runs),
    ]
    return document(f"Report: {title}", body)


def document(title: str, body: Iterable[str]) -> str:
    """One HTML file that needs no network, in the report's style."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        f"style-src 'unsafe-inline'; script-src '{SORT_HASH}'\">\n"
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + f"\n<script>{SORT}</script>\n</body>\n</html>\n"
    )


def _tiles(run: Run) -> str:
    """One run's results in large type."""
    tiles = "".join(
        f'<div class="tile"><b>{escape(figure)}</b><span>{escape(name)}</span>'
        f'<span class="faint">{escape(beside)}</span></div>'
        for figure, name, beside in text.headline(run)
    )
    return f'{_about(run)}<div class="tiles">{tiles}</div>'


def _about(run: Run) -> str:
    """A few lines that say what was trained, with what and when."""
    lines = "".join(f"<p><b>{escape(name)}</b><span>{escape(words)}</span></p>" for name, words in text.about(run))
    return f'<div class="about">{lines}{_mark(run)}</div>'


# figures of several runs: name, heading, form, and 1 where more is better, else -1
LEAD: tuple[tuple[str, str, Form, int], ...] = (
    ("test_accuracy", "test accuracy", text.accuracy, 1),
    ("scaling_speedup", "scaling speedup", lambda value: text.number(value, ".2f"), 1),
    ("samples_per_s", "samples/s", text.number, 1),
    ("elapsed_s", "training clock", text.seconds, -1),
)


def _lead(runs: Sequence[Run]) -> str:
    """Several runs' results, a row each."""
    abouts = "".join(
        f"<p>{_line_name(i, line)}: {escape('; '.join(words for _, words in text.about(line.runs[0])))}</p>"
        for i, line in enumerate(lines_of(runs))
    )
    lines = lines_of(runs)
    head = ("run", *(title for _, title, *_ in LEAD), "time-to-accuracy speedup")
    best = [_best(lines, name, sign) for name, _, _, sign in LEAD]
    rows = []
    for i, line in enumerate(lines):
        cells = [_cell(line, name, form, best=i in those) for (name, _, form, _), those in zip(LEAD, best, strict=True)]
        last = escape(_last_speedup(runs[0], line.runs[0]) if i else "first run")
        rows.append([_line_name(i, line), *cells, last])
    beside = (
        "The last column is the first run's training time over this run's, to the highest accuracy that both reached. "
        "The best figure of a column is marked ★. A heading sorts by its column."
    )
    if len(lines) < len(runs):
        beside += " Runs that differ in their seed only are one line: mean ± standard deviation."
    whole = f'{table(head, rows, kind="lead")}<p class="faint">{beside}</p>'
    shown = " open" if len(lines) <= OWN_PICTURES else ""
    return f'{whole}<details{shown}><summary>What was trained</summary><div class="about">{abouts}</div></details>'


def _best(lines: Sequence[Line], name: str, sign: int) -> set[int]:
    """The places of the lines with the best figure; none where all have the same."""
    found = {i: sign * value for i, line in enumerate(lines) if (value := line.mean(name)) is not None}
    most = max(found.values(), default=0.0)
    places = {i for i, value in found.items() if value == most}
    return places if len(places) < len(found) else set()


def _cell(line: Line, name: str, form: Form, *, best: bool) -> str:
    """A figure with its spread over seeds, and a mark where it is the best."""
    words, spread = form(line.mean(name)), line.spread(name)
    words += "" if spread is None else f" ± {form(spread)}"
    return f'<b class="best">{escape(words)} ★</b>' if best else escape(words)


def _line_name(i: int, line: Line) -> str:
    """A line behind its colour; a run of its own also says how far it came."""
    if len(line.runs) == 1:
        return _name(i, line.runs[0])
    unfinished = sum(not run.finished for run in line.runs)
    mark = f' <span class="mark">{unfinished} unfinished</span>' if unfinished else ""
    return f'<span class="chip" style="background:{COLORS[i % len(COLORS)]}"></span>{escape(line.label)}{mark}'


def _last_speedup(reference: Run, run: Run) -> str:
    found = speedups(reference, run)
    return f"{text.speedup(found[-1])} at {found[-1].accuracy:.4f}" if found else "no accuracy reached by both"


def _name(i: int, run: Run) -> str:
    """A run's name behind its colour, and how far it came where it has not finished."""
    chip = f'<span class="chip" style="background:{COLORS[i % len(COLORS)]}"></span>'
    return f"{chip}{escape(run.label)} {_mark(run)}".rstrip()


def _mark(run: Run) -> str:
    return "" if run.finished else f'<span class="mark">{escape(run.state())} samples</span>'


def figure(picture: Picture) -> str:
    """A picture in the page itself, with its note."""
    data = base64.b64encode(picture.png).decode()
    note = f"<figcaption>{escape(picture.note)}</figcaption>" if picture.note else ""
    return f'<figure><img alt="{escape(picture.title)}" src="data:image/png;base64,{data}">{note}</figure>'


def _time_to_accuracy(runs: Sequence[Run]) -> str:
    """The speedup of every run over the first at every accuracy that both reached, in rows of accuracies."""
    found = [speedups(runs[0], run) for run in runs[1:]]
    title = f"<h2>Time-to-accuracy speedup over {escape(runs[0].label)}</h2>"
    if not any(found):
        return f"{title}<p>No accuracy was reached by both {escape(runs[0].label)} and another run.</p>"
    by_level: list[dict[float, Speedup]] = [{each.accuracy: each for each in those[:-1]} for those in found]
    levels = sorted({level for those in by_level for level in those}, reverse=True)
    rows = [["highest of both", *(escape(_last_speedup(runs[0], run)) for run in runs[1:])]]
    rows += [[f"{level:.3f}", *(escape(text.speedup(those.get(level))) for those in by_level)] for level in levels]
    none = [run.label for run, those in zip(runs[1:], found, strict=True) if not those]
    left = f'<p class="faint">No accuracy reached by both: {escape(", ".join(none))}.</p>' if none else ""
    head = ("test accuracy", *(run.label for run in runs[1:]))
    return f'{title}<p class="faint">{escape(figures.TIME_TO_ACCURACY)}</p>{table(head, rows)}{left}'


def _all_figures(runs: Sequence[Run]) -> str:
    """Every figure of every run, a column a run; keys that this page does not know come last, under their own names."""
    known = {key for key, *_ in (*FIGURES, *OVER_DEVICES)}
    known |= {f"{kind}device_accuracy_deciles" for kind in ("", "tuned_")}  # drawn
    more = dict.fromkeys(key for run in runs for key in run.figures if key not in known and key != "name")
    rows = [["state", *(escape(run.state()) for run in runs)]]
    of_devices = OVER_DEVICES if any("virtual_s" in run.figures for run in runs) else ()
    for key, name, form in (*FIGURES, *of_devices, *((key, key, text.plain) for key in more)):
        rows.append([escape(name), *(escape(_formed(form, run.figures.get(key))) for run in runs)])
    return table(("figure", *(run.label for run in runs)), rows, kind="figures")


def _formed(form: Form, value: Any) -> str:
    """A figure as it is written here, or as it stands where it is not of the kind expected."""
    try:
        return form(value)
    except (TypeError, ValueError):
        return text.plain(value)


def _run(i: int, run: Run, picture: Picture | None) -> str:
    """One run's phases and events."""
    phases = [
        [
            str(phase.number),
            escape(phase.name),
            *(escape(text.plain(phase.plan.get(name))) for name in ("batch_per_rank", "sync_period_steps", "lr_scale")),
            f"{phase.begin_samples:,}",
            f"{phase.end_samples - phase.begin_samples:,}",
            escape(text.pairs(phase.why)),
        ]
        for phase in run.phases
    ]
    head = ("phase", "name", "batch a rank", "sync period", "LR scale", "from sample", "samples", "why")
    drawn = figure(picture) if picture else f'<p class="faint">{_undrawn(run)}</p>'
    return (
        f"<h2>Phases of {_name(i, run)}</h2>{table(head, phases, words_last=True)}"
        f'<div class="grid">{drawn}<div>{_events(run)}</div></div>'
    )


def _undrawn(run: Run) -> str:
    """Why a run has no picture of its phases."""
    if run.rounds or run.evals:
        return f"Drawn by a report of its own: python -m trainer.report {escape(str(run.folder))}"
    return "No round and no evaluation is recorded yet."


def _config(i: int, run: Run) -> str:
    """The configuration that repeats a run."""
    whose = f"<summary>Configuration of {_name(i, run)}</summary>"
    return f"<details>{whose}<pre>{escape(run.config_text or text.NONE)}</pre></details>"


def _events(run: Run) -> str:
    events = [event for event in run.events if event.get("what") != "started"]  # that is said at the top
    if not events:
        return '<p class="faint">No events.</p>'
    rows = [
        [
            escape(text.plain(event.get("what"))),
            *(escape(text.plain(event.get(name))) for name in ("local_step", "samples")),
            escape(text.pairs({k: v for k, v in event.items() if k not in ("what", "local_step", "samples")})),
        ]
        for event in events
    ]
    return "<h3>Events</h3>" + table(("event", "local step", "samples", "figures"), rows, words_last=True)


def table(head: Iterable[str], rows: Iterable[Sequence[str]], *, words_last: bool = False, kind: str = "short") -> str:
    """A table that scrolls within the page; cells are HTML already, headings are not."""
    names = list(head)
    classes = [""] * (len(names) - 1) + [' class="words"' * words_last]
    top = "".join(f'<th scope="col"{of}>{escape(name)}</th>' for name, of in zip(names, classes, strict=True))
    body = []
    for first, *cells in rows:
        last = [f'<td class="words">{cells.pop()}</td>'] if words_last and cells else []
        body.append(f'<tr><th scope="row">{first}</th>{"".join([*(f"<td>{cell}</td>" for cell in cells), *last])}</tr>')
    return (
        f'<div class="scroll {kind}"><table><thead><tr>{top}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )
