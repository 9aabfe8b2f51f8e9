"""What a configuration means on this rank, before the first step."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import nn

from trainer.config.config import Config, check_ranks
from trainer.data import DataPart, DevicePictures, ShardStream, open_part
from trainer.distributed.launcher import Launch, read_launch
from trainer.distributed.world import World
from trainer.federated.devices import Devices
from trainer.loop.federated import Hosted, check_fleet, hosted_by, shards_of
from trainer.loop.reference import recorded_reference
from trainer.loop.step import LocalStep
from trainer.sync.local_sgd import LocalSGD
from trainer.tasks import build_model, loss_function, parameter_count

AGAIN_S = 2.0
"""A SIGINT sooner after the first is the same one: a terminal sends it to every process, and torchrun passes it on."""


@dataclass(frozen=True)
class Job:
    """What a configuration means on this rank, checked before any process group exists."""

    config: Config
    folder: Path
    shard: DataPart
    test_part: DataPart
    loss: nn.Module
    model: nn.Module
    alone: float | None
    data_samples: int
    """Samples of the whole training set, over all ranks."""
    started_s: float
    """Seconds since the epoch at the job's beginning."""
    hosted: Hosted | None = None
    """The federated devices of this rank, where there are any."""

    @classmethod
    def open(cls, config: Config) -> Job:
        """Open the data and build the model, so that what cannot be is refused here."""
        started_s, launch = time.time(), read_launch() if config.world.elastic is None else Launch()
        check_ranks(config, launch.size)
        seed = config.run.seed
        part = open_part(config.data, train=True, seed=seed)
        test_part = open_part(config.data, train=False, seed=seed)
        shards = shards_of(config, part, launch.size)
        if config.federated.is_on:
            mine, hosted = hosted_by(shards, launch.rank, launch.size, config)
        else:
            mine, hosted = shards[launch.rank], None
        shard = part.subset(mine)
        first = torch.as_tensor(shard.items[0][0])
        channels, size = (first.shape[0], first.shape[-1]) if first.dim() == 3 else (1, first.shape[-1])
        torch.manual_seed(seed)
        model = build_model(config.task, shard.classes, channels, size)
        if config.federated.is_on:
            check_fleet(config, shards, parameter_count(model))
        folder = Path(config.run.root) / config.run.name
        loss = loss_function(config.task)
        alone = recorded_reference(config)
        return cls(config, folder, shard, test_part, loss, model, alone, len(part), started_s, hosted)

    def source(self, stream: ShardStream, world: World) -> tuple[ShardStream | DevicePictures, Devices | None]:
        """Where batches come from: the rank's stream, or its devices' samples."""
        if self.hosted is None:
            return stream, None
        stream.close()
        return DevicePictures(self.shard, self.config.data, world.device), self.hosted.devices

    def build(self, world: World) -> tuple[nn.Module, LocalStep]:
        """The model on this rank's device, and the step that trains it."""
        options = self.config.step
        model = self.model.to(world.device)
        if options.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if options.compile:
            model.compile()
        torch.manual_seed(self.config.run.seed + 1 + world.rank)  # dropout differs between ranks
        return model, LocalStep(options, self.config.optim, self.loss.to(world.device), world.device)


@contextmanager
def stop_signals(sync: LocalSGD) -> Iterator[None]:
    """SIGTERM, SIGUSR1 (a scheduler's notice) and the first SIGINT end the run at the next observation, with a
    checkpoint; another SIGINT ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    asked_at = math.inf

    def heed(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        now = time.monotonic()
        if number == signal.SIGINT and now - asked_at > AGAIN_S:
            raise KeyboardInterrupt
        asked_at = min(asked_at, now)
        sync.ask_to_stop()

    for number in kept:
        signal.signal(number, heed)
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def device_name(device: torch.device) -> str:
    """The device in words, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)} a rank"
