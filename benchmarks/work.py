"""The work that every method is measured on: the FedAvg CNN on Fashion-MNIST, the same for all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from trainer.config.config import Config, OptimConfig, RunConfig, StepConfig
from trainer.data import ShardStream, Transform, open_part, shard_of, split_evenly
from trainer.distributed.collectives import Collectives
from trainer.distributed.world import World
from trainer.loop.optimizer import build_optimizer, learning_rate, set_learning_rate
from trainer.loop.step import LocalStep
from trainer.tasks import build_model, loss_function

BATCH, PERIOD, SAMPLES, LR = 32, 16, 118_784, 0.05


@dataclass
class Work:
    """Model, optimizer and data of one rank; `train` is the loop that all methods share."""

    config: Config
    world: World
    model: nn.Module
    loss: nn.Module
    optimizer: torch.optim.Optimizer
    stream: ShardStream

    @classmethod
    def of(cls, world: World, seed: int, lr: float = LR) -> Work:
        """The same initial model on every rank, and this rank's shard."""
        config = Config(run=RunConfig(seed=seed, samples=SAMPLES), optim=OptimConfig(lr=lr))
        part = open_part(config.data, train=True, seed=seed)
        shard = part.subset(shard_of("iid", len(part), world.size, world.rank, seed))
        torch.manual_seed(seed)
        model = build_model(config.task, shard.classes, 1, 28)
        optimizer = build_optimizer(config.optim, model.parameters())
        stream = ShardStream(shard, config.data, world, seed)
        work = cls(config, world, model, loss_function(config.task), optimizer, stream)
        work._warm_up()
        return work

    @property
    def steps(self) -> int:
        """Local steps of the whole work."""
        return SAMPLES // (BATCH * self.world.size)

    def train(
        self, steps: int, model: nn.Module, optimizer: torch.optim.Optimizer, count: Callable[[torch.Tensor], object]
    ) -> None:
        """The first `steps` local steps, by a method's own model, optimizer and counter."""
        for step in range(steps):
            x, y = self.stream.take(BATCH)
            rate = learning_rate(self.config.optim, step * BATCH * self.world.size, SAMPLES)
            set_learning_rate(self.optimizer, rate)
            optimizer.zero_grad()
            loss = self.loss(model(x), y)
            loss.backward()
            optimizer.step()
            count(loss)

    def accuracy(self) -> float:
        """Of the model, on the whole test set."""
        test = open_part(self.config.data, train=False, seed=0)
        transform = Transform.of(test, self.config.data, self.world.device, train=False)
        batches = split_evenly(test, self.world, 500, transform)
        self.model.eval()
        step = LocalStep(StepConfig(), self.config.optim, self.loss, self.world.device)
        return step.evaluate(self.model, batches, Collectives(self.world, None, 2**20)).accuracy

    def _warm_up(self) -> None:
        """Let kernels choose their ways; the stream and the model stay as they were."""
        x, y = self.stream.take(BATCH)
        for _ in range(3):
            self.loss(self.model(x), y).backward()
        self.optimizer.zero_grad()
        self.stream.seek(0)
