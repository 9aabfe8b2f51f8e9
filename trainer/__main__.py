"""The command line: recipe and flags -> Config -> train().

Exit codes: 0 done; 2 bad configuration (one line, no traceback); 1 anything else, a stop on a signal included.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.cli import guarded, leave
from trainer.config import recipes


def main(argv: Sequence[str]) -> int:
    """Train what the command line asks for."""
    return guarded("trainer", lambda: _train(argv))


def _train(argv: Sequence[str]) -> int:
    config = recipes.parse(argv, "python -m trainer")
    from trainer.train import train  # imports torch, which `--help` and a bad flag need not wait for

    summary = train(config)
    if summary is None:
        return 1
    if summary["rank"] == 0:
        speedup = summary["scaling_speedup"]
        print(
            f"done: test accuracy {summary['test_accuracy']:.4f}, {summary['samples']:,} samples in "
            f"{summary['elapsed_s']:.1f} s, {summary['samples_per_s']:,.0f} samples/s, scaling speedup "
            f"{'not measured' if speedup is None else f'{speedup:.2f}'}"
        )
        page = Path(config.run.root) / summary["name"] / "report.html"
        if config.record.report and page.exists():
            print(f"report: {page}")
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
