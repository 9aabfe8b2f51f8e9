"""Shared by all pictures of the report: colours, fonts, axes, legends, names beside points."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import Bbox

# Okabe and Ito's colours, told apart with any colour vision; the yellow, too pale for a line on white, is left out
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
DASHES = ("-", "--", ":", "-.")
WIDTH_IN = 5.6  # so that type stays legible where a page of 500 pixels shows the picture whole
LABEL_CHARS = 36
STYLE: Any = {  # Any: releases of matplotlib differ in the type of its settings
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.7,
    "text.parse_math": False,  # a run's name may hold a $
}


@dataclass(frozen=True)
class Picture:
    """A figure as PNG: its file's name without the ending, what it shows, and what must be said beside it."""

    name: str
    title: str
    note: str
    png: bytes

    @classmethod
    def of(cls, name: str, title: str, note: str, figure: Figure) -> Picture:
        """The drawn figure's picture."""
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=160, metadata={"Software": None})
        return cls(name, title, note, out.getvalue())


def blank(height_in: float, entries: Sequence[str] = ()) -> Figure:
    """An empty figure with room below for a legend of these entries."""
    rows = -(-len(entries) // _columns(entries)) if entries else 0
    figure = Figure(figsize=(WIDTH_IN, height_in + 0.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend(figure: Figure, handles: Sequence[Any], names: Sequence[str]) -> None:
    """The legend, below everything else, in as many columns as its names leave room for."""
    figure.legend(handles, names, loc="outside lower center", ncols=_columns(names), columnspacing=1.4)


def _columns(names: Sequence[str]) -> int:
    return max(1, min(len(names), 68 // (max(map(len, names)) + 7)))


def look(i: int) -> dict[str, Any]:
    """The colour, mark and dash of the i-th run."""
    n = len(COLORS)
    return {"color": COLORS[i % n], "marker": MARKERS[i % n], "linestyle": DASHES[(i // n) % len(DASHES)]}


def short(label: str) -> str:
    """A run's name, its middle left out where no picture has room for it."""
    half = LABEL_CHARS // 2
    label = f" {label}" if label.startswith("_") else label  # matplotlib leaves such names out of legends
    return label if len(label) <= LABEL_CHARS else f"{label[:half]}…{label[-half:]}"


def title_axes(axes: Axes, title: str, across: str, up: str) -> None:
    """The title and what the axes measure, with its unit; large numbers across as 20k or 3M."""
    axes.set_title(title)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, _: object) -> str:
    for power, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(power, 1e4):
            return f"{value / power:g}{letter}"
    return f"{value:g}"


def name_points(figure: Figure, axes: Axes, points: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Write each name beside its point: of a dozen places, the one that covers least of names, points and edges."""
    figure.draw_without_rendering()  # the layout, which places in pixels depend on
    reach = 6 * figure.dpi / 72
    centres = [axes.transData.transform(place) for _, place in points]
    taken = [Bbox.from_bounds(x - reach, y - reach, 2 * reach, 2 * reach) for x, y in centres]
    inside = axes.get_window_extent()
    shifts = [(9, 0, "left"), (-9, 0, "right")]
    shifts += [(x, y, side) for y in (14, -14, 28, -28) for x, side in ((0, "center"), (9, "left"), (-9, "right"))]
    for name, place in points:
        best: tuple[float, int, Bbox] | None = None
        for i, (x, y, side) in enumerate(shifts):
            note = axes.annotate(name, place, (x, y), textcoords="offset points", ha=side, va="center", fontsize=9)
            box = note.get_window_extent()
            note.remove()
            lost = _covered(box, taken, inside)
            if best is None or lost < best[0]:
                best = (lost, i, box)
        assert best is not None
        x, y, side = shifts[best[1]]
        note = axes.annotate(name, place, (x, y), textcoords="offset points", ha=side, va="center", fontsize=9)
        note.set_in_layout(False)
        note.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8})
        taken.append(best[2])


def _covered(box: Bbox, taken: Sequence[Bbox], inside: Bbox) -> float:
    """Square pixels of a box that other boxes cover, or that lie outside the axes."""
    within = Bbox.intersection(box, inside)
    lost = box.width * box.height - (within.width * within.height if within else 0.0)
    crossings = (Bbox.intersection(box, other) for other in taken)
    return lost + sum(each.width * each.height for each in crossings if each)
