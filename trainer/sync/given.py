"""What LocalSGD is given: refused in one line where it cannot be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.config.sync import SyncConfig
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.federated.devices import Devices


def check_kinds(model: Any, optimizer: Any, world: Any, scaler: Any, devices: Any) -> None:
    """Refuse arguments of another kind, in one line.

    Raises:
        ConfigError: names the argument, its kind and what is meant.
    """
    wanted: tuple[tuple[str, Any, Any, str], ...] = (
        ("model", model, nn.Module, "a torch.nn.Module"),
        ("optimizer", optimizer, Optimizer, "a torch.optim.Optimizer over the model's parameters"),
        ("world", world, World | None, "a World, or left out"),
        ("scaler", scaler, torch.amp.GradScaler | None, "a torch.amp.GradScaler, or left out"),
        ("devices", devices, Devices | None, "Devices(shards, ...), or left out"),
    )
    for name, given, kind, mend in wanted:
        if not isinstance(given, kind):
            raise ConfigError(f"{name} is a {type(given).__name__}: must be {mend}")


def check_elastic(settings: SyncConfig, devices: Devices | None) -> None:
    """Refuse what a world whose ranks come and go cannot have.

    Raises:
        ConfigError: names the setting.
    """
    for name, given, least in (
        ("node_period_steps", settings.node_period_steps, None),
        ("ranks_per_node", settings.ranks_per_node, None),
        ("devices", devices and f"{devices.config.devices} devices", None),
        ("gradient_format", settings.gradient_format if settings.gradient_format == "powersgd" else None, None),
    ):
        if given is not least:
            raise ConfigError(f"{name} = {given}: not where ranks come and go; leave it out, or use a fixed world")


def check_optimizer(optimizer: Optimizer, *, averages_gradients: bool) -> None:
    """Refuse what replicas cannot stay one with.

    Raises:
        ConfigError: a line search, which compares losses that are each rank's own.
    """
    searches = [group for group in optimizer.param_groups if group.get("line_search_fn") is not None]
    if averages_gradients and searches:
        raise ConfigError(
            f"optimizer has line_search_fn = {searches[0]['line_search_fn']!r}: ranks would search differently at "
            "period 1; set it to None, or choose a policy without period 1"
        )


def differing_settings(everyone: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """The first setting in which ranks' optimizers differ, in one line."""
    for number, group in enumerate(everyone[0]):
        for name in group:
            values = [groups[number].get(name) if number < len(groups) else "no such group" for groups in everyone]
            if len({repr(value) for value in values}) > 1:
                sides = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
                what = "learning rate" if name == "lr" else f"optimizer setting {name!r}"
                return f"the {what} of group {number} is {sides}: at period 1 replicas must stay one; set one value"
    return "optimizer settings differ between ranks: at period 1 replicas must stay one; set the same on all"


def one_number(loss: Any) -> torch.Tensor:
    """The mean loss as a 0-dim tensor."""
    if not torch.is_tensor(loss):
        try:
            return torch.tensor(float(loss), dtype=torch.float32)
        except (TypeError, ValueError):
            raise ConfigError(f"loss = {loss!r}: must be the batch's mean loss, one number or a 0-dim tensor") from None
    if loss.numel() != 1 or loss.is_complex():
        raise ConfigError(f"loss is a tensor of shape {tuple(loss.shape)}: must be the batch's mean loss, one number")
    return loss.detach().reshape(())
