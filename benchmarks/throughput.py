"""Samples/s by model, per-rank batch and sync period, with compute, exposed communication and input wait apart.

    torchrun --nproc-per-node=2 -m benchmarks.throughput [--quick] [--models resnet18 vgg11] [--batches 32 256] ...

On any number of ranks, with NCCL where CUDA is, else Gloo. Pictures come from memory; a model, a batch and a period
that do not fit in the device's memory are recorded as such and the rest goes on.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.provenance import provenance
from trainer.cli import guarded
from trainer.config.config import DataConfig, OptimConfig, StepConfig, TaskConfig, WorldConfig
from trainer.config.sync import SyncConfig
from trainer.data import DataPart, ShardStream
from trainer.distributed.world import World, open_world
from trainer.errors import require_at_least, require_choices
from trainer.loop.optimizer import build_optimizer, may_fuse
from trainer.loop.step import LocalStep
from trainer.plan import Plan
from trainer.policies import Constant
from trainer.sync.local_sgd import LocalSGD
from trainer.tasks import build_model, check_model

WARM_UP_ROUNDS = 1


@dataclass(frozen=True)
class Suite:
    """What is measured."""

    models: tuple[str, ...] = ("fedavg_cnn", "resnet18", "vgg11")
    """Models, as in task.model; torchvision's with the small-image stem."""
    batches: tuple[int, ...] = (32, 128)
    """Samples a rank in one local step."""
    periods: tuple[int, ...] = (1, 16)
    """Local steps between two averagings."""
    seconds: float = 10.0
    """Seconds of training that each figure is taken over, at least one round and eight steps."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass."""
    channels_last: bool = False
    """Convolutions in channels-last layout."""
    image_size: int = 32
    """Side of the pictures in pixels."""
    out: str = ""
    """JSON file for the raw figures."""
    quick: bool = False
    """One model, two seconds a figure."""

    def __post_init__(self) -> None:
        require_choices(self)
        require_at_least(self, 1, "image_size")


def main() -> int:
    """Measure every combination, print a row each, write the raw figures."""
    suite = tyro.cli(Suite, prog="python -m benchmarks.throughput", description=__doc__)
    if suite.quick:
        suite = Suite(("fedavg_cnn",), suite.batches, suite.periods, 2.0, image_size=28, out=suite.out)
    for model in suite.models:
        check_model(TaskConfig(model=model))
    with open_world(WorldConfig()) as world:
        rows = []
        for row in measure(suite, world):
            rows.append(row)
            if world.rank == 0:
                print(line(row), flush=True)
        if world.rank == 0 and suite.out:
            told = {"provenance": provenance(), "suite": asdict(suite), "world_size": world.size, "rows": rows}
            Path(suite.out).write_text(json.dumps(told, indent=1) + "\n")
    return 0


def measure(suite: Suite, world: World) -> Iterator[dict[str, Any]]:
    """A row for each combination, the same order on every rank."""
    for name in suite.models:
        task = TaskConfig(model=name, small_image_stem=name != "fedavg_cnn")
        for batch in suite.batches:
            for period in suite.periods:
                torch.manual_seed(0)
                model = build_model(task, classes=10, channels=3, size=suite.image_size)
                yield {"model": name, "batch_per_rank": batch, "sync_period_steps": period} | run(
                    suite, world, model, batch, period
                )


def run(suite: Suite, world: World, model: nn.Module, batch: int, period: int) -> dict[str, Any]:
    """Figures of one combination: rates over all ranks, times as this rank's shares of its training time."""
    pictures = torch.randint(0, 256, (1024, 3, suite.image_size, suite.image_size), dtype=torch.uint8)
    labels = torch.randint(0, 10, (1024,))
    shard = DataPart(TensorDataset(pictures, labels), 10)
    stream = ShardStream(shard, DataConfig(), world, seed=0)
    model = model.to(world.device)
    if suite.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optim = OptimConfig(lr=1e-3)
    options = StepConfig(precision=suite.precision, channels_last=suite.channels_last)
    step = LocalStep(options, optim, nn.CrossEntropyLoss(), world.device)
    optimizer = build_optimizer(optim, model.parameters(), fused=may_fuse(model, step.scaler))
    settings = SyncConfig(observe_steps=4)
    sync = LocalSGD(model, optimizer, Constant(Plan(batch, period)), settings=settings, world=world, scaler=step.scaler)
    before: dict[str, float] = {}
    now: dict[str, float] = {}
    samples, sent, seen = 0, 0.0, 0
    try:
        with sync:
            for inputs, targets in sync.batches(stream, samples=2**60):
                loss, skipped, _ = step(sync, inputs, targets)
                if not sync.step(loss, skipped=skipped):
                    continue
                seen += 1
                now = sync.clock.read()
                if seen == WARM_UP_ROUNDS:
                    before, samples, sent = now, sync.samples, sync.collectives.sent_bytes
                elif sync.stopping:
                    break
                elif now["elapsed_s"] - before["elapsed_s"] > suite.seconds:
                    sync.ask_to_stop()  # all ranks leave at the next observation, whoever is first
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    spent = {name: now[name] - before[name] for name in ("elapsed_s", "compute_s", "sync_wait_s", "input_wait_s")}
    return {
        "world_size": world.size,
        "samples_per_s": (sync.samples - samples) / spent["elapsed_s"],
        "samples_per_s_per_rank": (sync.samples - samples) / spent["elapsed_s"] / world.size,
        "wire_bytes_per_s": (sync.collectives.sent_bytes - sent) / spent["elapsed_s"],
        **spent,
    }


def line(row: dict[str, Any]) -> str:
    """A row as people read it."""
    head = f"{row['model']:<14} batch {row['batch_per_rank']:>5}  period {row['sync_period_steps']:>4}"
    if "error" in row:
        return f"{head}  {row['error']}"
    share = {name: row[f"{name}_s"] / row["elapsed_s"] for name in ("compute", "sync_wait", "input_wait")}
    assert math.isclose(sum(share.values()), 1, abs_tol=1e-6)
    return (
        f"{head}  {row['samples_per_s']:>10,.0f} samples/s  compute {share['compute']:>6.1%}  "
        f"network {share['sync_wait']:>6.1%}  input {share['input_wait']:>6.1%}"
    )


if __name__ == "__main__":
    sys.exit(guarded("benchmarks.throughput", main))
