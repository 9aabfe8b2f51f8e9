"""Scaling speedup against test accuracy: recipes side by side over several seeds, resumable run by run.

    python -m benchmarks.frontier [--rate 1gbit] [--hosts 2] [--seeds 3] [--recipes alternating autopilot ...] [--quick]

Each run is `python -m trainer --recipe ...` on hosts of their own (network namespaces, one core each), as a user starts
it. Seeds are the outer loop, so that the recipes are interleaved on a machine whose speed drifts. Speedup is a run's
samples/s over those of one host alone at the small batch, the median of what the runs of its seed timed at their
starts. A finished run is kept in results/frontier/ and skipped the next time; the table and the plot are made of what
is there. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.provenance import provenance
from benchmarks.shaped import Hosts, hosts, place_of
from trainer.config.recipes import load

RECIPES = ("synchronous", "large_batch", "local_sgd", "alternating", "autopilot")
SMALL_BATCH = 32
RESULTS = Path("benchmarks/results/frontier")
COLUMNS = {
    "test_accuracy": "test accuracy",
    "scaling_speedup": "scaling speedup",
    "samples_per_s": "samples/s",
    "elapsed_s": "seconds",
    "local_steps": "local steps",
    "wire_bytes": "MB sent a rank",
}


def measure(shaped: Hosts, recipe: str, seed: int, flags: list[str], out: Path) -> None:
    """One run in a folder of its own; its summary and evaluations are kept."""
    with tempfile.TemporaryDirectory() as root:
        place = ["--run.seed", str(seed), "--run.root", root, "--run.name", recipe, "--eval.every-samples", "40000"]
        place += ["--world.backend", "gloo", "--record.no-tensorboard", "--record.no-progress", *flags]
        shaped.run("trainer", "--recipe", f"launch/recipes/{recipe}.toml", *place, timeout_s=3_600)
        folder = Path(root) / recipe
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
        evals = [line for line in lines if line["kind"] == "eval"]
        config = load(folder / "config.toml")
        reference = {"seed": seed, "reference_batch": config.policy.base_plan().batch_per_rank}
        kept = {"provenance": provenance(), "config": (folder / "config.toml").read_text()}
    out.write_text(json.dumps(kept | reference | {"summary": summary, "evals": evals}, indent=1) + "\n")


def with_speedups(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Set every run's scaling speedup by one host alone at the small batch, as all runs of its seed timed it."""
    alone: dict[int, list[float]] = {}
    for run in (run for found in runs.values() for run in found):
        if run["reference_batch"] == SMALL_BATCH:
            alone.setdefault(run["seed"], []).append(run["summary"]["reference_samples_per_s"])
    for run in (run for found in runs.values() for run in found if run["seed"] in alone):
        run["summary"]["scaling_speedup"] = run["summary"]["samples_per_s"] / statistics.median(alone[run["seed"]])


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    rows = ["| recipe | " + " | ".join(COLUMNS.values()) + " | seeds |", "| --- |" + " --- |" * (len(COLUMNS) + 1)]
    for recipe, found in runs.items():
        cells = [cell(name, [run["summary"][name] for run in found]) for name in COLUMNS]
        rows.append(f"| `{recipe}` | " + " | ".join(cells) + f" | {len(found)} |")
    return "\n".join(rows) + "\n"


def cell(name: str, values: list[float]) -> str:
    """One figure in its unit, with its spread where it has one."""
    unit, form = {"wire_bytes": (1e6, ".0f"), "test_accuracy": (1, ".4f"), "scaling_speedup": (1, ".2f")}.get(
        name, (1, ",.0f")
    )
    mean = statistics.mean(values) / unit
    spread = statistics.stdev(values) / unit if len(values) > 1 else 0.0
    return format(mean, form) if spread < 1e-9 else f"{mean:{form}} ± {spread:{form}}"


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Speedup against accuracy: a point a run, and each recipe's mean."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    marks = zip("osD^vP", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"), strict=True)
    for (recipe, found), (mark, colour) in zip(runs.items(), marks, strict=False):
        speedup = [run["summary"]["scaling_speedup"] for run in found]
        accuracy = [run["summary"]["test_accuracy"] for run in found]
        axes.scatter(speedup, accuracy, marker=mark, color=colour, alpha=0.35, s=24)
        axes.scatter(statistics.mean(speedup), statistics.mean(accuracy), marker=mark, color=colour, s=80, label=recipe)
    axes.set_xlabel("scaling speedup over one rank alone at the small batch")
    axes.set_ylabel("test accuracy at the end")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Run what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__)
    parser.add_argument("--rate", default="1gbit", help='of every link; "" is as fast as it goes')
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--quick", action="store_true", help="one seed of a tenth of the samples; keeps nothing")
    args = parser.parse_args()
    place = place_of(args.rate, args.hosts)
    folder = Path(tempfile.mkdtemp()) if args.quick else RESULTS / place
    folder.mkdir(parents=True, exist_ok=True)
    short = ["--run.samples", "16000"] if args.quick else []
    phases = ["--policy.samples-per-phase", "4000"] if args.quick else []
    for seed in range(1 if args.quick else args.seeds):
        for recipe in args.recipes:
            out = folder / f"{recipe}-{seed}.json"
            if not out.exists():
                with hosts(args.hosts, args.rate) as shaped:
                    measure(shaped, recipe, seed, short + (phases if recipe == "alternating" else []), out)
                summary = json.loads(out.read_text())["summary"]
                print(recipe, seed, summary["test_accuracy"], summary["elapsed_s"], flush=True)
    found = {
        recipe: [json.loads(path.read_text()) for path in sorted(folder.glob(f"{recipe}-*.json"))]
        for recipe in args.recipes
    }
    found = {recipe: runs for recipe, runs in found.items() if runs}
    with_speedups(found)
    print(table(found))
    if not args.quick:
        (RESULTS / f"{place}.md").write_text(table(found))
        plot(found, RESULTS / f"{place}.png")


if __name__ == "__main__":
    main()
