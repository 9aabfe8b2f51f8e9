"""Tells whether a change made training slower, in five minutes at most: this checkout beside the commit it grew from.

    python -m benchmarks.guard [--base REF] [--minutes 4.5] [--tolerance 0.03]

Both are measured here and now, in turns, by the same measuring code. A stored baseline would not do: the same machine
gives a half more or less from one hour to the next. Without --base the other side is the merge base with `main`; on
`main` itself the commit before, or the last commit where something is not committed.

The command ends with 1 where a case is slower beyond doubt: the 95 % interval of the ratio, over pairs, lies below
1 - tolerance.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.intervals import paired_ratio
from benchmarks.throughput.records import load
from benchmarks.throughput.suite import Case, label
from trainer.cli import guarded
from trainer.errors import ConfigError
from trainer.report import text

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
FLAGS = (
    "--models fedavg_cnn --batches 32 --periods 1 16 --wire-formats float32 int4 --image-size 28 "
    f"--world-sizes {RANKS} --repeats 1 --seconds 2 --no-links --no-report"
)
LEAST_PAIRS = 2


def main(argv: Sequence[str]) -> int:
    """Measure pairs until the time is up, and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.guard", description=__doc__.splitlines()[0])
    parser.add_argument("--base", help="commit to compare with")
    parser.add_argument("--minutes", type=float, default=4.5, help="time to measure in")
    parser.add_argument("--tolerance", type=float, default=0.03, help="slow-down that is let pass")
    asked = parser.parse_args(list(argv))
    began, base = time.monotonic(), asked.base or merge_base()
    folder = Path(tempfile.mkdtemp(prefix="ebbtide-guard-"))
    try:
        other = checked_out(base, folder / "base")
        print(f"this checkout beside {git('log', '-1', '--format=%h %s', base)}", flush=True)
        pairs = measure_pairs(ROOT, other, folder, began + 60 * asked.minutes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return told(pairs, asked.tolerance)


def git(*words: str) -> str:
    """What git says.

    Raises:
        ConfigError: it refuses.
    """
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise ConfigError(f"git {' '.join(words)}: {said}; name a commit of this repository with --base")
    return done.stdout.strip()


def merge_base() -> str:
    """The commit that this checkout's changes are compared with."""
    main_branch = next((name for name in ("origin/main", "main") if _exists(name)), "HEAD")
    base, head = git("merge-base", "HEAD", main_branch), git("rev-parse", "HEAD")
    if base != head:
        return base
    changed = git("status", "--porcelain", "--untracked-files=no")
    return head if changed else git("rev-parse", "HEAD^")


def _exists(name: str) -> bool:
    done = subprocess.run(["git", "rev-parse", "--verify", "--quiet", name], cwd=ROOT, capture_output=True, check=False)
    return done.returncode == 0


def checked_out(commit: str, folder: Path) -> Path:
    """That commit's trainer, under this checkout's measuring code."""
    folder.mkdir()
    archive = subprocess.run(["git", "archive", git("rev-parse", commit), "trainer"], cwd=ROOT, capture_output=True)
    if archive.returncode:
        raise ConfigError(f"--base = {commit!r}: has no folder trainer/; name a commit of this repository")
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    return folder


def measure_pairs(ours: Path, theirs: Path, folder: Path, until: float) -> dict[Case, list[tuple[float, float]]]:
    """Samples/s of both, pair after pair, each side first in turn; as many pairs as the time allows, two at least."""
    pairs: dict[Case, list[tuple[float, float]]] = {}
    number, longest = 0, 0.0
    while number < LEAST_PAIRS or time.monotonic() + longest < until:
        began = time.monotonic()
        rates: dict[Path, dict[Case, float]] = {}
        for side in (ours, theirs) if number % 2 else (theirs, ours):
            rates[side] = _rates(side, folder / f"{side.name}-{number}")
        for case, rate in rates[ours].items():
            pairs.setdefault(case, []).append((rate, rates[theirs][case]))
        number, longest = number + 1, max(longest, time.monotonic() - began)
    return pairs


def _rates(side: Path, out: Path) -> dict[Case, float]:
    """One run of the suite on that side's code."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [*launch, "-m", "benchmarks.throughput", *FLAGS.split(), "--out", str(out)],
        cwd=side,
        env=os.environ | {"PYTHONPATH": str(side)} | threads,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        lines = re.findall(r"^(?:benchmarks\.throughput|\w+Error): .*$", done.stderr, re.MULTILINE)
        said = lines[0] if lines else done.stderr.strip()[-300:]
        raise ConfigError(f"{side.name}: could not be measured ({said}); name another --base")
    return {case: runs[0].figures["samples_per_s"] for case, runs in load(out).by_case.items()}


def told(pairs: dict[Case, list[tuple[float, float]]], tolerance: float) -> int:
    """Print the table; 1 where a case is slower beyond doubt."""
    rows, slower = [["case", "pairs", "ratio", "95 %", "this checkout is"]], []
    for case, rates in sorted(pairs.items()):
        found = paired_ratio(*zip(*rates, strict=True))
        verdict = found.verdict(tolerance)
        slower += [label(case)] if verdict == "slower" else []
        interval = f"{found.low:.3f} to {found.high:.3f}"
        rows.append([label(case), str(len(rates)), f"{found.value:.3f}", interval, verdict])
    print(text.columns(rows, words=(0, 4)))
    print(f"slower by more than {tolerance:.0%}: {', '.join(slower) or 'nothing'}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(guarded("benchmarks.guard", lambda: main(sys.argv[1:])))
