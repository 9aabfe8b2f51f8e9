"""Whole runs in real processes: their records, and exact resume."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, run
from small_run import records
from torch import nn
from whole_runs import end, in_process, lines, settings, start, told, weights

from trainer import Constant, Plan, PostLocal
from trainer.config import recipes
from trainer.data.sets import fake
from trainer.distributed.world import World
from trainer.loop.step import LocalStep


def test_a_run_leaves_its_records(whole: Path) -> None:
    written = lines(whole)
    kinds = [line["kind"] for line in written]
    assert set(kinds) == {"round", "phase", "eval", "event", "end"}
    rounds = [line for line in written if line["kind"] == "round"]
    needed = (
        "round phase local_step samples plan lr train_loss elapsed_s compute_s sync_wait_s wire_bytes divergence "
        "grad_noise_scale"
    )
    assert set(needed.split()) <= rounds[0].keys()
    assert rounds[0]["plan"] == {"batch_per_rank": 8, "sync_period_steps": 6, "lr_scale": 1.0}
    for before, after in itertools.pairwise(rounds):
        assert after["elapsed_s"] >= before["elapsed_s"]
        assert after["samples"] > before["samples"]
    phases = [line for line in written if line["kind"] == "phase"]
    assert [phase["name"] for phase in phases[:4]] == ["small", "large", "small", "large"]
    assert phases[1]["why"]["phase_samples"] >= phases[1]["why"]["samples_per_phase"] == 320
    evals = [line for line in written if line["kind"] == "eval"]
    assert [line["samples"] for line in evals][-1] == 1600
    assert len(evals) == 4
    summary = json.loads((whole / "summary.json").read_text())
    needed = (
        "name policy world_size local_steps rounds phases samples elapsed_s compute_s sync_wait_s eval_s wire_bytes "
        "samples_per_s scaling_speedup test_accuracy best_test_accuracy peak_memory_bytes versions"
    )
    assert set(needed.split()) <= summary.keys()
    assert (summary["world_size"], summary["samples"], summary["phases"]) == (2, 1600, len(phases))
    assert summary["elapsed_s"] == pytest.approx(
        summary["compute_s"] + summary["sync_wait_s"] + summary["input_wait_s"], rel=1e-6
    )
    assert summary["wire_bytes"] > 0
    assert recipes.load(whole / "config.toml").run.name == "whole"
    assert len(list((whole / "checkpoints").iterdir())) == 3


def test_the_same_seed_gives_the_same_run(whole: Path) -> None:
    run(2, in_process, settings(whole.parent, "again"))
    assert torch.equal(weights(whole), weights(whole.parent / "again"))
    assert told(whole) == told(whole.parent / "again")


@pytest.mark.parametrize(("name", "wait_for"), [("mid-small", 64), ("mid-large", 480), ("late", 1280)])
def test_a_run_killed_and_resumed_equals_the_uninterrupted_one(whole: Path, name: str, wait_for: int) -> None:
    root = whole.parent
    config = settings(root, name, checkpoint={"every_samples": 48 if name == "mid-small" else 200})
    reference = whole
    if name == "mid-small":  # its checkpoints fall into rounds and rewrap at other steps: its own reference
        run(2, in_process, settings(root, "often", checkpoint={"every_samples": 48}))
        reference = root / "often"
    processes = start(config, root)
    folder, deadline = root / name, time.monotonic() + 60
    while time.monotonic() < deadline:
        trained = any(line["samples"] >= wait_for for line in records(folder, "round"))
        if trained and [*(folder / "checkpoints").glob("step-*[0-9]")]:  # a whole one: they are written beside training
            break
        time.sleep(0.01)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    end(processes)
    assert not (folder / "summary.json").exists(), "killed too late to test anything"
    resumed = settings(
        root, name, checkpoint={"every_samples": 48 if name == "mid-small" else 200}, run={"resume": "auto"}
    )
    run(2, in_process, resumed)
    assert any(line.get("what") == "resumed" for line in lines(folder))
    assert torch.equal(weights(folder), weights(reference))
    assert told(folder) == told(reference)


@pytest.mark.parametrize("size", [1, 3])
def test_other_world_sizes_resume_exactly_too(tmp_path: Path, size: int) -> None:
    resume_exactly(tmp_path, size)


LATE = {"delay_steps": 4}


@pytest.mark.parametrize(
    "sync",
    [
        LATE,
        LATE | {"wire_format": "int8", "state": "average", "fragments": 2},
        LATE | {"wire_format": "int4", "outer": "diloco", "state": "reset"},
        {"wire_format": "bf16", "outer": "fedadam", "gradient_format": "bf16"},
        # equal runs with powersgd differ in their last bits: what it keeps is in test_gradient_formats
        {"mixing": 0.5, "batch_norm": "keep"},
        {"node_period_steps": 2, "node_wire_format": "int8", "ranks_per_node": 2},
    ],
)
def test_every_way_of_averaging_resumes_exactly_also_in_mid_transfer(tmp_path: Path, sync: dict[str, Any]) -> None:
    often = {"every_samples": 40, "keep": 100}  # at every local step or two of a small-batch phase
    late = 4 if "delay_steps" in sync else 2  # with a transfer under way, and without
    numbers = tuple(dict.fromkeys((2, late, 20)))  # the last is in the third phase
    resume_exactly(tmp_path, 2, numbers, sync=sync, checkpoint=often, run={"samples": 880})


def resume_exactly(root: Path, size: int, numbers: Sequence[int] = (0,), **sections: dict[str, Any]) -> None:
    """Go on from some of a run's checkpoints, and end as the uninterrupted run does."""
    run(size, in_process, settings(root, "whole", **sections))
    given = sections.pop("run", {})
    for number in numbers:
        cut = shutil.copytree(root / "whole", root / f"cut-{number}")
        chosen = sorted((cut / "checkpoints").iterdir())[number]
        (cut / "model.pt").unlink()
        run(size, in_process, settings(root, cut.name, run={"resume": str(chosen), **given}, **sections))
        assert any(line.get("what") == "resumed" for line in lines(cut))
        assert torch.equal(weights(cut), weights(root / "whole"))
        assert told(cut) == told(root / "whole")


def noisy_data(root: str, train: bool) -> Any:
    return Noisy(fake(300 if train else 50, train))


class Noisy(torch.utils.data.Dataset[Any]):
    """Pictures with a random transform of their own, read one by one."""

    classes = 10

    def __init__(self, part: Any) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, index: int) -> Any:
        picture, label = self.part.items[index]
        return picture.float() / 255 + 0.1 * torch.randn(()), label


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_through_a_loader_resumes_exactly_too(tmp_path: Path, workers: int) -> None:
    data = {"name": "test_train:noisy_data", "workers": workers}
    seldom = {"every_samples": 10**6}  # each evaluation begins reading processes of its own
    resume_exactly(tmp_path, 2, data=data, eval=seldom, run={"samples": 800})


def test_a_checkpoint_of_another_policy_is_refused_and_the_run_stays(whole: Path) -> None:
    kept = (whole / "config.toml").read_bytes()
    config = settings(whole.parent, "whole", run={"resume": "auto"})
    with pytest.raises(RankError, match=r"policy\.name = 'constant': the checkpoint of step \d+ is of 'alternating'"):
        run(2, in_process, replace(config, policy=Constant(Plan(8, 6))))
    assert (whole / "config.toml").read_bytes() == kept


@pytest.mark.parametrize(
    "sync", [{"wire_format": "int8", "delay_steps": "auto"}, {"node_period_steps": 2, "ranks_per_node": 2}]
)
def test_one_rank_alone_is_timed_whatever_the_ranks_average(tmp_path: Path, sync: dict[str, Any]) -> None:
    config = settings(tmp_path, "timed", run={"samples": 160}, sync=sync, record={"reference_s": 0.05})
    policy = PostLocal(large=Plan(8, 1), local=Plan(8, 4), switch_samples=80)  # the base Plan averages no parameters
    run(2, in_process, replace(config, policy=policy))
    assert json.loads((tmp_path / "timed" / "summary.json").read_text())["scaling_speedup"] > 0


def test_an_old_run_of_the_same_name_is_moved_aside(tmp_path: Path) -> None:
    for _ in range(2):
        run(1, in_process, settings(tmp_path, "twice", run={"samples": 32}))
    assert (tmp_path / "twice.1" / "summary.json").exists()
    assert (tmp_path / "twice" / "summary.json").exists()


def counted(world: World, test_size: int) -> Any:
    from trainer.config.config import DataConfig, OptimConfig, StepConfig
    from trainer.data import Transform, split_evenly
    from trainer.distributed.clock import Clock
    from trainer.distributed.collectives import Collectives

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    part = fake(test_size, train=False)
    step = LocalStep(StepConfig(), OptimConfig(), nn.CrossEntropyLoss(), world.device)
    transform = Transform.of(part, DataConfig(), world.device, train=False)
    batches = split_evenly(part, world, 8, transform)
    return step.evaluate(model, batches, Collectives(world, Clock(world.device), 2**20))


def of_sequences(world: World) -> float:
    from trainer.config.config import OptimConfig, StepConfig
    from trainer.distributed.collectives import Collectives

    text = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]])
    step = LocalStep(StepConfig(), OptimConfig(), nn.CrossEntropyLoss(), world.device)
    scores = nn.functional.one_hot(torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0]]), 2).float().transpose(1, 2)
    model = nn.Identity()
    return float(step.evaluate(model, [(scores, text)], Collectives(world, None, 2**20)).accuracy)


def test_the_accuracy_of_sequences_is_the_share_of_their_places() -> None:
    assert of_sequences(World()) == 5 / 8


def test_evaluation_counts_every_sample_once_at_any_world_size() -> None:
    results = {size: run(size, counted, 101) for size in (1, 2, 3)}
    alone = results[1][0]
    assert alone.samples == 101
    for result in (result for ranks in results.values() for result in ranks):
        assert result.samples == 101
        assert result.accuracy == alone.accuracy
        assert result.loss == pytest.approx(alone.loss, rel=1e-5)
