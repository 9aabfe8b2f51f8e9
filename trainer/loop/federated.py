"""Federated devices of a run: how the data set is shared out to them, and how the model does on each one's own data."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.config.config import Config, DataConfig
from trainer.config.federated import device_plan
from trainer.data import DataPart, DevicePictures, Sharing, held_out, keys_of, labels_of, share_out
from trainer.data.device_data import Request
from trainer.data.partition import Indices
from trainer.distributed.collectives import Collectives
from trainer.errors import ConfigError
from trainer.federated.cohorts import DeviceRound, Fleet
from trainer.federated.devices import Devices
from trainer.federated.profiles import Profile
from trainer.loop.optimizer import build_optimizer, set_learning_rate
from trainer.loop.step import LocalStep
from trainer.sync.local_sgd import LocalSGD


@dataclass(frozen=True)
class Hosted:
    """This rank's devices. Places are those of the rank's own part of the data set."""

    devices: Devices
    """With the samples that each trains with."""
    test: dict[int, Indices]
    """Held out of each."""


def shards_of(config: Config, part: DataPart, ranks: int) -> list[Indices]:
    """The samples of every device, or of every rank where there are no devices.

    Raises:
        ConfigError: one line with the setting and the mend.
    """
    data = config.data
    try:
        sharing = Sharing(
            samples=len(part),
            shards=config.federated.devices or ranks,
            seed=config.run.seed,
            labels=labels_of(part.items),
            keys=keys_of(part.items),
            alpha=data.alpha,
            classes_per_device=data.classes_per_device,
            min_samples=data.min_samples,
            path=data.partition_file,
        )
        return share_out(data.partition, sharing)
    except ConfigError as error:
        known = {each.name for each in fields(DataConfig)}
        raise ConfigError(f"data.{error}" if str(error).partition(" = ")[0] in known else str(error)) from None


def hosted_by(shards: Sequence[Indices], rank: int, ranks: int, config: Config) -> tuple[Indices, Hosted]:
    """The samples of all devices of a rank, and where each device's are among them."""
    places, train, test, count = [], {}, {}, 0
    for device in range(rank, len(shards), ranks):
        chosen, kept = held_out(shards[device], config.data.test_share, config.run.seed, device)
        train[device] = np.arange(count, count + len(chosen))
        test[device] = np.arange(count + len(chosen), count + len(chosen) + len(kept))
        places += [chosen, kept]
        count += len(chosen) + len(kept)
    settings = asdict(config.federated)
    return np.concatenate(places), Hosted(Devices(train, seed=config.run.seed, **settings), test)


def check_fleet(config: Config, shards: Sequence[Indices], parameters: int) -> None:
    """Refuse a profile or a deadline that these devices cannot have.

    Raises:
        ConfigError: one line with the setting and the mend.
    """
    federated, seed = config.federated, config.run.seed
    profile = Profile.of(federated.profile, len(shards), seed)
    trained = (held_out(shard, config.data.test_share, seed, device)[0] for device, shard in enumerate(shards))
    fleet = Fleet(federated, tuple(map(len, trained)), profile, seed, parameters)
    for plan in config.policy.plans():
        fleet.check_deadline(device_plan(plan, federated, config.sync))


def device_figures(devices: DeviceRound) -> dict[str, Any]:
    """A round of devices, as its record holds it."""
    stale = [heard.staleness for heard in devices.heard]
    return {
        "virtual_s": devices.ended_s,
        "reports": len(devices.heard),
        "dropped": list(devices.dropped),
        "staleness": sum(stale) / len(stale) if stale else 0.0,
    }


@dataclass
class DeviceScores:
    """The model on devices' held-out samples, on every rank alike."""

    correct: np.ndarray[Any, np.dtype[np.float64]]
    """Samples classified correctly, by device."""
    counts: np.ndarray[Any, np.dtype[np.float64]]

    @classmethod
    def shared(cls, mine: dict[int, tuple[float, int]], devices: int, via: Collectives) -> DeviceScores:
        """All ranks' devices together; every rank calls it with its own."""
        numbers = [0.0] * (2 * devices)
        for device, (correct, count) in mine.items():
            numbers[device], numbers[devices + device] = float(correct), float(count)
        everyone = np.array(via.sum_numbers(numbers))
        return cls(everyone[:devices], everyone[devices:])

    def figures(self, ever: set[int], prefix: str = "") -> dict[str, Any]:
        """Mean, spread and tails over devices that have samples held out; those that never took part also apart."""
        judged = np.flatnonzero(self.counts)
        if not len(judged):
            return {}
        accuracy = self.correct[judged] / self.counts[judged]
        ordered, tenth = np.sort(accuracy), math.ceil(len(judged) / 10)
        new = [float(value) for device, value in zip(judged.tolist(), accuracy, strict=True) if device not in ever]
        found = {
            "device_accuracy": float(accuracy.mean()),
            "device_accuracy_weighted": float(self.correct.sum() / self.counts.sum()),
            "device_accuracy_std": float(accuracy.std()),
            "worst_tenth_accuracy": float(ordered[:tenth].mean()),
            "best_tenth_accuracy": float(ordered[-tenth:].mean()),
            "device_accuracy_deciles": [float(value) for value in np.quantile(accuracy, np.linspace(0, 1, 11))],
            "new_devices": len(new),
        }
        if new:
            found["new_device_accuracy"] = sum(new) / len(new)
        return {prefix + name: value for name, value in found.items()}


@torch.no_grad()
def judge(model: nn.Module, step: LocalStep, data: DevicePictures, places: Indices, batch: int) -> tuple[float, int]:
    """Samples at these places that the model classifies correctly, and how many there are."""
    correct = 0.0
    for start in range(0, len(places), batch):
        inputs, labels = data.at(places[start : start + batch])
        with step.autocast():
            outputs = model(step.layout(data.transform(inputs)))
        correct += float((outputs.argmax(dim=1) == labels).sum())
    return correct, len(places)


def judge_all(
    hosted: Hosted, model: nn.Module, step: LocalStep, data: DevicePictures, batch: int, via: Collectives
) -> DeviceScores:
    """The model, in evaluation mode, on every device's held-out samples; every rank calls it."""
    mine = {device: judge(model, step, data, places, batch) for device, places in hosted.test.items()}
    return DeviceScores.shared(mine, hosted.devices.config.devices or 0, via)


def judge_tuned(
    hosted: Hosted, sync: LocalSGD, step: LocalStep, data: DevicePictures, config: Config, rate: float
) -> DeviceScores:
    """The same once each device has trained a copy of the consensus model on its own samples; every rank calls it."""
    via, seed = sync.collectives, config.run.seed
    mine = {}
    for device, places in hosted.test.items():
        trial = copy.deepcopy(sync.replica.model)
        optimizer = build_optimizer(config.optim, trial.parameters())
        set_learning_rate(optimizer, rate)
        shard = hosted.devices.shards[device]
        order = np.random.default_rng([seed, 12, device])
        size = min(len(shard), sync.plan.batch_per_rank)
        for number in range(config.federated.finetune_steps):
            chosen = order.choice(shard, size, replace=False)
            inputs, labels = next(data.read([Request(chosen, (seed, 12, device, number))]))
            optimizer.zero_grad(set_to_none=True)
            with step.autocast():
                loss = step.loss(trial(step.layout(inputs)), labels)
            loss.backward()
            optimizer.step()
        trial.eval()
        mine[device] = judge(trial, step, data, places, config.eval.batch)
    return DeviceScores.shared(mine, hosted.devices.config.devices or 0, via)
