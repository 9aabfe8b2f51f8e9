"""One rank alone at the small batch: what scaling speedup is measured against."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import torch
from torch import nn

from trainer.config.config import Config
from trainer.config.sync import SyncConfig
from trainer.data import ShardStream
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.loop.optimizer import build_optimizer, may_fuse
from trainer.loop.step import LocalStep
from trainer.policies import Constant
from trainer.sync.local_sgd import LocalSGD

WARM_UP_STEPS = 10


def recorded_reference(config: Config) -> float | None:
    """samples_per_s of the run that `run.reference` names; None where none is named.

    Raises:
        ConfigError: no summary there, or one of several ranks.
    """
    if config.run.reference is None:
        return None
    path = Path(config.run.reference) / "summary.json"
    try:
        summary = json.loads(path.read_text())
        rate, ranks = float(summary["samples_per_s"]), int(summary["world_size"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"run.reference = {config.run.reference!r}: holds no finished run ({error})") from error
    if ranks != 1:
        raise ConfigError(
            f"run.reference = {config.run.reference!r}: is of {ranks} ranks; name a run of one rank alone"
        )
    return rate


def measure_alone(config: Config, loss: nn.Module, model: nn.Module, stream: ShardStream, world: World) -> float | None:
    """Samples a second of rank 0 alone at the policy's base batch, on a copy of the model; others return None.

    Only rank 0 works: the caller lets the others wait. Nothing of the run is moved: not the model, not the stream's
    place, not the random state.
    """
    if world.rank != 0 or config.record.reference_s == 0:
        return None
    trial = copy.deepcopy(model)
    step = LocalStep(config.step, config.optim, loss, world.device)
    optimizer = build_optimizer(config.optim, trial.parameters(), fused=may_fuse(trial, step.scaler))
    place = stream.consumed
    plan = Constant(config.policy.base_plan())
    devices = [world.device] if world.device.type == "cuda" else []
    solo = World(device=world.device)
    # nothing is averaged, and what the policy's other plans allow may not fit this one
    settings = SyncConfig(observe_steps=config.sync.observe_steps)
    with torch.random.fork_rng(devices), LocalSGD(trial, optimizer, plan, world=solo, settings=settings) as sync:
        seconds, samples, began = 0.0, 0, 0.0
        for inputs, labels in sync.batches(stream, samples=2**62):
            trained = step(sync, inputs, labels)
            sync.step(trained.loss, skipped=trained.skipped)
            if sync.local_step == WARM_UP_STEPS:
                began, samples = _now(world), sync.samples
            seconds = _now(world) - began if sync.local_step % WARM_UP_STEPS == 0 else 0.0
            if sync.local_step > WARM_UP_STEPS and seconds > config.record.reference_s:
                break
        rate = (sync.samples - samples) / seconds
    stream.seek(place)
    return rate


def _now(world: World) -> float:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
