"""Measures one case on the ranks of one world."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.throughput.suite import DATA, Case, Suite
from trainer.config.config import DataConfig, OptimConfig, StepConfig, TaskConfig
from trainer.config.sync import SyncConfig
from trainer.data import DataPart, ShardStream, open_part, shard_of
from trainer.distributed.collectives import Collectives
from trainer.distributed.world import World
from trainer.loop.optimizer import build_optimizer, may_fuse
from trainer.loop.step import LocalStep
from trainer.memory import peak_memory_bytes
from trainer.plan import Plan
from trainer.policies import Constant
from trainer.sync.local_sgd import LocalSGD
from trainer.tasks import build_model, loss_function, parameter_count

CLASSES, CHANNELS, PICTURES = 10, 3, 1024
SMALL_PIXELS = 64
"""Pictures up to this side take the small-image stem."""
WARM_UP_ROUNDS = 1
NO_MEMORY = "does not fit in memory"
SPENT = ("elapsed_s", "compute_s", "sync_wait_s", "input_wait_s")


def task_of(suite: Suite, model: str) -> TaskConfig:
    """The trainer's word for a model and its loss."""
    stem = model != "fedavg_cnn" and ":" not in model and suite.image_size <= SMALL_PIXELS
    return TaskConfig(model=model, loss=suite.loss, small_image_stem=stem)


def data_of(suite: Suite, world: World) -> tuple[DataPart, DataConfig]:
    """This rank's shard, and how it is read."""
    if suite.data != DATA:
        config = DataConfig(name=suite.data)
        part = open_part(config, train=True, seed=0)
        return part.subset(shard_of("iid", len(part), world.size, world.rank, 0)), config
    shape = PICTURES, CHANNELS, suite.image_size, suite.image_size
    drawn = torch.Generator().manual_seed(world.rank)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=drawn)
    labels = torch.randint(0, CLASSES, (PICTURES,), generator=drawn)
    return DataPart(TensorDataset(pictures, labels), CLASSES), DataConfig()


@dataclass
class Bench:
    """A model, its data and its step on this rank, ready to train one case."""

    case: Case
    world: World
    model: nn.Module
    stream: ShardStream
    step: LocalStep
    optimizer: torch.optim.Optimizer
    settings: SyncConfig

    @classmethod
    def of(cls, suite: Suite, case: Case, world: World) -> Bench:
        """Build it, the same model on every rank."""
        torch.manual_seed(0)
        shard, config = data_of(suite, world)
        task = task_of(suite, case.model)
        model = build_model(task, shard.classes, CHANNELS, suite.image_size).to(world.device)
        if suite.channels_last:
            model = model.to(memory_format=torch.channels_last)
        optim = OptimConfig(lr=1e-3)
        options = StepConfig(precision=suite.precision, channels_last=suite.channels_last)
        step = LocalStep(options, optim, loss_function(task), world.device)
        optimizer = build_optimizer(optim, model.parameters(), fused=may_fuse(model, step.scaler))
        wire = case.wire_format
        if case.sync_period_steps == 1:
            settings = SyncConfig(observe_steps=4, gradient_format="bf16" if wire == "bf16" else "float32")
        else:
            settings = SyncConfig(observe_steps=4, wire_format=_wire(wire), delay_steps=_delay(suite.delay_steps))
        return cls(case, world, model, ShardStream(shard, config, world, seed=0), step, optimizer, settings)

    def tried(self) -> Bench:
        """This, after a forward and a backward pass without the other ranks: the first to need memory."""
        inputs, labels = self.stream.take(self.case.batch_per_rank)
        with self.step.autocast():
            loss = self.step.loss(self.model(self.step.layout(inputs)), labels)
        loss.backward()
        self.optimizer.zero_grad()
        self.stream.seek(0)
        return self

    def train(self, seconds: float) -> dict[str, float]:
        """Train for so long after a first round; this rank's figures."""
        plan = Constant(Plan(self.case.batch_per_rank, self.case.sync_period_steps))
        sync = LocalSGD(
            self.model, self.optimizer, plan, settings=self.settings, world=self.world, scaler=self.step.scaler
        )
        begin: dict[str, float] = {}
        end: dict[str, float] = {}
        observed = 0
        with sync:
            for inputs, labels in sync.batches(self.stream, samples=2**60):
                trained = self.step(sync, inputs, labels)
                if not sync.step(trained.loss, skipped=trained.skipped):
                    continue
                observed += 1
                end = self._read(sync)
                if observed == WARM_UP_ROUNDS:
                    begin = end
                elif sync.stopping:
                    break
                elif end["elapsed_s"] - begin["elapsed_s"] > seconds:
                    sync.ask_to_stop()  # all ranks leave at the next observation, whoever is first
        return {name: end[name] - begin[name] for name in end}

    @staticmethod
    def _read(sync: LocalSGD) -> dict[str, float]:
        clock = sync.clock.read()
        counts = {"samples": sync.samples, "local_steps": sync.local_step, "sent_bytes": sync.collectives.sent_bytes}
        return {name: clock[name] for name in SPENT} | counts


def measure(suite: Suite, case: Case, world: World) -> dict[str, Any]:
    """All ranks' figures of a case: means, and the largest where a rank is the slowest or the fullest."""
    forget_memory(world)
    via = Collectives(world, None, 2**20)
    bench = _fitting(lambda: Bench.of(suite, case, world).tried(), via)
    if bench is None:
        return {"error": NO_MEMORY}
    mine = bench.train(suite.seconds)
    bench.stream.close()
    return summed_up(mine, parameter_count(bench.model), world, via)


def _fitting(work: Callable[[], Bench], via: Collectives) -> Bench | None:
    """The work's result; None where any rank lacks the memory, so that no rank waits for one that gave up."""
    found: Bench | None = None
    lacks = False
    try:
        found = work()
    except (RuntimeError, MemoryError) as error:
        lacks = is_lack_of_memory(error)
        if not lacks:
            raise
    return None if via.most_numbers([float(lacks)])[0] else found


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory: CUDA, torch's allocator of the CPU, or Python."""
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in said


def summed_up(mine: dict[str, float], parameters: int, world: World, via: Collectives) -> dict[str, Any]:
    """One record of all ranks' figures."""
    means = via.sum_numbers([*mine.values()])
    figures = {name: total / world.size for name, total in zip(mine, means, strict=True)}
    most = via.most_numbers([mine["compute_s"], float(peak_memory_bytes(world.device))])
    steps = figures["local_steps"]
    return {
        "samples_per_s": figures["samples"] / figures["elapsed_s"],
        "step_s": figures["elapsed_s"] / steps,
        "compute_step_s": most[0] / steps,
        "shares": {name.removesuffix("_s"): figures[name] / figures["elapsed_s"] for name in SPENT[1:]},
        "peak_memory_bytes": round(most[1]),
        "sent_bytes_per_step": figures["sent_bytes"] / steps,
        "local_steps": round(steps),
        "elapsed_s": figures["elapsed_s"],
        "parameters": parameters,
    }


def forget_memory(world: World) -> None:
    """Let the next case's peak be its own: what earlier ones freed goes back, and the mark is set down."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(world.device)
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    mark = Path("/proc/self/clear_refs")
    if mark.exists():
        mark.write_text("5")  # proc(5): VmHWM counts from here


def _wire(name: str) -> Any:
    return name


def _delay(steps: int | str) -> Any:
    return steps
