"""The recipes that ship, each taken through a change of phase on two real ranks with the real data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run

from trainer.config import recipes
from trainer.distributed.world import World

ROOT = Path(__file__).parents[2]
SMALLER = (
    "--data.train-limit 512 --data.test-limit 8 --run.samples 60 --policy.samples-per-phase 24 "
    "--policy.small.batch-per-rank 2 --policy.small.sync-period-steps 3 --policy.large.batch-per-rank 4 "
    "--eval.every-samples 100000 --record.reference-s 0 --record.no-tensorboard --record.no-progress"
)


def by_recipe(world: World, recipe: str, root: str) -> None:
    from trainer.loop.job import Job
    from trainer.train import train_in

    flags = ["--recipe", recipe, "--run.root", root, "--data.root", str(ROOT / "data"), *SMALLER.split()]
    train_in(world, Job.open(recipes.parse(flags, "test")))


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["resnet50", "vgg11"])
def test_a_few_steps_through_a_phase_change(name: str, tmp_path: Path) -> None:
    run(2, by_recipe, str(ROOT / "launch" / "recipes" / f"{name}.toml"), str(tmp_path), timeout_s=200)
    told = records(tmp_path / name)
    assert [line["name"] for line in told if line["kind"] == "phase"] == ["small", "large", "small"]
    end = told[-1]
    assert (end["kind"], end["local_steps"], end["samples"]) == ("end", 11, 60)
    assert all(line["train_loss"] is not None for line in told if line["kind"] == "round")
