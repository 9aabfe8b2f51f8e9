"""Real runs of two ranks, decided again from their records."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ranks import run
from small_run import RECIPE, records
from torch import nn

from trainer.config import recipes
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.plan import Plan
from trainer.replay import replay
from trainer.replay.__main__ import main

FIRST = {"plan": {"batch_per_rank": 16, "sync_period_steps": 8}, "max_batch_per_rank": 64}


TWO = {name: {"batch_per_rank": 64, "sync_period_steps": 1} for name in ("large",)}


POLICIES: dict[str, dict[str, Any]] = {
    "alternating": {},
    "autopilot": {"batch_per_rank": 16, "max_batch_per_rank": 64, "max_period_steps": 16, "min_stay_steps": 16},
    "autopilot_adamw": {"name": "autopilot", "batch_per_rank": 16, "max_batch_per_rank": 64, "min_stay_steps": 16},
    "qsr": {"batch_per_rank": 16},
    "adaptive_period": {"plan": FIRST["plan"], "interval_samples": 800},
    "batch_growth": FIRST | {"milestones": [800, 1_600], "factor": 2.0},
    "compose": {"batch": {"name": "noise_scale", **FIRST}, "period": {"name": "qsr", "batch_per_rank": 16}},
    "cycle": TWO | {"small": FIRST["plan"], "min_samples": 500, "flat": 0.5},
    "fda": {"batch_per_rank": 16, "threshold": 0.01},
    "noise_scale": FIRST | {"min_stay_rounds": 1},
    "norm_test": FIRST | {"min_stay_rounds": 1},
    "selsync": {"batch_per_rank": 16, "change": 0.1},
    "swap": TWO | {"alone": {"batch_per_rank": 16, "sync_period_steps": 0}, "last_samples": 1_000},
}
SMALL, LARGE = Plan(16, 8), Plan(64, 1)


def linear_model(num_classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 28 * 28, num_classes))


def settings(root: Path, name: str, resume: str | None = None) -> Config:
    table = tomllib.loads(RECIPE)
    if POLICIES[name]:
        table["policy"] = {"name": name} | POLICIES[name]
    table["run"] |= {"root": str(root), "name": name} | ({"resume": resume} if resume else {})
    if name.endswith("_adamw"):
        table["optim"] = {"name": "adamw", "lr": 0.001}
    table["task"] = {"model": "test_recorded_runs:linear_model"}
    table["checkpoint"]["keep"] = 9
    return recipes.from_dict(table)


def train_all(world: World, configs: Sequence[Config]) -> None:
    from trainer.loop.job import Job
    from trainer.train import train_in

    for config in configs:
        train_in(world, Job.open(config))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks for every one of these policies."""
    root = tmp_path_factory.mktemp("runs")
    run(2, train_all, [settings(root, name) for name in POLICIES])
    return root


@pytest.mark.parametrize("name", POLICIES)
def test_a_recorded_run_decides_again_as_it_did(runs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = records(runs / name, "round")
    assert main([str(runs / name)]) == 0
    assert capsys.readouterr().out == f"{len(rounds) + 1} decisions, none differs\n"
    found = replay(runs / name)
    assert [each.round for each in found] == [0, *(line["round"] for line in rounds)]
    assert [each.samples for each in found] == [0, *(line["samples"] for line in rounds)]
    if name.startswith("autopilot"):
        assert found[0].recorded.plan.sync_period_steps == (1 if "adamw" in name else 2)
    if name in ("fda", "selsync"):
        assert len({line["seen"]["steps"] for line in rounds}) > 1, "no round ended early"
    elif name != "cycle":  # whose loss's trend takes 16 observations, more than this run has
        assert len({(each.recorded.phase, each.recorded.plan) for each in found}) > 1, "it never changed its Plan"
    # the very same numbers decided
    assert all(json.loads(json.dumps(dict(each.decided.why))) == each.recorded.why for each in found)


def test_a_run_that_was_resumed_and_killed_replays_too(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = runs / "resumed"
    shutil.copytree(runs / "autopilot", root / "autopilot")
    before = records(root / "autopilot", "round")
    chosen = sorted((root / "autopilot" / "checkpoints").iterdir())[2]
    run(2, train_all, [settings(root, "autopilot", resume=str(chosen))])
    assert records(root / "autopilot", "round") != before
    assert main([str(root / "autopilot")]) == 0
    path = root / "autopilot" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])  # ends within a record
    capsys.readouterr()
    assert main([str(root / "autopilot")]) == 0
    rounds = records(root / "autopilot", "round")
    assert capsys.readouterr().out == f"{len(rounds) + 1} decisions, none differs\n"


def test_a_really_recorded_run_with_another_policy(runs: Path, tmp_path: Path) -> None:
    for name in ("alternating", "swap", "selsync"):
        assert main([str(runs / "autopilot"), "--policy", name, "--out", str(tmp_path / "new")]) == 0
    assert len(list((tmp_path / "new").glob("replay-*.png"))) == 3
    assert not list((runs / "autopilot").glob("*.png"))
