"""The report's pictures, drawn with matplotlib's object interface and kept as PNG bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from trainer.records.reader import Eval, Phase, Round, Run
from trainer.report import text
from trainer.report.drawing import COLORS, STYLE, Picture, blank, legend, look, name_points, short, title_axes
from trainer.report.seeds import Line, band, lines_of
from trainer.report.speedups import speedups

AXES: Mapping[str, tuple[str, Callable[[Eval], float]]] = {
    "seconds": ("training seconds", lambda each: each.elapsed_s),
    "samples": ("samples (all ranks)", lambda each: each.samples),
    "local_steps": ("local steps", lambda each: each.local_step),
}
VIRTUAL = ("virtual seconds of the devices", lambda each: each.virtual_s or 0.0)
DECILES = 11
BANDS = {"small": "#BFDDF2", "large": "#F7D3B5", "local": "#BFE6D5", "constant": "#E4E4E4"}
MORE_BANDS = ("#EBCFE0", "#F6EAB0", "#D8CCEB", "#D5DDC2")
SPENT = (
    ("compute_s", "compute", "#0072B2"),
    ("sync_wait_s", "exposed communication", "#D55E00"),
    ("input_wait_s", "waiting for input", "#F0C040"),
)
BESIDE = (("eval_s", "evaluation", "#009E73"), ("checkpoint_s", "checkpoints", "#7F7F7F"))

ACCURACY = "Accuracy axes begin where the lowest run stood after the first tenth of its evaluations."
TIME_TO_ACCURACY = (
    "The first run's training time to an accuracy over the other's: above 1 is faster. Accuracy is the best so far, "
    "linear between evaluations. A hollow mark is a bound: one of the two was already there when first evaluated."
)
SCALING = (
    "Samples/s of the run over samples/s of one rank alone at the small batch; up and to the right is better; "
    "dashed: as many times as there are ranks (ideal); dotted: one rank."
)
LOSS = "The faint line is every record, the strong one a running mean over a twentieth of them."
TIME = (
    "The thick bar is the training clock of rank 0; hatched is what is off that clock. Exposed communication is time "
    "that the training thread waits for the network, the lateness of other ranks included."
)
OVER_DEVICES = (
    "The consensus model on each device's own held-out samples. Line: the median device; dark band: all but the worst "
    "and the best tenth; faint band: all devices."
)
PHASES = "Bands are phases: b is the batch of a rank, H the local steps between two averagings."


def comparison(runs: Sequence[Run]) -> list[Picture]:
    """The pictures that hold all runs; one that would be empty is left out."""
    with matplotlib.rc_context(STYLE):
        return list(_comparison(runs))


def _comparison(runs: Sequence[Run]) -> Iterator[Picture]:
    if any(each.accuracy is not None for run in runs for each in run.evals):
        virtual = {"virtual": VIRTUAL} if all(run.evals and run.evals[-1].virtual_s for run in runs) else {}
        for name, (words, place) in {**AXES, **virtual}.items():
            note = ACCURACY if name == "seconds" and _floor(runs) is not None else ""
            picture = _accuracy(runs, words, place)
            yield Picture.of(f"accuracy_{name}", f"Test accuracy against {words}", note, picture)
    if any(each.over_devices for run in runs for each in run.evals):
        yield Picture.of("over_devices", "Accuracy over devices", OVER_DEVICES, _over_devices(runs))
    first = [line.runs[0] for line in lines_of(runs)]
    if any(speedups(first[0], run) for run in first[1:]):
        figure = _time_to_accuracy(first)
        yield Picture.of("time_to_accuracy", f"Time-to-accuracy speedup over {runs[0].label}", TIME_TO_ACCURACY, figure)
    if any(_scaling(run) for run in runs):
        left = [run.label for run in runs if not _scaling(run)]
        note = SCALING + (f" Not measured: {', '.join(left)}." if left else "")
        yield Picture.of("scaling", "Scaling speedup against test accuracy", note, _scatter(runs))
    if any(each.train_loss is not None for run in runs for each in run.rounds):
        note = LOSS if any(len(run.rounds) >= 40 for run in runs) else ""
        yield Picture.of("train_loss", "Training loss against samples", note, _losses(runs))
    if any(run.number(part[0]) for run in runs for part in (*SPENT, *BESIDE)):
        yield Picture.of("time", "Where the time went", TIME, _time(runs))


def phases(run: Run, number: int) -> Picture | None:
    """Accuracy and loss of the number-th run over its phases as bands; None where it has not come so far."""
    if not run.rounds and not run.evals:
        return None
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", run.label)
    name = f"phases_{safe}" if safe == run.label else f"phases_{safe}_{number}"
    with matplotlib.rc_context(STYLE):
        return Picture.of(name, f"Phases of {run.label}", PHASES, _phases(run))


def _start(runs: Sequence[Run | Line]) -> tuple[Figure, list[str]]:
    """An empty figure with room for a legend where there is more than one run, and the runs' names."""
    labels = [short(run.label) for run in runs]
    return blank(3.5, labels if len(runs) > 1 else ()), labels


def _accuracy(runs: Sequence[Run], words: str, place: Callable[[Eval], float]) -> Figure:
    lines = lines_of(runs)
    figure, labels = _start(lines)
    axes = figure.add_subplot()
    for i, line in enumerate(lines):
        curves = [[(place(each), each.accuracy) for each in run.evals] for run in line.runs]
        if len(curves) > 1:
            _band(axes, curves, label=labels[i], **look(i))
            continue
        _line(axes, curves[0], label=labels[i], markevery=1 + len(curves[0]) // 12, **look(i))
    axes.set_ylim(bottom=_floor(runs))
    title_axes(axes, f"Test accuracy against {words}", words, "test accuracy (fraction)")
    if len(lines) > 1:
        legend(figure, *axes.get_legend_handles_labels())
    return figure


def _over_devices(runs: Sequence[Run]) -> Figure:
    """The median device's accuracy, and how far devices are apart: bands of the middle eight tenths and of all."""
    figure, labels = _start(runs)
    axes = figure.add_subplot()
    for i, run in enumerate(runs):
        seen = [each for each in run.evals if len(each.over_devices) == DECILES]
        at, color = [each.samples for each in seen], look(i)["color"]
        for low, high, strength in ((0, 10, 0.12), (1, 9, 0.2)):
            lower, upper = ([each.over_devices[place] for each in seen] for place in (low, high))
            axes.fill_between(at, lower, upper, color=color, alpha=strength, linewidth=0)
        points = [(each.samples, each.over_devices[DECILES // 2]) for each in seen]
        _line(axes, points, label=labels[i], markevery=1 + len(points) // 12, **look(i))
    title_axes(axes, "Accuracy over devices", "samples (all ranks)", "accuracy on a device (fraction)")
    if len(runs) > 1:
        legend(figure, *axes.get_legend_handles_labels())
    return figure


def _floor(runs: Sequence[Run]) -> float | None:
    """Where the accuracy axis begins: below the first tenth of a run's evaluations nobody compares runs."""
    seen = [[each.accuracy for each in run.evals if each.accuracy is not None] for run in runs]
    if not any(len(those) // 10 for those in seen):
        return None
    lowest, highest = min(min(those[len(those) // 10 :]) for those in seen if those), max(map(max, filter(None, seen)))
    return lowest - 0.05 * (highest - lowest)


def _line(axes: Axes, points: Sequence[tuple[float, float | None]], **style: Any) -> None:
    """A line through the points that were measured."""
    seen = [(x, y) for x, y in points if y is not None]
    axes.plot([x for x, _ in seen], [y for _, y in seen], **style)


def _band(axes: Axes, curves: Sequence[Sequence[tuple[float, float | None]]], **style: Any) -> None:
    """The mean of several seeds' curves, and a band of a standard deviation to either side."""
    at, mean, spread = band(curves)
    axes.fill_between(at, mean - spread, mean + spread, color=style["color"], alpha=0.2, linewidth=0)
    axes.plot(at, mean, **(style | {"marker": ""}))


def _time_to_accuracy(runs: Sequence[Run]) -> Figure:
    labels = [f"{short(runs[0].label)} (the first run)", *(short(run.label) for run in runs[1:])]
    figure = blank(3.5, labels)
    axes = figure.add_subplot()
    axes.axhline(1.0, color=COLORS[0], linewidth=1.2, label=labels[0])
    for i, run in enumerate(runs[1:], 1):
        found = speedups(runs[0], run)
        _line(axes, [(each.accuracy, each.ratio) for each in found], label=labels[i], markevery=0.08, **look(i))
        hollow = look(i) | {"linestyle": "none", "markerfacecolor": "white", "zorder": 3}
        _line(axes, [(each.accuracy, each.ratio) for each in found if each.bound != "="], **hollow)
    across = "test accuracy that both reached (fraction)"
    title_axes(axes, "Time-to-accuracy speedup", across, "speedup (ratio of times)")
    legend(figure, *axes.get_legend_handles_labels())
    return figure


def _scaling(run: Run) -> tuple[float, float] | None:
    accuracy, speedup = run.number("test_accuracy"), run.number("scaling_speedup")
    return None if accuracy is None or speedup is None else (accuracy, speedup)


def _middle(line: Line) -> tuple[float, float] | None:
    """Means over the seeds."""
    accuracy, speedup = line.mean("test_accuracy"), line.mean("scaling_speedup")
    return None if accuracy is None or speedup is None else (accuracy, speedup)


def _scatter(runs: Sequence[Run]) -> Figure:
    figure = blank(3.7)
    axes = figure.add_subplot()
    points = [(i, short(line.label), place) for i, line in enumerate(lines_of(runs)) if (place := _middle(line))]
    for i, line in enumerate(lines_of(runs)):
        for accuracy, speedup in filter(None, map(_scaling, line.runs) if len(line.runs) > 1 else ()):
            axes.plot(accuracy, speedup, **(look(i) | {"linestyle": "none", "markersize": 4, "alpha": 0.5}))
    for i, _, (accuracy, speedup) in points:
        axes.plot(accuracy, speedup, **(look(i) | {"linestyle": "none", "markersize": 9}))
    accuracies, speedup_top = [at for _, _, (at, _) in points], max(up for _, _, (_, up) in points)
    margin = max(0.005, 0.18 * (max(accuracies) - min(accuracies)))
    axes.set_xlim(min(accuracies) - margin, max(accuracies) + margin)
    axes.axhline(1.0, color="#555555", linewidth=1, linestyle=":")
    ideal = sorted({int(ranks) for run in runs if _scaling(run) and (ranks := run.number("world_size"))})
    for ranks in ideal:
        _ideal(axes, ranks)
    axes.set_ylim(0, 1.15 * max(speedup_top, 1.0, *ideal))
    up = "scaling speedup (times one rank)"
    title_axes(axes, "Scaling speedup against test accuracy", "test accuracy (fraction)", up)
    name_points(figure, axes, [(label, place) for _, label, place in points])
    return figure


def _ideal(axes: Axes, ranks: int) -> None:
    """Ideal scaling: as many times one rank's samples/s as there are ranks."""
    axes.axhline(ranks, color="#555555", linewidth=1, linestyle="--")
    words, across = f"ideal: {ranks} rank{'s' * (ranks != 1)}", axes.get_xlim()[0]
    axes.annotate(words, (across, ranks), (4, 3), textcoords="offset points", fontsize=8.5, color="#555555")


def _losses(runs: Sequence[Run]) -> Figure:
    lines = lines_of(runs)
    figure, labels = _start(lines)
    axes = figure.add_subplot()
    for i, line in enumerate(lines):
        if len(line.runs) > 1:
            _band(
                axes, [[(e.samples, e.train_loss) for e in run.rounds] for run in line.runs], label=labels[i], **look(i)
            )
            continue
        _loss(axes, line.runs[0].rounds, label=labels[i], **(look(i) | {"marker": ""}))
    title_axes(axes, "Training loss against samples", "samples (all ranks)", "training loss")
    _scale(axes)
    if len(lines) > 1:
        legend(figure, *axes.get_legend_handles_labels())
    return figure


def _loss(axes: Axes, rounds: Sequence[Round], **style: Any) -> None:
    """The loss of every record faintly, and its running mean."""
    seen = [(each.samples, each.train_loss) for each in rounds if each.train_loss is not None]
    losses = [loss for _, loss in seen]
    width = max(1, len(losses) // 20)
    means = [sum(part) / len(part) for i in range(len(losses)) if (part := losses[max(0, i - width + 1) : i + 1])]
    if width > 1:
        _line(axes, seen, **(style | {"label": None, "alpha": 0.25, "linewidth": 0.8}))
    _line(axes, [(at, mean) for (at, _), mean in zip(seen, means, strict=True)], **style)


def _scale(axes: Axes) -> None:
    """Logarithmic where the losses span more than a factor of thirty."""
    low, high = axes.dataLim.intervaly
    if low > 0 and high > 30 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _time(runs: Sequence[Run]) -> Figure:
    """A thick bar a run for the training clock, and under it a thin hatched one for what is beside it; seconds.

    Seeds are one bar of their means.
    """
    lines = lines_of(runs)
    kinds = [part for part in (*SPENT, *BESIDE) if any(run.mean(part[0]) for run in lines)]
    figure = blank(1.1 + 0.72 * len(lines), [part[1] for part in kinds])
    axes = figure.add_subplot()
    longest = max(sum(run.mean(name) or 0.0 for name, *_ in parts) for run in lines for parts in (SPENT, BESIDE))
    for i, run in enumerate(lines):
        axes.text(0, i - 0.33, f" {short(run.label)}", va="center", fontsize=9.5)
        for parts, at, height in ((SPENT, i, 0.36), (BESIDE, i + 0.3, 0.16)):
            begin = 0.0
            for name, _, color in parts:
                length = run.mean(name) or 0.0
                if not length:
                    continue
                _bar(axes, at, begin, length, height, color)
                if parts is SPENT and length > 0.09 * longest:
                    share = length / (run.mean("elapsed_s") or length)
                    dark = "white" if name != "input_wait_s" else "black"
                    axes.text(begin + length / 2, at, f"{share:.0%}", ha="center", va="center", color=dark, fontsize=9)
                begin += length
            if begin:
                axes.text(begin, at, f" {text.seconds(begin)}", va="center", fontsize=8.5, color="#333333")
    axes.set_ylim(len(lines) - 0.42, -0.58)
    axes.set_xlim(0, longest * 1.14 or 1.0)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    title_axes(axes, "Where the time went", "seconds", "")
    patches = [_patch(color, hatched=(name, words, color) in BESIDE) for name, words, color in kinds]
    legend(figure, patches, [words for _, words, _ in kinds])
    return figure


def _bar(axes: Axes, at: float, begin: float, length: float, height: float, color: str) -> None:
    hatched = any(color == part[2] for part in BESIDE)
    filled: dict[str, Any] = (
        {"facecolor": "white", "edgecolor": color, "hatch": "/////"} if hatched else {"color": color}
    )
    axes.barh(at, length, height, left=begin, **filled)


def _patch(color: str, *, hatched: bool) -> Patch:
    return Patch(facecolor="white", edgecolor=color, hatch="/////") if hatched else Patch(color=color)


def _phases(run: Run) -> Figure:
    colors = dict(BANDS)
    spare = (MORE_BANDS[i % len(MORE_BANDS)] for i in count())
    for phase in run.phases:
        if phase.name not in colors:
            colors[phase.name] = next(spare)
    names = list(dict.fromkeys(phase.name for phase in run.phases))
    lines = [
        Line2D([], [], color=COLORS[0], marker="o", label="test accuracy"),
        Line2D([], [], color="black", label="training loss"),
        Line2D([], [], color=COLORS[1], marker="s", linestyle="--", label="test loss"),
    ]
    handles: list[Any] = lines + [Patch(color=colors[name], label=f"phase: {name}") for name in names]
    words = [str(each.get_label()) for each in handles]
    figure = blank(5.0, words)
    strip, upper, lower = figure.subplots(3, 1, sharex=True, height_ratios=(0.8, 2, 2))
    for axes in (strip, upper, lower):
        axes.grid(visible=False)
        for phase in run.phases:
            axes.axvspan(phase.begin_samples, phase.end_samples, facecolor=colors[phase.name], edgecolor="white")
    _line(upper, [(each.samples, each.accuracy) for each in run.evals], color=COLORS[0], marker="o")
    _loss(lower, run.rounds, color="black", linewidth=1.2)
    _line(lower, [(each.samples, each.loss) for each in run.evals], color=COLORS[1], marker="s", linestyle="--")
    _scale(lower)
    upper.set_ylabel("test accuracy\n(fraction)")
    title_axes(lower, "", "samples (all ranks)", "loss")
    end = max([each.samples for each in run.rounds] + [each.samples for each in run.evals])
    lower.set_xlim(0, end * 1.01 or 1)
    strip.set_title(f"Phases of {short(run.label)}")
    strip.set_axis_off()
    _name_bands(strip, run.phases, end)
    figure.align_ylabels([upper, lower])
    legend(figure, handles, words)
    return figure


def _name_bands(strip: Axes, run_phases: Sequence[Phase], end: int) -> None:
    """Name, batch and period in each band: across where it is wide, upwards where it is narrow, left out in slivers."""
    for phase in run_phases:
        share = (phase.end_samples - phase.begin_samples) / max(end, 1)
        across = share > 0.16
        if not across and share < 0.036:
            continue
        words = f"{phase.name}\n{text.plan(phase.plan)}" if across else text.plan(phase.plan)
        middle = (phase.begin_samples + phase.end_samples) / 2
        strip.text(middle, 0.5, words, ha="center", va="center", fontsize=8, rotation=0 if across else 90, clip_on=True)
