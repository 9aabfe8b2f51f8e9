"""The frontier of policies: time to an accuracy, final accuracy, bytes and samples/s over links of a given rate.

    python -m benchmarks.policies [--rate 100mbit] [--hosts 2] [--seeds 3] [--methods grid autopilot qsr ...]
                                  [--tune] [--series NAME] [--at-once 1] [--quick]

Every run is `python -m trainer` on hosts of their own (network namespaces, one core each), as a user starts it: the
FedAvg CNN on Fashion-MNIST, 118,784 samples, SGD with Nesterov momentum 0.9, cosine, evaluated every 10,000 samples.
`grid` stands for sixteen constant Plans: batch 16, 32, 64, 128 a rank and period 4, 8, 16, 64, whose rate follows the
batch as the autopilot's does (the square root, since a constant Plan has no base to gain on). All that average
parameters send int8 behind delays that hide them; a policy that sets its own is left to it, and `autopilot_outer` is
the autopilot with outer momentum (fedavgm, 0.4). `synchronous` and `large_batch` average gradients at every step, at 32
and 128 samples a rank. With `--tune` each method first tries the same three rates at one seed, and goes on with the one
that was soonest at the accuracy; without, all have 0.05. A finished run is kept in results/policies/ and skipped the
next time. Runs that mostly wait for the network may go `--at-once`, so many side by side: accuracy and bytes are as
ever, their seconds bounds from above, and the table says so. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.provenance import provenance
from benchmarks.shaped import hosts, place_of, write_table
from trainer.records.reader import load_run
from trainer.report.speedups import time_to_accuracy

RESULTS = Path("benchmarks/results/policies")
SAMPLES, GOAL, RATE, TRIALS = 118_784, 0.90, 0.05, (0.025, 0.05, 0.1)
TUNING_SEED = 1_000
HIDDEN = ["--sync.wire-format", "int8", "--sync.delay-steps", "auto"]
AT_ONCE = ["--sync.wire-format", "int8"]
GRID = {
    f"b{batch}_H{period}": [
        *("--policy.name", "constant", "--policy.batch-per-rank", str(batch)),
        *("--policy.sync-period-steps", str(period)),
        *("--policy.lr-scale", str(math.sqrt(batch / 32)), *HIDDEN),
    ]
    for batch in (16, 32, 64, 128)
    for period in (4, 8, 16, 64)
}


def recipe(name: str, *flags: str) -> list[str]:
    """The command line of a recipe."""
    return ["--recipe", f"launch/recipes/{name}.toml", *flags]


RECIPES = {
    **{name: recipe(name, *HIDDEN) for name in ("alternating", "post_local", "qsr", "adaptive_period", "cycle")},
    **{name: recipe(name, *HIDDEN) for name in ("batch_growth", "noise_scale", "norm_test", "compose")},
    **{name: recipe(name, *AT_ONCE) for name in ("selsync", "fda")},
    **{name: recipe(name) for name in ("swap", "autopilot", "synchronous")},
    "autopilot_outer": recipe("autopilot", "--sync.outer", "fedavgm", "--sync.outer-momentum", "0.4"),
    "large_batch": recipe("large_batch", "--policy.lr-scale", str(math.sqrt(128 / 32))),
}
METHODS = GRID | RECIPES


@dataclass(frozen=True)
class Job:
    """One run: a method at a rate, and where its result is kept."""

    link: str
    hosts: int
    method: str
    seed: int
    lr: float
    samples: int
    at_once: int
    out: Path

    def measure(self) -> None:
        """Its summary, evaluations and phases are kept, or that it diverged."""
        kept: dict[str, Any] = {"method": self.method, "seed": self.seed, "lr": self.lr, "samples": self.samples}
        kept["at_once"] = self.at_once
        with tempfile.TemporaryDirectory() as root, hosts(self.hosts, self.link) as shaped:
            flags = ["--run.seed", str(self.seed), "--run.samples", str(self.samples)]
            flags += ["--run.root", root, "--run.name", "run"]
            flags += ["--optim.lr", str(self.lr), "--eval.every-samples", str(self.samples // 12)]
            flags += ["--world.backend", "gloo"]
            flags += ["--record.reference-s", "0", "--record.no-tensorboard", "--record.no-progress"]
            try:
                shaped.run("trainer", *METHODS[self.method], *flags, timeout_s=3_600)
            except RuntimeError as error:
                if "no finite loss" not in str(error):
                    raise
                kept["diverged"] = True
            else:
                run = load_run(Path(root) / "run")
                reached = time_to_accuracy(run.evals, GOAL)
                kept["seconds_to_goal"] = None if reached is None else reached.seconds
                kept["evals"] = [[each.elapsed_s, each.samples, each.accuracy] for each in run.evals]
                kept["phases"] = [[each.begin_samples, each.name, dict(each.plan)] for each in run.phases]
                kept["summary"] = dict(run.figures)
        self.out.write_text(json.dumps(kept | {"provenance": provenance()}, indent=1) + "\n")
        ended = "diverged" if "diverged" in kept else kept["summary"]["test_accuracy"]
        print(self.method, self.seed, self.lr, kept.get("seconds_to_goal"), ended, flush=True)


def soonest(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The run that was first at the goal; of runs that never were, the most accurate."""
    return min(runs, key=lambda run: (run["seconds_to_goal"] or math.inf, -run["summary"]["test_accuracy"]))


def rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row a method, soonest first; runs that diverged are only counted."""
    lost = Counter(run["method"] for run in found if run.get("diverged"))
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in found:
        if not run.get("diverged"):
            by_method.setdefault(run["method"], []).append(run)
    lines = []
    for method, runs in by_method.items():
        seconds = [run["seconds_to_goal"] or math.inf for run in runs]
        accuracy = [run["summary"]["test_accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(accuracy):.4f}" if len(accuracy) > 1 else ""
        middle = statistics.median(seconds)
        never = f" ({sum(map(math.isinf, seconds))} never)" if math.inf in seconds else ""
        beside = max(run.get("at_once", 1) for run in runs)
        mean = {name: statistics.mean(run["summary"][name] for run in runs) for name in ("wire_bytes", "samples_per_s")}
        lines.append(
            (
                middle,
                [
                    f"`{method}`",
                    f"{middle:.1f}{never}" if middle < math.inf else "never",
                    f"{statistics.mean(accuracy):.4f}{spread}",
                    f"{statistics.median(run['summary']['elapsed_s'] for run in runs):.1f}",
                    f"{mean['samples_per_s']:,.0f}",
                    f"{mean['wire_bytes'] / 1e6:.0f}",
                    f"{runs[0]['lr']:g}",
                    str(len(runs))
                    + (f", {lost[method]} more diverged" if method in lost else "")
                    + (f", {beside} at once" if beside > 1 else ""),
                ],
            )
        )
    never_ended = [[f"`{method}`", "diverged", *[""] * 5, str(count)] for method, count in lost.items()]
    ended = [line for _, line in sorted(lines, key=lambda each: each[0])]
    return ended + [line for line in never_ended if line[0].strip("`") not in by_method]


def plot(found: list[dict[str, Any]], path: Path) -> None:
    """Accuracy by training seconds: a line a method, its first seed; the grid in grey but for its soonest."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]
    first = {run["method"]: run for run in reversed(found) if not run.get("diverged")}
    grid = [run for run in first.values() if run["method"] in GRID]
    best = soonest(grid)["method"] if grid else ""
    for method, run in first.items():
        seconds, accuracy = [each[0] for each in run["evals"]], [each[2] for each in run["evals"]]
        if method in GRID and method != best:
            axes.plot(seconds, accuracy, color="0.85", linewidth=0.8, zorder=1)
        else:
            colour, width = ("black", 2.5) if method == "autopilot" else (None, 1.2)
            label = f"{method} (best of grid)" if method == best else method
            axes.plot(seconds, accuracy, label=label, color=colour, linewidth=width)
    axes.axhline(GOAL, color="0.5", linewidth=0.6, linestyle=":")
    axes.set(xlabel="training seconds", ylabel="test accuracy", ylim=(0.8, None), xscale="log")
    axes.legend(frameon=False, fontsize="small", ncols=2)
    figure.savefig(path, dpi=130)


def rate_of(folder: Path, method: str) -> float:
    """The rate that tuning chose, where it was tuned and a trial of it did not diverge."""
    trials = [json.loads(path.read_text()) for path in folder.glob(f"tune-{method}-*.json")]
    good = [trial for trial in trials if not trial.get("diverged")]
    return float(soonest(good)["lr"]) if good else RATE


def main() -> None:
    """Run what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("--rate", default="100mbit", help="of every link")
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["grid", *RECIPES], choices=["grid", *METHODS])
    parser.add_argument("--tune", action="store_true", help="try three rates for each method first")
    parser.add_argument("--series", help="of other methods or another machine, whose results lie apart under this name")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side, whose seconds are bounds from above")
    parser.add_argument(
        "--quick", action="store_true", help="a few methods, one seed, a third of the samples; no trace"
    )
    args = parser.parse_args()
    place = place_of(args.rate, args.hosts, args.series)
    folder = Path(tempfile.mkdtemp()) if args.quick else RESULTS / place
    folder.mkdir(parents=True, exist_ok=True)
    methods = ["b32_H4", "b32_H16", "b64_H16", "qsr", "noise_scale", "selsync", "autopilot"] if args.quick else []
    methods = methods or [each for name in args.methods for each in (GRID if name == "grid" else [name])]
    samples = SAMPLES // 3 if args.quick else SAMPLES
    tuning = [(method, TUNING_SEED, rate) for method in methods for rate in TRIALS if args.tune]
    seeds = range(1 if args.quick else args.seeds)
    finals: list[tuple[str, int, float | None]] = [(method, seed, None) for seed in seeds for method in methods]
    for asked in (tuning, finals):
        jobs = []
        for method, seed, trial in asked:
            lr = trial or rate_of(folder, method)
            out = folder / (f"tune-{method}-{seed}-{lr:g}.json" if trial else f"{method}-{seed}.json")
            if not out.exists():
                jobs.append(Job(args.rate, args.hosts, method, seed, lr, samples, args.at_once, out))
        with ThreadPoolExecutor(args.at_once) as pool:
            list(pool.map(Job.measure, jobs))  # the first error is raised, and what has not begun is not
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json")) if "tune-" not in path.name]
    head = [
        "method",
        f"seconds to {GOAL:.2f}",
        "final accuracy",
        "seconds",
        "samples/s",
        "MB sent a rank",
        "lr",
        "seeds",
    ]
    target = folder if args.quick else RESULTS
    print(write_table(target / f"{place}.md", head, rows(found)))
    plot(found, target / f"{place}.png")


if __name__ == "__main__":
    main()
