"""Whole runs of federated devices: records, figures over devices, and a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run

from trainer.config import recipes
from trainer.distributed.world import World

SAID = """
--data.name fake --data.train-limit 400 --data.test-limit 60 --task.model whole_runs:small_model
--data.partition dirichlet --data.alpha 0.3 --data.min-samples 10 --data.test-share 0.2
--federated.devices 12 --federated.cohort 5 --federated.profile lognormal --federated.over-select 1.3
--federated.finetune-steps 2 --federated.local-epochs 1 --federated.rule scaffold --optim.momentum 0
--optim.no-nesterov --policy.name constant --policy.batch-per-rank 8 --eval.every-samples 300 --run.samples 900
--record.reference-s 0 --record.no-tensorboard --record.no-progress --record.no-report
"""
FLAGS = SAID.split()


def whole(world: World, root: str, *more: str) -> Any:
    from trainer.loop.job import Job
    from trainer.train import train_in

    summary = train_in(world, Job.open(recipes.parse([*FLAGS, "--run.root", root, *more], "test").named()))
    return None if summary is None else summary["worst_tenth_accuracy"]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_of_devices_tells_who_was_heard_and_how_devices_do(tmp_path: Path) -> None:
    ones, twos = (tmp_path / str(ranks) for ranks in (1, 2))
    run(1, whole, str(ones), "--run.name", "x")
    worst = run(2, whole, str(twos), "--run.name", "x")
    alone, both = (records(folder / "x") for folder in (ones, twos))
    assert [line["kind"] for line in alone] == [line["kind"] for line in both]
    for mine, theirs in zip(alone, both, strict=True):
        if mine["kind"] == "round":
            for name in ("samples", "local_step", "virtual_s", "reports", "dropped", "phase"):
                assert mine[name] == theirs[name]
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
            assert (mine["reports"], len(mine["dropped"])) == (5, 2)
    end = both[-1]
    assert end["worst_tenth_accuracy"] == worst[0] == worst[1]
    assert end["worst_tenth_accuracy"] <= end["device_accuracy"] <= end["best_tenth_accuracy"]
    assert len(end["device_accuracy_deciles"]) == 11
    assert end["tuned_device_accuracy"] > 0
    assert end["virtual_s"] == [line["virtual_s"] for line in both if line["kind"] == "round"][-1] > 0
    # resumed from the checkpoint of its middle, it is the same run
    run(2, whole, str(twos), "--run.name", "y", "--checkpoint.every-samples", "400", "--checkpoint.keep", "9")
    folder = twos / "y"
    weights = torch.load(folder / "model.pt", weights_only=True)
    middle = sorted((folder / "checkpoints").glob("step-*"))[0]
    run(2, whole, str(twos), "--run.name", "z", "--run.resume", str(middle))
    again = torch.load(twos / "z" / "model.pt", weights_only=True)
    assert all(torch.equal(weights[name], again[name]) for name in weights)
