"""`python -m trainer.report RUN [RUN ...]`: a table here, pictures and a page beside the runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from trainer.cli import guarded
from trainer.errors import ConfigError
from trainer.records.reader import Run, load_run
from trainer.report import text
from trainer.report.page import write_report
from trainer.report.speedups import speedups, with_distinct_labels


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as every command of the trainer does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; write RUN [RUN ...] [--out DIR]")


def main(argv: Sequence[str]) -> int:
    """Report the runs that the command line names."""
    return guarded("trainer.report", lambda: _report(argv))


def _report(argv: Sequence[str]) -> int:
    parser = _Parser(prog="python -m trainer.report", description="Accuracy against speedup of one run or several.")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="a run's directory; the first is what others count from")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the page and the pictures")
    asked = parser.parse_args(list(argv))
    runs = with_distinct_labels([load_run(folder) for folder in asked.runs])
    print(table(runs))
    print(f"page: {write_report(runs, asked.out)}")
    return 0


def table(runs: Sequence[Run]) -> str:
    """The runs and their time-to-accuracy speedups as text in columns."""
    head = ["run", "policy", "ranks", "accuracy", "best", "scaling speedup", "samples/s", "seconds", "state"]
    rows = [
        [
            run.label,
            text.plain(run.figures.get("policy")),
            text.number(run.number("world_size")),
            text.accuracy(run.number("test_accuracy")),
            text.accuracy(run.number("best_test_accuracy")),
            text.number(run.number("scaling_speedup"), ".2f"),
            text.number(run.number("samples_per_s")),
            text.number(run.number("elapsed_s"), ",.1f"),
            run.state(),
        ]
        for run in runs
    ]
    return "\n".join([text.columns([head, *rows], words=(0, 1, len(head) - 1)), *_compared(runs)])


def _compared(runs: Sequence[Run]) -> list[str]:
    """A line for every run after the first: its speedups at up to six of the accuracies that both reached."""
    if len(runs) < 2:
        return []
    lines = ["", f"time-to-accuracy speedup over {runs[0].label}, at the accuracies that both reached:"]
    for run in runs[1:]:
        found = speedups(runs[0], run)
        shown = found[:: -max(1, len(found) // 5)][::-1]
        told = ", ".join(f"{text.speedup(each)} at {each.accuracy:.4g}" for each in shown)
        lines.append(f"  {run.label}: {told or 'none was reached by both'}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
