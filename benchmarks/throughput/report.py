"""The suite's report: scaling curves, where time goes, memory, and the cost model, as pictures and one page.

    python -m benchmarks.throughput.report FOLDER [FOLDER ...]

Each folder gets its own. Imports no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.intervals import spread
from benchmarks.throughput import cost
from benchmarks.throughput.records import Measured, load
from benchmarks.throughput.scaling import Curve, curves
from benchmarks.throughput.suite import label, short_name
from trainer.cli import guarded
from trainer.errors import ConfigError
from trainer.report import text
from trainer.report.drawing import STYLE, Picture, blank, legend, look, title_axes
from trainer.report.page import document, figure, table

SPENT = (
    ("compute", "compute", "#0072B2"),
    ("sync_wait", "exposed communication", "#D55E00"),
    ("input_wait", "waiting for input", "#F0C040"),
)
WEAK = "Weak scaling: each rank trains the same batch, so ideally twice the ranks train twice the samples/s (dashed)."
STRONG = "Strong scaling: all ranks share one batch, so ideally twice the ranks train it in half the time (dashed)."
TIME = "Mean over the ranks and repeats. Exposed communication is time that training waits for other ranks."
LINKS = "Medians of all-reduces; a rank sends 2 (N - 1) / N of the buffer. Lines are the fitted cost model."


def main(argv: Sequence[str]) -> int:
    """Write the report of each folder."""
    if not argv or any(word.startswith("-") for word in argv):
        raise ConfigError("command line: write FOLDER [FOLDER ...], as benchmarks.throughput --out made them")
    for folder in argv:
        print(f"report: {write_report(Path(folder))}")
    return 0


def write_report(folder: Path) -> Path:
    """The page, its pictures and the cost model; returns the page's path.

    Raises:
        ConfigError: a folder without measurements, or that cannot be written.
    """
    measured = load(folder)
    model = cost.fit(measured)
    drawn = pictures(measured, model)
    page = folder / "report.html"
    try:
        (folder / "pictures").mkdir(exist_ok=True)
        for picture in drawn:
            (folder / "pictures" / f"{picture.name}.png").write_bytes(picture.png)
        model.save(folder / "cost.json")
        partial = page.with_suffix(".partial")
        partial.write_text(html(measured, model, drawn), encoding="utf-8")
        partial.replace(page)  # several jobs of an array may write it
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written ({error.strerror})") from error
    return page


# ---- pictures


def pictures(measured: Measured, model: cost.CostModel) -> list[Picture]:
    """All pictures; one that would be empty is left out."""
    with matplotlib.rc_context(STYLE):
        return list(_pictures(measured, model))


def _pictures(measured: Measured, model: cost.CostModel) -> Iterator[Picture]:
    for kind, words, note in (("weak", "Weak", WEAK), ("strong", "Strong", STRONG)):
        by_model: dict[str, list[Curve]] = {}
        for curve in curves(measured, kind):
            by_model.setdefault(curve.model, []).append(curve)
        for number, (name, found) in enumerate(by_model.items(), 1):
            yield Picture.of(f"{kind}-{number}", f"{words} scaling of {name}", note, _curves(found, words))
    if measured.by_case:
        yield Picture.of("time", "Where the time goes", TIME, _time(measured))
    if model.links:
        yield Picture.of("links", "Transfers between ranks", LINKS, _links(measured, model))


def _curves(found: Sequence[Curve], words: str) -> Figure:
    """Samples/s above, efficiency below."""
    names = [curve.label for curve in found]
    drawing = blank(5.2, names)
    upper, lower = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for i, curve in enumerate(found):
        ranks = [point.ranks for point in curve.points]
        upper.plot(ranks, [point.samples_per_s for point in curve.points], label=names[i], **look(i))
        ideal = [curve.points[0].samples_per_s * n / ranks[0] for n in ranks]
        upper.plot(ranks, ideal, color=look(i)["color"], linestyle="--", linewidth=0.9, alpha=0.7)
        lower.plot(ranks, [point.efficiency for point in curve.points], **look(i))
    lower.axhline(1.0, color="#555555", linewidth=1, linestyle="--")
    for axes in (upper, lower):
        axes.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
    ticks = sorted({point.ranks for curve in found for point in curve.points})
    lower.set_xticks(ticks)
    lower.minorticks_off()
    upper.set_ylabel("samples/s, all ranks")
    title_axes(lower, "", "ranks", "efficiency")
    upper.set_title(f"{words} scaling of {short_name(found[0].model)}")
    drawing.align_ylabels([upper, lower])
    legend(drawing, *upper.get_legend_handles_labels())
    return drawing


def _time(measured: Measured) -> Figure:
    """A bar a case."""
    cases = list(measured.by_case)
    drawing = blank(1.0 + 0.24 * len(cases), [words for _, words, _ in SPENT])
    axes = drawing.add_subplot()
    for place, case in enumerate(cases):
        begin = 0.0
        for name, words, color in SPENT:
            share = fmean(run.figures["shares"][name] for run in measured.by_case[case])
            axes.barh(place, share, 0.7, left=begin, color=color, label=words if place == 0 else None)
            begin += share
    axes.set_yticks(range(len(cases)), [label(case) for case in cases], fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1)
    title_axes(axes, "Where the time goes", "share of training time", "")
    legend(drawing, *axes.get_legend_handles_labels())
    return drawing


def _links(measured: Measured, model: cost.CostModel) -> Figure:
    names = [f"{name}, {link.ranks} ranks" for name, link in model.links.items()]
    drawing = blank(3.5, names)
    axes = drawing.add_subplot()
    for i, (name, link) in enumerate(model.links.items()):
        points = measured.links[name]["points"]
        sizes = [sent for sent, _ in points]
        axes.plot(sizes, [s for _, s in points], label=names[i], **(look(i) | {"linestyle": "none"}))
        axes.plot(sizes, [link.latency_s + n / link.bytes_per_s for n in sizes], color=look(i)["color"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 1e3:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    title_axes(axes, "Transfers between ranks", "bytes that a rank sends", "milliseconds")
    legend(drawing, *axes.get_legend_handles_labels())
    return drawing


# ---- page


def html(measured: Measured, model: cost.CostModel, drawn: Sequence[Picture]) -> str:
    """The whole page."""
    body = [
        "<h1>Throughput</h1>",
        _about(measured),
        f'<div class="grid">{"".join(map(figure, drawn))}</div>',
        "<h2>Cases</h2>",
        _cases(measured, model),
        *_scaling(measured),
        "<h2>Cost model</h2>",
        _cost(model),
    ]
    return document("Throughput", body)


def _about(measured: Measured) -> str:
    seen: dict[str, list[str]] = {}
    for run in measured.runs:
        for name, value in run.provenance.items():
            if str(value) not in seen.setdefault(name, []):
                seen[name].append(str(value))
    lines = [("measured on", ", ".join(f"{name} {' and '.join(values)}" for name, values in seen.items()))]
    lines.append(("task", text.pairs(measured.task.__dict__)))
    failed = sorted({f"{label(run.case)}: {run.error}" for run in measured.runs if run.error})
    lines += [("not measured", "; ".join(failed))] if failed else []
    told = "".join(f"<p><b>{escape(name)}</b><span>{escape(words)}</span></p>" for name, words in lines)
    return f'<div class="about">{told}</div>'


def _cases(measured: Measured, model: cost.CostModel) -> str:
    """A row a case, over its repeats."""
    head = "model,ranks,batch a rank,period,wire format,samples/s,spread,cost model,compute,exposed,input,peak memory"
    rows = []
    for case, runs in measured.by_case.items():
        rates = [run.figures["samples_per_s"] for run in runs]
        promised = model.samples_per_s(
            case.model, case.batch_per_rank, case.sync_period_steps, case.wire_format, case.world_size
        )
        shares = [f"{fmean(run.figures['shares'][name] for run in runs):.1%}" for name, *_ in SPENT]
        plain = [str(case.world_size), str(case.batch_per_rank), str(case.sync_period_steps), case.wire_format]
        figures = [f"{fmean(rates):,.0f}", _percent(spread(rates)), text.number(promised)]
        memory = text.size(max(run.figures["peak_memory_bytes"] for run in runs))
        rows.append([escape(case.model), *plain, *figures, *shares, memory])
    note = (
        "Spread is the standard deviation over repeats, of the mean. The cost model's samples/s are what the fit below "
        "promises; peak memory is the fullest rank's."
    )
    return f'{table(head.split(","), rows)}<p class="faint">{note}</p>'


def _scaling(measured: Measured) -> Iterator[str]:
    for kind, words in (("weak", "Weak scaling"), ("strong", "Strong scaling")):
        rows = [
            [escape(curve.model), escape(curve.label), str(p.ranks), f"{p.samples_per_s:,.0f}", f"{p.efficiency:.3f}"]
            for curve in curves(measured, kind)
            for p in curve.points
        ]
        if rows:
            yield f"<h2>{words}</h2>"
            yield table(("model", "case", "ranks", "samples/s", "efficiency"), rows)


def _cost(model: cost.CostModel) -> str:
    compute = [
        [escape(name), _ms(each.start_s), f"{each.per_sample_s * 1e6:.1f} µs", f"{each.error:.1%}"]
        for name, each in model.compute.items()
    ]
    links = [
        [
            name,
            str(link.ranks),
            f"{link.latency_s * 1e6:,.0f} µs",
            f"{text.size(link.bytes_per_s)}/s",
            f"{link.error:.1%}",
        ]
        for name, link in model.links.items()
    ]
    parts = [table(("model", "a step", "and a sample", "error"), compute)]
    parts += [table(("level", "ranks", "latency", "rate", "error"), links)] if links else []
    return "".join(parts) + '<p class="faint">The same as JSON: cost.json.</p>'


def _percent(value: float) -> str:
    return text.NONE if value != value else f"{value:.1%}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


if __name__ == "__main__":
    sys.exit(guarded("benchmarks.throughput.report", lambda: main(sys.argv[1:])))
