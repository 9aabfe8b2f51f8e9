"""The local optimizer and its learning rate, a pure function of the samples trained."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable

import torch
from torch import nn

from trainer.config.config import OptimConfig


def build_optimizer(
    config: OptimConfig, parameters: Iterable[torch.Tensor], *, fused: bool = False
) -> torch.optim.Optimizer:
    """The optimizer over the trained parameters.

    Args:
        config: which, and its constants.
        parameters: of which those that need a gradient are trained.
        fused: by torch's kernels that read and write everything once, where they `may_fuse`.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if config.name == "adamw":
        return torch.optim.AdamW(
            trained, config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=fused
        )
    return torch.optim.SGD(
        trained,
        config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=fused,
    )


def may_fuse(model: nn.Module, scaler: torch.amp.GradScaler) -> bool:
    """Whether torch's fused kernels can update this model: they know no sparse gradients, and do a loss scaler's work
    themselves, after the gradients were looked at."""
    return not scaler.is_enabled() and not any(getattr(module, "sparse", False) for module in model.modules())


def learning_rate(config: OptimConfig, samples: int, total: int) -> float:
    """The scheduled rate after `samples` of `total` (over all ranks): linear warm-up, then the schedule."""
    if samples < config.warmup_samples:
        return config.lr * (samples + 1) / config.warmup_samples
    if config.schedule == "step":
        return config.lr * config.decay ** bisect.bisect_right(config.milestones, samples)
    if config.schedule == "cosine":
        share = (samples - config.warmup_samples) / max(1, total - config.warmup_samples)
        return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.lr


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
