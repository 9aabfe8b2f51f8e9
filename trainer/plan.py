"""The values that policies read and return: an Observation in, a Decision with its Plan out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import require


@dataclass(frozen=True)
class Plan:
    """What the next round does."""

    batch_per_rank: int = 32
    """Samples a rank trains in one local step."""
    sync_period_steps: int = 16
    """Local steps between two averagings; 1 averages the gradients of every step."""
    lr_scale: float = 1.0
    """Factor on the scheduled learning rate, besides the policy's `lr_scaling`."""

    def __post_init__(self) -> None:
        require("batch_per_rank", self.batch_per_rank, self.batch_per_rank >= 1, "must be at least 1 sample")
        require("sync_period_steps", self.sync_period_steps, self.sync_period_steps >= 1, "must be at least 1 step")
        usable = self.lr_scale > 0 and math.isfinite(self.lr_scale)
        require("lr_scale", self.lr_scale, usable, "must be a positive number")


@dataclass(frozen=True)
class Observation:
    """What all ranks know at a round's end: every number is reduced over the ranks, so it is the same on each.

    Counts start at zero; a figure that was not measured is NaN.
    """

    round: int = 0
    """Rounds ended so far."""
    local_step: int = 0
    """Local steps so far (the same on every rank)."""
    samples: int = 0
    """Samples trained so far, over all ranks."""
    phase: int = -1
    """Number of the current phase, from 0; -1 before the first."""
    phase_rounds: int = 0
    """Rounds of the current phase."""
    phase_steps: int = 0
    """Local steps of the current phase."""
    phase_samples: int = 0
    """Samples of the current phase, over all ranks."""
    train_loss: float = math.nan
    """Mean training loss over the samples since the last observation."""
    compute_s: float = math.nan
    """Seconds of compute since the last observation, mean over the ranks."""
    sync_wait_s: float = math.nan
    """Seconds that the training thread waited for the network since the last observation, mean over the ranks."""
    transfer_s: float = math.nan
    """Seconds from sending a replica to having its average, the most of any rank, at the averaging before this one."""
    divergence: float = math.nan
    """Mean squared distance of the replicas from their mean at the round's end, weighted by samples."""
    skipped_steps: int = 0
    """Local steps skipped for a non-finite loss since the last observation, over all ranks."""
    test_accuracy: float = math.nan
    """The latest evaluation's accuracy, as a fraction."""


Memory = Mapping[str, Any]
"""What a policy carries from one decision to the next: JSON values only, so that a checkpoint can hold it."""


@dataclass(frozen=True)
class Decision:
    """A Plan, the name of the phase it belongs to, and the numbers that decided it."""

    plan: Plan
    phase: str
    why: Mapping[str, float] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)
