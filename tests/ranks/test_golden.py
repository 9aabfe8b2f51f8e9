"""Golden runs: a change that only moves code leaves every record and every weight as it was.

`python -m pytest tests -k golden` compares with tests/ranks/golden/. Where a change is meant to alter what is trained,
write the files anew with `GOLDEN=write` in the environment, in a commit of its own that says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from small_run import records

from trainer.config import recipes
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.loop.job import Job
from trainer.train import train_in

GOLDEN = Path(__file__).parent / "golden"
TIMED = ("elapsed_s", "compute_s", "sync_wait_s", "input_wait_s", "eval_s", "checkpoint_s", "transfer_s")
SEEN_TIMED = ("compute_s", "slowest_compute_s", "sync_wait_s", "transfer_s", "memory_share")
"""What depends on the clock or the machine's memory."""
BASE: dict[str, Any] = {
    "run": {"samples": 1_600},
    "data": {"name": "fake", "train_limit": 700, "test_limit": 101, "crop_padding": 1, "flip": True},
    "task": {"model": "whole_runs:small_model"},
    "optim": {"lr": 0.02},
    "eval": {"every_samples": 500},
    "record": {"reference_s": 0.0, "tensorboard": False, "progress": False, "report": False},
}
SMALL = {"batch_per_rank": 8, "sync_period_steps": 6}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "alternating": (
        2,
        {
            "policy": {
                "name": "alternating",
                "samples_per_phase": 320,
                "lr_scaling": "sqrt",
                "lr_ramp_samples": 200,
                "small": SMALL,
                "large": {"batch_per_rank": 20, "sync_period_steps": 1},
            }
        },
    ),
    "delayed_fragments": (
        2,
        {
            "policy": {"name": "constant", "batch_per_rank": 8, "sync_period_steps": 8},
            "sync": {"delay_steps": 3, "fragments": 2, "wire_format": "int4", "outer": "fedavgm"},
        },
    ),
    "early_end": (2, {"policy": {"name": "fda", "batch_per_rank": 8, "threshold": 0.05, "max_period_steps": 12}}),
    "two_levels": (
        4,
        {
            "policy": {"name": "constant", "batch_per_rank": 8, "sync_period_steps": 8},
            "sync": {"node_period_steps": 2, "wire_format": "int8", "ranks_per_node": 2},
        },
    ),
    "period_0": (
        2,
        {
            "policy": {
                "name": "swap",
                "train_accuracy": 0.2,
                "last_samples": 600,
                "alone": {"batch_per_rank": 8, "sync_period_steps": 0},
            }
        },
    ),
}


def config_of(name: str, root: Path) -> Config:
    tables: dict[str, Any] = json.loads(json.dumps(BASE))
    for section, values in CASES[name][1].items():
        tables.setdefault(section, {}).update(values)
    tables["run"] |= {"root": str(root), "name": name}
    return recipes.from_dict(tables)


def train_here(world: World, config: Config) -> None:
    train_in(world, Job.open(config))


def figures_of(folder: Path) -> list[dict[str, Any]]:
    """The run's records without what depends on the clock."""
    found = []
    for line in records(folder):
        if line["kind"] in ("event", "end"):
            continue
        kept = {name: value for name, value in line.items() if name not in TIMED}
        if "seen" in kept:
            kept["seen"] = {name: value for name, value in kept["seen"].items() if name not in SEEN_TIMED}
        found.append(kept)
    return found


def weights_of(folder: Path) -> str:
    model = torch.load(folder / "model.pt", weights_only=True)
    return hashlib.sha256(b"".join(model[name].numpy().tobytes() for name in sorted(model))).hexdigest()


def machine() -> str:
    """What bits depend on: torch's kernels and the processor that they are chosen for."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {platform.machine()},{model[12:]}"


def assert_close(found: Any, wanted: Any, where: str) -> None:
    """Equal but for the last digits of floats, which another processor may round otherwise."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for name in wanted:
            assert_close(found[name], wanted[name], f"{where}.{name}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), where
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_close(one, other, f"{where}[{number}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=0.02, abs=0.02), where
    else:
        assert found == wanted, where


@pytest.mark.parametrize("name", CASES)
def test_golden_run(name: str, tmp_path: Path) -> None:
    ranks, _ = CASES[name]
    run(ranks, train_here, config_of(name, tmp_path))
    found = {"machine": machine(), "weights": weights_of(tmp_path / name), "records": figures_of(tmp_path / name)}
    file = GOLDEN / f"{name}.json"
    if os.environ.get("GOLDEN") == "write":
        file.write_text(json.dumps(found) + "\n")
    wanted = json.loads(file.read_text())
    if wanted["machine"] == found["machine"]:
        assert found == wanted
    else:
        assert_close(found["records"], wanted["records"], name)


def test_a_resumed_run_ends_as_the_golden_one(tmp_path: Path) -> None:
    config = config_of("alternating", tmp_path)
    saving = replace(config, checkpoint=replace(config.checkpoint, every_samples=300, keep=9))
    run(2, train_here, saving)
    golden = json.loads((GOLDEN / "alternating.json").read_text())
    if golden["machine"] == machine():
        assert weights_of(tmp_path / "alternating") == golden["weights"]
    steps = sorted((tmp_path / "alternating" / "checkpoints").glob("step-*"))
    assert len(steps) > 3
    for step in steps[:3]:
        again = replace(saving, run=replace(saving.run, name=f"from-{step.name}", resume=str(step)))
        run(2, train_here, again)
        assert weights_of(tmp_path / again.run.name) == weights_of(tmp_path / "alternating")
        assert figures_of(tmp_path / again.run.name)[-1] == figures_of(tmp_path / "alternating")[-1]
