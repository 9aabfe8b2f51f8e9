"""The headline table of "On Using Large-Batches in Federated Learning" (Tyagi 2025, arXiv 2509.10537), at four ranks.

    python -m benchmarks.paper [--models resnet50 vgg11] [--seeds 3] [--iterations 150] [--stem torchvision]
                              [--backend gloo] [--anneal] [--series NAME] [--quick]

Small batches (8 a rank) and large ones (64 a rank) at period 1; the two in turn (8 at period 8, then 64 at period 1),
for as many steps each at one learning rate (`alternating`), or seven large steps to a small one at √8 times its rate
(`mostly_large`); and the autopilot within the same batches, as it is and with `accuracy` for its target
(`autopilot_accurate`), on Fashion-MNIST over Gloo. `scaled_gradients` and `small_batch_noise` are large batches at
period 1 whose gradients are as long as small ones', or as noisy. `larger_batch` (128 a rank) is run to the equal
samples alone, for what fewer updates lose where 64 a rank lose nothing. The paper reports that its technique is 32.33
(ResNet-50) and 3.74 (VGG-11) points above small batches after the same number of iterations.

Every method is run once a seed, as far as any comparison needs it, and all three comparisons are read off its
evaluation curve by linear interpolation:

- equal iterations: after `--iterations` local steps a rank, and in a table of its own on the way there;
- equal samples: after those of small batches at four times the iterations;
- equal seconds: at the last second of training time that every run of the model reached.

So that a run may be read before its end, the learning rate is constant after a warm-up, the same in samples for all
(with `--anneal`, a cosine to the equal samples, where every run ends: those alone are compared, at rates of their own);
gradients are clipped to norm 1 for all, since without it large batches fall back to chance again and again.
The autopilot's late part begins where it would if the run ended at the equal samples. Sharpness is that of the final
models, which have trained different numbers of samples; the table says how many.

`--models fedavg_cnn` is no model of the paper's, but one of a tenth of VGG-11's work, for machines with few cores.

Learning rates: as many a method of one model (five for ResNet-50, else three), one seed, a third of the
iterations; the best final accuracy on the test samples wins, and the finals have other seeds. Large batches have the
same grid times three (about √8), larger ones times two; those that are given what small ones have, the small ones'.
"(edge)" marks a rate at the end of its grid. torchvision's own stem (`--stem torchvision`) is ResNet-50's; VGG-11
cannot take 28 pixels without the small one. A finished run is kept in results/paper/runs/ and skipped the next time;
table and plot show what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.provenance import provenance
from benchmarks.shaped import write_table
from benchmarks.sharpness import sharpness

Runs = dict[tuple[str, str], list[dict[str, Any]]]
RESULTS = Path("benchmarks/results/paper")
RUNS = RESULTS / "runs"
RANKS, SMALL, LARGE, PERIOD = 4, 8, 64, 8
CONSTANT = {"small_batch": SMALL, "large_batch": LARGE, "larger_batch": 2 * LARGE}
RATE_FACTORS = {"large_batch": 3, "larger_batch": 2}
"""About the square root of the batch over the smallest; but 128 a rank at four times 0.4 ends at 0.30, at two times at
0.69, which trials of twelve steps do not tell apart."""
GIVEN = ("scaled_gradients", "small_batch_noise")
"""Policies of large batches that are given what small ones have."""
METHODS = (*CONSTANT, "alternating", "mostly_large", "autopilot", "autopilot_accurate", *GIVEN)
PALETTE = ("#0072B2", "#D55E00", "#000000", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#8C564B", "#7F7F7F")
COLOURS = dict(zip(METHODS, PALETTE, strict=True))
MODELS = ("resnet50", "vgg11", "fedavg_cnn")
RECIPES = {"fedavg_cnn": "synchronous"}
RATES = {"resnet50": (0.01, 0.03, 0.1, 0.2, 0.4), "vgg11": (0.01, 0.03, 0.1), "fedavg_cnn": (0.01, 0.03, 0.1)}
ANNEALED_RATES = {"resnet50": (0.1, 0.2, 0.4), "vgg11": (0.03, 0.1, 0.2), "fedavg_cnn": (0.03, 0.1, 0.2)}
MOST_SEEDS, TUNING_SEED = 100, 1_000
RAMP_SAMPLES = 4 * RANKS * LARGE
AXES = {"local_step": "iterations", "samples": "samples", "elapsed_s": "seconds"}


@dataclass(frozen=True)
class Settings:
    """The command line."""

    models: list[str]
    methods: list[str]
    seeds: int
    iterations: int
    stem: str
    test_limit: int
    hessian_samples: int
    quick: bool
    backend: str
    anneal: bool
    series: str
    folder: Path = RUNS

    def stem_of(self, model: str) -> str:
        """The stem that a model gets."""
        return "small" if model.startswith("vgg") else self.stem


@dataclass(frozen=True)
class Trial:
    """One run."""

    model: str
    method: str
    role: str
    lr: float
    seed: int

    def path(self, settings: Settings) -> Path:
        """Where its result lies."""
        kind = f"{self.model}-{settings.stem_of(self.model)}-{settings.iterations}-{self.method}"
        kind += "-annealed" if settings.anneal else ""
        return settings.folder / f"{kind}-{self.role}-{self.lr}-{self.seed}.json"


def equal_samples(iterations: int) -> int:
    """Of small batches at four times the iterations."""
    return 4 * iterations * RANKS * SMALL


def plan(method: str, iterations: int, anneal: bool) -> tuple[dict[str, Any], int, int]:
    """A method's policy, the samples that its comparisons need, and those between two evaluations."""
    policy: dict[str, Any]
    equal = equal_samples(iterations)
    if anneal:
        policy, samples, every = plan(method, iterations, anneal=False)
        if "late-from" in policy:
            policy["late-from"] *= samples / equal
        return policy, equal, min(every, equal // 6)
    if method in GIVEN:
        policy = {"name": method, "lr-ramp-samples": RAMP_SAMPLES}
        policy |= {"small.batch-per-rank": SMALL, "small.sync-period-steps": 1}
        policy |= {"large.batch-per-rank": LARGE, "large.sync-period-steps": 1}
        samples = max(equal, iterations * RANKS * LARGE)
        return policy, samples, samples // 12
    if batch := CONSTANT.get(method):
        samples = equal if method == "larger_batch" else max(equal, iterations * RANKS * batch)
        return {"name": "constant", "batch-per-rank": batch, "sync-period-steps": 1}, samples, samples // 12
    if method in ("alternating", "mostly_large"):
        small = max(1, iterations // 6 // PERIOD) * PERIOD if method == "alternating" else PERIOD
        large = small if method == "alternating" else 7 * small
        policy = {"name": "alternating", "samples-per-phase": None, "steps-per-phase": small, "large-length": large}
        policy |= {"lr-scaling": "none" if method == "alternating" else "sqrt", "lr-ramp-samples": RAMP_SAMPLES}
        policy |= {"small.batch-per-rank": SMALL, "small.sync-period-steps": PERIOD}
        policy |= {"large.batch-per-rank": LARGE, "large.sync-period-steps": 1}
        batches = [SMALL if step % (small + large) < small else LARGE for step in range(iterations)]
        # An evaluation ends an observation; where this many samples make up a cycle no phase ends late for that.
        every = RANKS * (small * SMALL + large * LARGE) // (3 if large == small else 4)
        return policy, max(equal, RANKS * sum(batches)), every
    # With the samples of as many small steps more it makes these iterations, whatever batches it chose before.
    samples = equal + iterations * RANKS * SMALL
    target = "accuracy" if method == "autopilot_accurate" else "time"
    policy = {"name": "autopilot", "target": target, "batch-per-rank": SMALL, "max-batch-per-rank": LARGE}
    policy |= {"late-from": 0.75 * equal / samples, "lr-ramp-samples": RAMP_SAMPLES}
    return policy, samples, samples // 12


def train(trial: Trial, settings: Settings, root: str) -> str:
    """Start the run as a user would; what went wrong, or nothing."""
    final = trial.role == "final"
    iterations = settings.iterations if final else max(1, settings.iterations // 3)
    policy, samples, every = plan(trial.method, iterations, settings.anneal)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    recipe = RECIPES.get(trial.model, trial.model)
    command += ["-m", "trainer", "--recipe", f"launch/recipes/{recipe}.toml", "--world.backend", settings.backend]
    command += [word for name, value in policy.items() for word in (f"--policy.{name}", str(value))]
    command += ["--run.root", root, "--run.name", "run", "--run.seed", str(trial.seed), "--run.samples", str(samples)]
    command += ["--optim.lr", str(trial.lr), "--optim.clip-norm", "1.0"]
    command += ["--optim.schedule", "cosine" if settings.anneal else "constant"]
    command += ["--optim.warmup-samples", str(iterations * RANKS * SMALL // 5)]
    command += ["--eval.every-samples", str(every if final else samples)]
    command += ["--data.test-limit", str(settings.test_limit)]
    command += ["--task.small-image-stem" if settings.stem_of(trial.model) == "small" else "--task.no-small-image-stem"]
    command += ["--record.reference-s", "0", "--record.no-progress", "--record.no-tensorboard"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    done = subprocess.run(command, env=env, stderr=subprocess.PIPE, text=True, check=False)
    return done.stderr or f"exit code {done.returncode}" if done.returncode else ""


def measure_once(trial: Trial, settings: Settings) -> bool:
    """One run in a folder of its own, if it is missing; its summary, evaluations and sharpness are kept, or that it
    diverged."""
    out = trial.path(settings)
    if out.exists():
        return False
    result: dict[str, Any] = {"trial": asdict(trial), "provenance": provenance() | {"threads": 1}}
    result["hessian_samples"] = settings.hessian_samples
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        trouble = train(trial, settings, root)
        if trouble and "no finite loss" not in trouble:
            raise RuntimeError(f"{out.stem} failed:\n{trouble[-4_000:]}")
        folder = Path(root) / "run"
        if not trouble:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            result["evals"] = [line for line in lines if line["kind"] == "eval"]
            result["phases"] = [line for line in lines if line["kind"] == "phase"]
            result["summary"] = json.loads((folder / "summary.json").read_text())
            result["config"] = (folder / "config.toml").read_text()
            if trial.role == "final":
                result["sharpness"] = sharpness(folder, settings.hessian_samples)
    result["diverged"] = bool(trouble)
    out.write_text(json.dumps(result, indent=1) + "\n")
    told = "diverged" if trouble else f"accuracy {result['summary']['test_accuracy']:.4f}"
    print(f"{out.stem}: {told}, {time.monotonic() - began:.0f} s with all that is not training", flush=True)
    return True


def grid(model: str, method: str, settings: Settings) -> list[float]:
    """Learning rates to try."""
    tried = (ANNEALED_RATES if settings.anneal else RATES)[model]
    rates = [round(rate * RATE_FACTORS.get(method, 1), 6) for rate in tried]
    return rates[1:2] if settings.quick else rates


def chosen(model: str, method: str, settings: Settings) -> float | None:
    """The rate of the best accuracy; None where one has not been tried yet, or all diverged."""
    rates = grid(model, method, settings)
    paths = [Trial(model, method, "tune", rate, TUNING_SEED).path(settings) for rate in rates]
    if len(rates) == 1:
        return rates[0]
    if not all(path.exists() for path in paths):
        return None
    tried = [(rate, json.loads(path.read_text())) for rate, path in zip(rates, paths, strict=True)]
    good = {rate: float(run["summary"]["test_accuracy"]) for rate, run in tried if not run["diverged"]}
    return max(good, key=lambda rate: good[rate]) if good else None


def reading(run: dict[str, Any], by: str, at: float) -> float:
    """Test accuracy where `by` is `at`, on the line between two evaluations; NaN outside them."""
    xs, ys = ([each[name] for each in run["evals"]] for name in (by, "test_accuracy"))
    return float(np.interp(at, xs, ys, left=math.nan, right=math.nan))


def common_second(runs: Runs, model: str) -> float:
    """The last second of training time that every run of the model reached."""
    reached = [run["evals"][-1]["elapsed_s"] for (name, _), found in runs.items() if name == model for run in found]
    return float(min(reached))


def cell(values: Sequence[float], form: str) -> str:
    """Mean and standard deviation of what could be read."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "not reached"
    text = format(statistics.mean(known), form)
    text += f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def finals(settings: Settings) -> Runs:
    """The finished finals of the chosen rates, by model and method."""
    runs = Runs()
    for model in MODELS:
        for method in METHODS:
            lr = chosen(model, method, settings)
            paths = [Trial(model, method, "final", lr, seed).path(settings) for seed in range(MOST_SEEDS) if lr]
            if found := [json.loads(path.read_text()) for path in paths if path.exists()]:
                runs[model, method] = found
    return runs


def report(settings: Settings) -> str:
    """Write the table and the plot of the finals that are there; the table."""
    runs = finals(settings)
    finished = {key: good for key, found in runs.items() if (good := [run for run in found if not run["diverged"]])}
    rows = []
    for (model, method), found in runs.items():
        good, lr, rates = finished.get((model, method), []), found[0]["trial"]["lr"], grid(model, method, settings)
        edge = " (edge)" if lr in (rates[0], rates[-1]) else ""
        lost = f", {len(found) - len(good)} diverged" if len(good) < len(found) else ""
        marks = marks_of(model, finished, settings)
        cells = figures(good, marks) if good else ["diverged"] * (len(marks) + 3)
        name = f"{model}, {settings.stem_of(model)} stem"
        rows.append([name, f"`{method}`", *cells, f"{lr:g}{edge}", f"{len(found)}{lost}"])
    head = ["model", "method", f"accuracy at {equal_samples(settings.iterations):,} samples"]
    if not settings.anneal:
        head[2:] = [f"accuracy at {settings.iterations} iterations", head[2].removeprefix("accuracy ")]
        head += ["at equal seconds"]
    head += ["samples/s", "sharpness", "samples in all", "learning rate", "seeds"]
    place = settings.folder if settings.quick else RESULTS
    called = "-".join(part for part in ("annealed" if settings.anneal else "constant-rate", settings.series) if part)
    plot(finished, settings, place / f"{called}.png")
    table = write_table(place / f"{called}.md", head, rows)
    if settings.anneal:
        return table
    head_of_gains = ["model", "method", *(f"after {mark} iterations" for mark in marks_on_the_way(settings))]
    gains = write_table(place / f"{called}-iterations.md", head_of_gains, points_above_small(finished, settings))
    return f"{table}\nPoints above small batches:\n\n{gains}"


def marks_of(model: str, finished: Runs, settings: Settings) -> dict[str, float]:
    """Where a model's runs are compared, by what an evaluation's record calls it; annealed ones at their end alone."""
    samples: dict[str, float] = {"samples": equal_samples(settings.iterations)}
    if settings.anneal:
        return samples
    return {"local_step": settings.iterations, **samples, "elapsed_s": common_second(finished, model)}


def marks_on_the_way(settings: Settings) -> list[int]:
    """Iterations up to the table's, a sixth apart."""
    return [settings.iterations * sixth // 6 for sixth in range(2, 7)]


def points_above_small(finished: Runs, settings: Settings) -> list[list[str]]:
    """A row a method: how many points of accuracy it is above small batches of the same seed after as many iterations,
    mean and spread over the seeds."""
    rows = []
    for (model, method), runs in finished.items():
        small = {run["trial"]["seed"]: run for run in finished.get((model, "small_batch"), [])}
        pairs = [(run, small[seed]) for run in runs if (seed := run["trial"]["seed"]) in small]
        if method == "small_batch" or not pairs:
            continue
        cells = [
            cell(
                [100 * (reading(run, "local_step", at) - reading(base, "local_step", at)) for run, base in pairs], ".1f"
            )
            for at in marks_on_the_way(settings)
        ]
        rows.append([model, f"`{method}`", *cells])
    return rows


def figures(good: list[dict[str, Any]], marks: dict[str, float]) -> list[str]:
    """A row's measured cells."""
    cells = []
    for by, at in marks.items():
        accuracy = cell([reading(run, by, at) for run in good], ".4f")
        cells.append(f"{accuracy} ({at:,.0f} s)" if by == "elapsed_s" else accuracy)
    cells += [cell([run["summary"]["samples_per_s"] for run in good], ",.1f")]
    cells += [cell([run["sharpness"] for run in good], ".3g")]
    return [*cells, f"{statistics.mean(run['summary']['samples'] for run in good):,.0f}"]


def plot(finished: Runs, settings: Settings, path: Path) -> None:
    """Accuracy by iterations, samples and seconds, a line a run; dotted: where the table reads it."""
    shown = [model for model in MODELS if any(name == model for name, _ in finished)]
    if not shown:
        return
    figure = Figure(figsize=(11, 3.4 * len(shown)), layout="constrained")
    panels = figure.subplots(len(shown), len(AXES), squeeze=False, sharey="row")
    for model, row in zip(shown, panels, strict=True):
        marks = marks_of(model, finished, settings)
        for (by, label), axes in zip(AXES.items(), row, strict=True):
            for method, colour in COLOURS.items():
                for seed, run in enumerate(finished.get((model, method), [])):
                    xs, ys = ([each[name] for each in run["evals"]] for name in (by, "test_accuracy"))
                    axes.plot(xs, ys, ".-", color=colour, alpha=0.7, linewidth=1, label="" if seed else method)
            if by in marks:
                axes.axvline(marks[by], color="0.5", linestyle=":")
            axes.set_xlabel(label)
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"test accuracy, {model}")
        row[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


def run_all(settings: Settings) -> None:
    """What is missing: a model's trials of learning rates, then its finals, methods interleaved."""
    for model in settings.models:
        for method in [] if settings.quick else settings.methods:
            for lr in grid(model, method, settings):
                measure_once(Trial(model, method, "tune", lr, TUNING_SEED), settings)
        for seed in range(settings.seeds):
            for method in settings.methods:
                best = chosen(model, method, settings)
                if best is None:
                    print(f"{model}, {method}: diverged at every learning rate", flush=True)
                elif measure_once(Trial(model, method, "final", best, seed), settings):
                    report(settings)


def read_settings() -> Settings:
    """The command line, or what `--quick` makes of it."""
    assert __doc__
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS[:2]), choices=MODELS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="which to run")
    parser.add_argument("--seeds", type=int, default=3, help="finals a method; 0: only tune")
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--stem", default="torchvision", choices=("small", "torchvision"))
    parser.add_argument("--test-limit", type=int, default=2_000, help="test samples, drawn by the seed")
    parser.add_argument("--hessian-samples", type=int, default=256)
    parser.add_argument(
        "--backend", default="gloo", choices=("gloo", "nccl"), help="nccl: ranks share what GPUs are here"
    )
    parser.add_argument("--anneal", action="store_true", help="cosine to the equal samples, where every run ends")
    parser.add_argument("--series", default="", help="a folder, table and plot of their own: another machine's, say")
    parser.add_argument("--quick", action="store_true", help="8 iterations, one seed, one rate; keeps nothing")
    settings = Settings(**vars(parser.parse_args()))
    if not settings.quick:
        return replace(settings, folder=RUNS / settings.series)
    folder = Path(tempfile.mkdtemp())
    return replace(settings, seeds=1, iterations=8, test_limit=200, hessian_samples=8, folder=folder)


def main() -> None:
    """Run what is missing, then write the table and the plot."""
    settings = read_settings()
    settings.folder.mkdir(parents=True, exist_ok=True)
    run_all(settings)
    print(report(settings))


if __name__ == "__main__":
    main()
