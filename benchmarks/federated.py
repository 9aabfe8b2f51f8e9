"""Federated devices: accuracy by rule and skew, large and small batches on unequal devices, and rounds that wait.

    python -m benchmarks.federated [--tables niid batches waiting floor scale] [--seeds 1] [--rounds 50]

Each row is a run of `python -m trainer` on two ranks, as a user starts it, on Fashion-MNIST. A finished run is kept in
results/federated/ and skipped the next time, so a long table may be made in parts.

`niid`: NIID-Bench (Li et al. 2022): 10 parties, all in every round, 10 epochs of batch 64, SGD 0.01
with momentum 0.9, a CNN of 44,426 parameters. Pictures are normalised by mean and deviation.
`batches`: 50 devices at Dirichlet 0.3 with unequal speeds and links, 10 in a round: small batches, large batches,
alternating phases, constant Plans and the autopilot.
`waiting`: the same with one device in ten ten times slower: virtual seconds to 0.85 with rounds that wait, with a
deadline, and by FedBuff.
`floor`: one model of all data (pooled), and a model a device of its own data only (local).
`scale`: samples/s and memory with 1,000 devices and with 10, beside a bare loop. Time it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.provenance import provenance

RESULTS = Path("benchmarks/results/federated")
GOAL = 0.85
PARTIES, PARTY_SAMPLES = 10, 600_000
PUBLISHED = {
    "iid": {"fedavg": "0.8923 ± 0.0045", "scaffold": "0.8933", "fedprox": "0.8942", "fednova": "0.8936"},
    "dirichlet": {"fedavg": "0.8809 ± 0.0029", "scaffold": "0.8844", "fedprox": "0.8815", "fednova": "0.8822"},
    "classes": {"fedavg": "0.7810 ± 0.0251", "scaffold": "0.3380", "fedprox": "0.7805", "fednova": "0.7167"},
}
"""Test accuracy after 50 rounds in NIID-Bench."""


class NiidCnn(nn.Module):
    """The CNN of NIID-Bench: 44,426 parameters at one channel and ten classes."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.hidden = nn.Sequential(nn.Linear(256, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU())
        self.last = nn.Linear(84, num_classes)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """Scores (batch, classes) of pictures (batch, channels, 28, 28)."""
        scores: torch.Tensor = self.last(self.hidden(self.features(pictures)))
        return scores


def flags(**sections: Mapping[str, Any]) -> list[str]:
    """A command line's flags from sections of fields."""
    found = []
    for section, fields in sections.items():
        for name, value in fields.items():
            flag = f"--{section}.{name.replace('_', '-')}"
            found += [flag.replace(".", ".no-", 1)] if value is False else [flag, str(value)]
    return found


COMMON = flags(
    task={"model": "benchmarks.federated:NiidCnn"},
    record={"reference_s": 0, "tensorboard": False, "report": False},
    checkpoint={"every_s": 10**9},
)
PARTY = flags(
    optim={
        "lr": 0.01,
        "momentum": 0.9,
        "nesterov": False,
        "weight_decay": 1e-5,
        "schedule": "constant",
    },
    policy={"name": "constant", "batch_per_rank": 64},
    federated={"devices": PARTIES, "local_epochs": 10},
    eval={"every_samples": PARTY_SAMPLES},
)
SPLITS = {
    "iid": flags(data={"partition": "iid"}),
    "dirichlet": flags(data={"partition": "dirichlet", "alpha": 0.5, "min_samples": 10}),
    "classes": flags(data={"partition": "classes", "classes_per_device": 2}),
}
RULES = {"fedavg": {}, "scaffold": {}, "fedprox": {"mu": 0.01}, "fednova": {}}
UNEQUAL = flags(
    data={"partition": "dirichlet", "alpha": 0.3, "min_samples": 20, "test_share": 0.2},
    federated={"devices": 50, "cohort": 10, "profile": "lognormal"},
    optim={"lr": 0.02, "momentum": 0.9, "nesterov": False, "schedule": "constant"},
    eval={"every_samples": 15_000},
    run={"samples": 300_000},
)


def constant(batch: int, steps: int, **more: Any) -> list[str]:
    """A constant Plan."""
    return flags(policy={"name": "constant", "batch_per_rank": batch, "sync_period_steps": steps, **more})


def phases(**more: Any) -> list[str]:
    """Small and large batches in turn."""
    small, large = {"batch_per_rank": 16, "sync_period_steps": 32}, {"batch_per_rank": 128, "sync_period_steps": 8}
    named = {"name": "alternating", "lr_scaling": "sqrt", "samples_per_phase": 30_000, **more}
    return flags(policy=named, **{"policy.small": small, "policy.large": large})


BATCHES = {
    "small: batch 16, 32 steps": constant(16, 32),
    "small, longer: batch 16, 128 steps": constant(16, 128),
    "middle: batch 32, 32 steps": constant(32, 32, lr_scale=2**0.5),
    "large: batch 128, 8 steps": constant(128, 8, lr_scale=8**0.5),
    "large, longer: batch 128, 32 steps": constant(128, 32, lr_scale=8**0.5),
    "alternating 16 and 128": phases(),
    "batch by speed: 32, 32 steps": [*constant(32, 32, lr_scale=2**0.5), *flags(federated={"batch": "speed"})],
    "noise_scale": flags(policy={"name": "noise_scale"}),
    "autopilot": flags(policy={"name": "autopilot"}),
    "autopilot from batch 16": flags(policy={"name": "autopilot", "batch_per_rank": 16}),
    "autopilot from batch 16, bound 0.016": flags(
        policy={"name": "autopilot", "batch_per_rank": 16, "max_divergence": 0.016}
    ),
}
WAITING = {
    "rounds that wait": [],
    "deadline": flags(federated={"deadline_s": 12.0}),
    "over-selection 1.3": flags(federated={"over_select": 1.3}),
    "fedbuff": flags(federated={"rule": "fedbuff", "buffer": 5}),
}


def run(name: str, options: Sequence[str], seed: int) -> dict[str, Any]:
    """A row's figures: its run's, or those that are kept."""
    kept = RESULTS / f"{name.replace(' ', '_').replace(',', '').replace(':', '')}-{seed}.json"
    if kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "trainer"]
        place = flags(run={"root": folder, "name": "run", "seed": seed})
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        began = time.time()
        done = subprocess.run([*command, *COMMON, *options, *place], env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed}: the run ended with exit code {done.returncode}")
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    evals = [line for line in lines if line["kind"] == "eval"]
    found = {
        "name": name,
        "seed": seed,
        "flags": list(options),
        "took_s": time.time() - began,
        "summary": lines[-1],
        "evals": [{key: each.get(key) for key in KEPT} for each in evals],
        **provenance(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1) + "\n")
    return found


KEPT = ("samples", "virtual_s", "test_accuracy", "worst_tenth_accuracy", "device_accuracy")


def reached(found: Mapping[str, Any], goal: float) -> float | None:
    """Virtual seconds at the first evaluation with this accuracy."""
    return next((each["virtual_s"] for each in found["evals"] if each["test_accuracy"] >= goal), None)


def spread(values: Sequence[float | None], form: str = ".4f") -> str:
    """Mean and deviation over seeds; `never` where a seed has none."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "never" if not known else f"never on {len(values) - len(known)} of {len(values)}"
    mean = format(float(np.mean(known)), form)
    return mean if len(known) == 1 else f"{mean} ± {format(float(np.std(known, ddof=1)), form)}"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write a table beside its records, and print it."""
    lines = [f"# {title}", "", f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    text = "\n".join(lines) + "\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{title.split(',')[0].replace(' ', '-').lower()}.md").write_text(text)
    print(text)


def niid(seeds: int, rounds: int, rules: Sequence[str], splits: Sequence[str]) -> None:
    """NIID-Bench's table."""
    rows = []
    for split in splits:
        for rule in rules:
            options = [*PARTY, *SPLITS[split], *flags(federated={"rule": rule, **RULES[rule]})]
            options += flags(run={"samples": rounds * PARTY_SAMPLES})
            found = [run(f"niid-{split}-{rule}-{rounds}", options, seed) for seed in range(seeds)]
            best = [max(each["test_accuracy"] for each in one["evals"]) for one in found]
            last = [one["summary"]["test_accuracy"] for one in found]
            rows.append([split, rule, str(rounds), spread(last), spread(best), PUBLISHED[split][rule], str(seeds)])
    head = ("split", "rule", "rounds", "test accuracy", "best", "published, 50 rounds", "seeds")
    table(f"NIID-Bench {rounds}, Fashion-MNIST", head, rows)


def batches(seeds: int, names: Sequence[str]) -> None:
    """Small and large batches on unequal devices."""
    rows = []
    for name in names:
        found = [run(f"batches-{name}", [*UNEQUAL, *BATCHES[name]], seed) for seed in range(seeds)]
        summaries = [one["summary"] for one in found]
        figures = [spread([each[key] for each in summaries]) for key in ("test_accuracy", "worst_tenth_accuracy")]
        times = [spread([each["virtual_s"] for each in summaries], ".0f")]
        times += [spread([reached(one, goal) for one in found], ".0f") for goal in (0.70, 0.75, 0.80)]
        rows.append([name, *figures, *times, str(seeds)])
    head = ("Plan", "test accuracy", "worst tenth", "virtual s in all", "to 0.70", "to 0.75", "to 0.80", "seeds")
    table("Batches on unequal devices, Dirichlet 0.3, 50 devices", head, rows)


def waiting(seeds: int) -> None:
    """A tenth of the devices ten times slower."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    profile = RESULTS / "slow-tenth.csv"
    profile.write_text("samples_per_s\n" + "".join(f"{10 if device % 10 == 0 else 100}\n" for device in range(50)))
    rows = []
    for name, options in WAITING.items():
        place = flags(federated={"profile": str(profile)})
        longer = flags(run={"samples": 900_000}, eval={"every_samples": 30_000})
        asked = [*UNEQUAL, *constant(16, 32), *place, *longer, *options]
        found = [run(f"waiting-{name}", asked, seed) for seed in range(seeds)]
        accuracy = spread([one["summary"]["test_accuracy"] for one in found])
        worst = spread([one["summary"]["worst_tenth_accuracy"] for one in found])
        rows.append([name, spread([reached(one, GOAL) for one in found], ".0f"), accuracy, worst, str(seeds)])
    head = ("how", "virtual s to 0.85", "test accuracy at the end", "worst tenth", "seeds")
    table("Slow devices, one in ten ten times slower", head, rows)


def floor(seeds: int) -> None:
    """What all data in one place gives, and what each device reaches alone."""
    rows = []
    for seed in range(seeds):
        pooled = flags(
            data={"partition": "iid"},
            optim={"lr": 0.02, "momentum": 0.9, "nesterov": False, "schedule": "constant"},
            policy={"name": "constant", "batch_per_rank": 16, "sync_period_steps": 1},
            run={"samples": 600_000},
            eval={"every_samples": 60_000},
        )
        one = run("floor-pooled", pooled, seed)
        rows.append(["pooled", f"{one['summary']['test_accuracy']:.4f}", "", str(seed)])
        alone = [*UNEQUAL, *constant(16, 32), *flags(federated={"finetune_steps": 500}, run={"samples": 1_000})]
        one = run("floor-local", alone, seed)
        summary = one["summary"]
        rows.append(
            [
                "local only, 500 steps, on its own held-out samples",
                f"{summary['tuned_device_accuracy']:.4f}",
                f"{summary['tuned_worst_tenth_accuracy']:.4f}",
                str(seed),
            ]
        )
    table("Ceiling and floor, Dirichlet 0.3", ("who", "accuracy", "worst tenth", "seed"), rows)


def scale() -> None:
    """Samples/s and memory with many devices and with few, and of a bare loop on as many ranks."""
    rows = []
    for devices, cohort in ((10, 10), (1_000, 50)):
        options = flags(
            data={"partition": "iid"},
            federated={"devices": devices, "cohort": cohort},
            policy={"name": "constant", "batch_per_rank": 20, "sync_period_steps": 16 if devices == 10 else 3},
            optim={"lr": 0.02},
            eval={"every_samples": 10**9},
            run={"samples": 30_000},
            task={"model": "fedavg_cnn"},
        )
        one = run(f"scale-{devices}", options, 0)["summary"]
        rows.append(
            [
                f"{devices:,} devices, cohort {cohort}",
                f"{one['samples_per_s']:.0f}",
                f"{one['peak_memory_bytes'] / 1e6:.0f}",
            ]
        )
    bare = flags(
        policy={"name": "constant", "batch_per_rank": 20, "sync_period_steps": 0},
        optim={"lr": 0.02},
        eval={"every_samples": 10**9},
        run={"samples": 30_000},
        task={"model": "fedavg_cnn"},
    )
    one = run("scale-bare", bare, 0)["summary"]
    rows.append(
        ["no devices, nothing averaged", f"{one['samples_per_s']:.0f}", f"{one['peak_memory_bytes'] / 1e6:.0f}"]
    )
    table("Many devices, two ranks, FedAvg CNN", ("what", "samples/s", "peak MB of rank 0"), rows)


def main() -> None:
    """Make the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ("niid", "batches", "waiting", "floor", "scale")
    parser.add_argument("--tables", nargs="+", choices=known, default=list(known))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=50, help="of niid")
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=["fedavg", "scaffold"], help="of niid")
    parser.add_argument("--splits", nargs="+", choices=list(SPLITS), default=list(SPLITS), help="of niid")
    parser.add_argument("--plans", nargs="+", choices=list(BATCHES), default=list(BATCHES), help="of batches")
    asked = parser.parse_args()
    if "niid" in asked.tables:
        niid(asked.seeds, asked.rounds, asked.rules, asked.splits)
    if "batches" in asked.tables:
        batches(asked.seeds, asked.plans)
    if "waiting" in asked.tables:
        waiting(asked.seeds)
    if "floor" in asked.tables:
        floor(asked.seeds)
    if "scale" in asked.tables:
        scale()


if __name__ == "__main__":
    main()
