"""Whole runs in real processes: records, exact resume, faults, the command line."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, free_port, run
from torch import nn

from trainer import Constant, Plan, PostLocal
from trainer.config import recipes
from trainer.config.config import Config, WorldConfig
from trainer.data.sets import fake
from trainer.distributed.world import World, compare_ranks
from trainer.errors import MismatchError
from trainer.loop.checkpoint import Checkpoints
from trainer.loop.step import LocalStep

SETTINGS = {
    "run": {"samples": 1600},
    "world": {"backend": "gloo", "timeout_s": 30.0},
    "data": {"name": "fake", "train_limit": 700, "test_limit": 101, "crop_padding": 1, "flip": True},
    "task": {"model": "test_train:small_model"},
    "optim": {"lr": 0.02},
    "policy": {
        "name": "alternating",
        "samples_per_phase": 320,
        "lr_scaling": "sqrt",
        "lr_ramp_samples": 200,
        "small": {"batch_per_rank": 8, "sync_period_steps": 6},
        "large": {"batch_per_rank": 20, "sync_period_steps": 1},
    },
    "eval": {"every_samples": 500},
    "checkpoint": {"every_samples": 200, "keep": 3},
    "record": {"reference_s": 0.0, "tensorboard": False, "progress": False, "report": False},
}


def small_model(num_classes: int, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 5, stride=3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * 64, num_classes),
    )


def settings(root: Path, name: str, **sections: dict[str, Any]) -> Config:
    table = json.loads(json.dumps(SETTINGS))
    for section, fields in ({"run": {"root": str(root), "name": name}} | sections).items():
        table.setdefault(section, {}).update(fields)
    table["run"] |= {"root": str(root), "name": name}
    return recipes.from_dict(table)


def start(config: Config, folder: Path, ranks: int = 2, module: str = "trainer") -> list[subprocess.Popen[str]]:
    """The ranks of `python -m trainer`, as a launcher would start them."""
    recipe = folder / f"{config.run.name}.toml"
    recipes.save(config, recipe)
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, "--recipe", str(recipe)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]


def end(processes: list[subprocess.Popen[str]], timeout_s: float = 60) -> tuple[list[int], str]:
    try:
        told = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "".join(out + err for out, err in told)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(folder: Path) -> list[dict[str, Any]]:
    """The records without times and without what only a resumed run says."""
    times = {"elapsed_s", "compute_s", "slowest_compute_s", "sync_wait_s", "input_wait_s", "eval_s", "checkpoint_s"}
    times |= {"samples_per_s", "transfer_s", "peak_memory_bytes", "memory_share", "name", "started_at", "wall_s"}

    def timeless(line: dict[str, Any]) -> dict[str, Any]:
        return {
            name: timeless(value) if isinstance(value, dict) else value
            for name, value in line.items()
            if name not in times
        }

    return [timeless(line) for line in lines(folder) if line.get("what") != "resumed"]


def weights(folder: Path) -> torch.Tensor:
    state = torch.load(folder / "model.pt", weights_only=True)
    return torch.cat([value.double().flatten() for value in state.values()])


def in_process(world: World, config: Config) -> None:
    from trainer.loop.job import Job
    from trainer.train import train_in

    train_in(world, Job.open(config))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks."""
    root = tmp_path_factory.mktemp("runs")
    run(2, in_process, settings(root, "whole"))
    return root / "whole"


def test_a_run_leaves_its_records(whole: Path) -> None:
    records = lines(whole)
    kinds = [line["kind"] for line in records]
    assert set(kinds) == {"round", "phase", "eval", "event", "end"}
    rounds = [line for line in records if line["kind"] == "round"]
    needed = (
        "round phase local_step samples plan lr train_loss elapsed_s compute_s sync_wait_s wire_bytes divergence "
        "grad_noise_scale"
    )
    assert set(needed.split()) <= rounds[0].keys()
    assert rounds[0]["plan"] == {"batch_per_rank": 8, "sync_period_steps": 6, "lr_scale": 1.0}
    for before, after in itertools.pairwise(rounds):
        assert after["elapsed_s"] >= before["elapsed_s"]
        assert after["samples"] > before["samples"]
    phases = [line for line in records if line["kind"] == "phase"]
    assert [phase["name"] for phase in phases[:4]] == ["small", "large", "small", "large"]
    assert phases[1]["why"]["phase_samples"] >= phases[1]["why"]["samples_per_phase"] == 320
    evals = [line for line in records if line["kind"] == "eval"]
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
        if (folder / "metrics.jsonl").exists() and any(
            line["kind"] == "round" and line["samples"] >= wait_for for line in whole_lines(folder)
        ):
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


def whole_lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


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
        {"mixing": 0.5, "batch_norm": "keep", "gradient_format": "powersgd"},
        {"node_period_steps": 2, "node_wire_format": "int8", "ranks_per_node": 2},
    ],
)
def test_every_way_of_averaging_resumes_exactly_also_in_mid_transfer(tmp_path: Path, sync: dict[str, Any]) -> None:
    often = {"every_samples": 40, "keep": 100}  # at every local step or two of a small-batch phase
    for number in (2, 4, 20):
        resume_exactly(tmp_path / str(number), 2, number, sync=sync, checkpoint=often)


def resume_exactly(root: Path, size: int, number: int = 0, **sections: dict[str, Any]) -> None:
    """Go on from one of a run's checkpoints, and end as the uninterrupted run does."""
    root.mkdir(exist_ok=True)
    run(size, in_process, settings(root, "whole", **sections))
    run(size, in_process, settings(root, "cut", **sections))
    cut = root / "cut"
    chosen = sorted((cut / "checkpoints").iterdir())[number]
    run(size, in_process, settings(root, "cut", run={"resume": str(chosen)}, **sections))
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
    run(2, in_process, settings(tmp_path, "whole", data=data))
    run(2, in_process, settings(tmp_path, "cut", data=data))
    first = min((tmp_path / "cut" / "checkpoints").iterdir())
    run(2, in_process, settings(tmp_path, "cut", data=data, run={"resume": str(first)}))
    assert torch.equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert told(tmp_path / "cut") == told(tmp_path / "whole")


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2, World())
    assert checkpoints.find("auto") is None
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in (5, 10, 15):
        saved = checkpoints.save(step, model, optimizer, {"number": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000010", "step-0000000015"]
    half = tmp_path / "step-0000000020.partial"  # what a kill in the middle leaves
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    assert checkpoints.find("auto") == saved
    assert checkpoints.load(saved, model, optimizer)["number"] == 15
    begun = tmp_path / "step-0000000025.partial" / "__1_0.distcp"  # what another rank has begun to write already
    begun.parent.mkdir()
    begun.write_bytes(b"rank 1")
    assert (checkpoints.save(25, model, optimizer, {}) / begun.name).read_bytes() == b"rank 1"
    assert not half.exists()


def test_a_checkpoint_of_another_world_is_refused(whole: Path) -> None:
    config = settings(whole.parent, "other", run={"resume": str(max((whole / "checkpoints").iterdir()))})
    with pytest.raises(RankError, match="was written by 2 ranks; start as many"):
        run(3, in_process, config)


def test_a_checkpoint_of_another_policy_is_refused_and_the_run_stays(whole: Path) -> None:
    kept = (whole / "config.toml").read_bytes()
    config = settings(whole.parent, "whole", run={"resume": "auto"})
    with pytest.raises(RankError, match=r"policy\.name = 'constant': the checkpoint is of 'alternating'"):
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


def test_evaluation_counts_every_sample_once_at_any_world_size() -> None:
    results = {size: run(size, counted, 101) for size in (1, 2, 3)}
    alone = results[1][0]
    assert alone.samples == 101
    for result in (result for ranks in results.values() for result in ranks):
        assert result.samples == 101
        assert result.accuracy == alone.accuracy
        assert result.loss == pytest.approx(alone.loss, rel=1e-5)


# ---- faults


class Faulty(nn.Module):
    """Raises on rank 1 in its fourth step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 4:
            raise ArithmeticError("the fourth step of rank 1 went wrong")
        out: torch.Tensor = self.inner(x)
        return out


def faulty_model(num_classes: int, channels: int) -> nn.Module:
    return Faulty()


@pytest.mark.parametrize("policy", ["small", "large"])
def test_one_ranks_exception_ends_all_within_seconds_with_its_message(tmp_path: Path, policy: str) -> None:
    config = settings(tmp_path, "faulty", task={"model": "test_train:faulty_model"}, policy={"first": policy})
    processes = start(config, tmp_path)
    assert processes[1].wait(60) == 1
    began = time.monotonic()
    codes, said = end(processes, timeout_s=20)
    assert time.monotonic() - began < 10
    assert codes == [1, 1], said
    assert "rank 1: ArithmeticError: the fourth step of rank 1 went wrong" in said
    assert re.search(r"rank 0: .+ failed on rank 0 of 2: a peer went away", said), said
    assert said.count("Traceback") == 1 + said.count("The above exception"), "only the rank that failed tells where"


def nan_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.sum() * float("nan")


@pytest.mark.parametrize("first", ["small", "large"])
def test_too_many_bad_losses_end_the_run_on_every_rank(tmp_path: Path, first: str) -> None:
    config = settings(tmp_path, "nan", task={"loss": "test_train:nan_loss"}, policy={"first": first})
    codes, said = end(start(config, tmp_path))
    assert codes == [1, 1]
    assert said.count("no finite loss in") == 2
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_leaves_a_checkpoint_to_go_on_from(whole: Path, number: signal.Signals) -> None:
    root, name = whole.parent, f"stopped-{number.name}"
    processes = start(settings(root, name, checkpoint={"every_samples": 10**6}), root)
    folder, deadline = root / name, time.monotonic() + 60
    # a round's record says that rank 1 has begun to train, and so to heed signals
    while time.monotonic() < deadline and not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    while time.monotonic() < deadline and not any(line["kind"] == "round" for line in whole_lines(folder)):
        time.sleep(0.01)
    processes[1].send_signal(number)
    codes, said = end(processes)
    assert codes == [1, 1]
    assert not (folder / "summary.json").exists()
    assert [line["what"] for line in lines(folder) if line["kind"] == "event"] == ["stopped", "checkpoint"], said
    run(2, in_process, settings(root, name, checkpoint={"every_samples": 10**6}, run={"resume": "auto"}))
    assert json.loads((folder / "summary.json").read_text())["samples"] == 1600


def two_jobs(world: World) -> str:
    try:
        compare_ranks(world, "abc" if world.rank < 2 else "xyz")
    except MismatchError as error:
        return str(error)
    return ""


def test_ranks_of_two_jobs_are_told_apart() -> None:
    said = run(3, two_jobs)
    assert said[0] == said[1] == said[2]
    assert "configuration is abc on ranks 0, 1 but xyz on rank 2" in said[0]


def meshed(world: World) -> tuple[Any, ...]:
    from torch.distributed.device_mesh import DeviceMesh

    mesh = world.mesh
    assert isinstance(mesh, DeviceMesh)
    totals = []
    for dimension in ("node", "local"):
        value = torch.tensor(world.rank)
        torch.distributed.all_reduce(value, group=mesh[dimension].get_group())
        totals.append(value.item())
    return world.node, world.local_rank, *totals


def test_groups_for_node_and_local() -> None:
    places = run(4, meshed, local_size=2)
    assert places == [(0, 0, 0 + 2, 0 + 1), (0, 1, 1 + 3, 0 + 1), (1, 0, 0 + 2, 2 + 3), (1, 1, 1 + 3, 2 + 3)]


def test_a_collective_that_nobody_joins_times_out_and_says_so() -> None:
    with pytest.raises(RankError, match="averaging failed on rank 0 of 2: a peer went away, or did not answer in 5 s"):
        run(2, lonely, timeout_s=60)


def lonely(world: World) -> None:
    from datetime import timedelta

    from trainer.distributed.clock import Clock
    from trainer.distributed.collectives import Collectives

    torch.distributed.barrier()  # that a rank which starts late does not use up the other's time
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=5))
    if world.rank == 1:
        time.sleep(10)
        return
    late = World(rank=0, size=2, timeout_s=WorldConfig(timeout_s=5).timeout_s)
    Collectives(late, Clock(world.device), 2**20).mean_([torch.ones(3)], 0.5)
