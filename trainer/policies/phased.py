"""Policies of phases, laid down beforehand or ended by what is seen: constant, alternating, post-local, SWAP, cycle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from trainer.errors import ConfigError, require, require_at_least
from trainer.fields import build
from trainer.plan import Decision, Memory, Observation, Plan
from trainer.policies.base import Length, LrScaling, Policy, held, register, require_length, samples_of


@register("constant")
@dataclass(frozen=True, init=False)
class Constant(Policy):
    """One Plan for the whole run: local SGD, or data-parallel training at period 1.

    `Constant(16, 4)`, `Constant(batch_per_rank=16, sync_period_steps=4)` and `Constant(Plan(16, 4))` mean the same.
    """

    plan: Annotated[Plan, tyro.conf.arg(name="")] = field(default=Plan(), metadata={"flat": True})
    """The Plan; recipes and flags write its fields as the policy's own."""

    def __init__(
        self,
        plan: Plan | int | None = None,
        sync_period_steps: int | None = None,
        *,
        lr_scaling: LrScaling = "none",
        lr_ramp_samples: int = 5_000,
        **of_plan: Any,
    ) -> None:
        if sync_period_steps is not None:
            of_plan["sync_period_steps"] = sync_period_steps
        whole = isinstance(plan, Plan | tuple | list | Mapping)
        if whole or (plan is not None and "batch_per_rank" in of_plan):
            require("plan", plan, not of_plan, f"give {' and '.join(of_plan)} inside it, or leave it out")
        else:
            of_plan |= {} if plan is None else {"batch_per_rank": plan}
            plan = build(Plan, of_plan)
        values = {"plan": plan, "lr_scaling": lr_scaling, "lr_ramp_samples": lr_ramp_samples}
        for name, value in values.items():
            object.__setattr__(self, name, value)  # frozen
        self.__post_init__()

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        return Decision(self.plan, "constant")

    def plans(self) -> tuple[Plan, ...]:
        return (self.plan,)


@register("alternating")
@dataclass(frozen=True)
class Alternating(Policy):
    """Small-batch phases (small b, H > 1) and large-batch phases (large b, H = 1) in turn.

    Lengths are counted over all ranks and rounded up to a round's end.
    """

    small: Plan = Plan(32, sync_period_steps=16)
    """The small-batch Plan."""
    large: Plan = Plan(256, sync_period_steps=1)
    """The large-batch Plan."""
    samples_per_phase: Length | None = None
    """Length of a phase in samples, or as a share of the run such as 0.25; 50,000 where no length is given."""
    rounds_per_phase: int | None = None
    """Length of a phase in rounds, instead of samples."""
    steps_per_phase: int | None = None
    """Length of a phase in local steps, instead of samples."""
    large_length: Length | None = None
    """Length of a large-batch phase in the same unit, where it differs from a small-batch phase's."""
    cycles: int | None = None
    """Pairs of phases; without it they alternate to the end of the run."""
    first: Literal["small", "large"] = "small"
    """Which phase comes first."""
    last: Literal["small", "large"] | None = None
    """The phase that goes on to the end of the run after `cycles` pairs; without it, the second of a pair does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = {name: getattr(self, name) for name in ("samples_per_phase", "rounds_per_phase", "steps_per_phase")}
        given = {name: length for name, length in lengths.items() if length is not None}
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} = {list(given.values())}: give the length of a phase in one unit")
        require_at_least(self, 1, "rounds_per_phase", "steps_per_phase", "cycles")
        require_length(self, "samples_per_phase", "large_length")
        share = self.large_length is not None and self.large_length < 1
        counted = set(given) <= {"samples_per_phase"}
        require("large_length", self.large_length, not share or counted, "a share goes with samples_per_phase")
        require("last", self.last, self.last is None or self.cycles is not None, "needs policy.cycles before it")
        _require_small_below_large(self.small, self.large)

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        unit, length = self._length()
        index = max(seen.phase, 0)
        if self._name(index) == "large" and self.large_length is not None:
            length = self.large_length
        if length < 1 and seen.phase >= 0:
            if seen.missing("progress"):
                return held(seen, memory, "progress")
            length = samples_of(length, seen)
        reached = getattr(seen, f"phase_{unit}")
        if seen.phase >= 0 and reached >= length:
            index += 1
        name = self._name(index)
        plan = self.small if name == "small" else self.large
        return Decision(plan, name, {f"phase_{unit}": reached, f"{unit}_per_phase": length})

    def plans(self) -> tuple[Plan, ...]:
        return (self.small, self.large)

    def second_phase_at(self, ranks: int) -> Length | None:
        unit, length = self._length()
        if self.first == "large" and self.large_length is not None:
            length = self.large_length
        plan = self.small if self.first == "small" else self.large
        step = plan.batch_per_rank * ranks
        return length * {"samples": 1, "steps": step, "rounds": step * max(plan.sync_period_steps, 1)}[unit]

    def _length(self) -> tuple[str, Length]:
        if self.rounds_per_phase is not None:
            return "rounds", self.rounds_per_phase
        if self.steps_per_phase is not None:
            return "steps", self.steps_per_phase
        return "samples", self.samples_per_phase or 50_000

    def _name(self, index: int) -> str:
        other = "large" if self.first == "small" else "small"
        if self.cycles is not None and index >= 2 * self.cycles:
            return self.last or other
        return self.first if index % 2 == 0 else other


@register("post_local")
@dataclass(frozen=True)
class PostLocal(Policy):
    """Post-local SGD (Lin et al. 2020, arXiv 1808.07217): averaged gradients up to a point, local SGD after it."""

    large: Plan = Plan(128, sync_period_steps=1)
    """The Plan before the switch."""
    local: Plan = Plan(128, sync_period_steps=16)
    """The Plan after the switch."""
    switch_samples: Length = 100_000
    """Samples (over all ranks), or share of the run, after which the switch comes; the paper puts it at the first drop
    of the rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_length(self, "switch_samples")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        switch = self.switch_samples
        if switch < 1 and seen.phase >= 0:
            if seen.missing("progress"):
                return held(seen, memory, "progress")
            switch = samples_of(switch, seen)
        why = {"samples": seen.samples, "switch_samples": switch}
        if seen.samples >= switch:
            return Decision(self.local, "local", why)
        return Decision(self.large, "large", why)

    def second_phase_at(self, ranks: int) -> Length | None:
        return self.switch_samples

    def plans(self) -> tuple[Plan, ...]:
        return (self.large, self.local)


@register("swap")
@dataclass(frozen=True)
class SWAP(Policy):
    """Stochastic Weight Averaging in Parallel (Gupta et al. 2020, arXiv 2001.02312).

    Averaged large-batch gradients until the training accuracy reaches a threshold; then every rank trains small batches
    alone to the end, and the replicas are averaged once. BatchNorm statistics want `sync.batch_norm = recalibrate`.
    """

    large: Plan = Plan(256, sync_period_steps=1)
    """The Plan before the threshold."""
    alone: Plan = Plan(32, sync_period_steps=0)
    """The Plan after it: period 0 averages only at the end."""
    train_accuracy: float = 0.9
    """τ: share of the training samples classified rightly, smoothed over observations, that ends the first phase."""
    last_samples: Length | None = None
    """Samples (over all ranks), or share of the run, after which the second phase begins whatever the accuracy is."""
    smoothing: float = 0.9
    """Weight of the past in the smoothed accuracy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("train_accuracy", self.train_accuracy, 0 < self.train_accuracy <= 1, "must be above 0 and at most 1")
        require("smoothing", self.smoothing, 0 <= self.smoothing < 1, "must be in 0 .. 1")
        require_length(self, "last_samples")
        period = self.alone.sync_period_steps
        require("alone.sync_period_steps", period, period == 0, "must be 0: replicas are averaged at the end")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        if seen.phase_name == "alone":
            return Decision(self.alone, "alone")
        late = self.last_samples is not None and seen.samples >= samples_of(self.last_samples, seen)
        if seen.phase >= 0 and not late and seen.missing("train_accuracy"):
            return held(seen, memory, "train_accuracy")
        total, weight = memory.get("total", 0.0), memory.get("weight", 0.0)
        if not seen.missing("train_accuracy"):
            total = self.smoothing * total + (1 - self.smoothing) * seen.train_accuracy
            weight = self.smoothing * weight + 1 - self.smoothing
        reached = total / weight if weight else 0.0
        why = {"train_accuracy": reached, "threshold": self.train_accuracy}
        if late or reached >= self.train_accuracy:
            return Decision(self.alone, "alone", why)
        return Decision(self.large, "large", why, {"total": total, "weight": weight})

    def plans(self) -> tuple[Plan, ...]:
        return (self.large, self.alone)


@register("cycle")
@dataclass(frozen=True)
class Cycle(Policy):
    """Small- and large-batch phases in turn, each until the training loss stops falling."""

    small: Plan = Plan(32, sync_period_steps=16)
    """The small-batch Plan."""
    large: Plan = Plan(256, sync_period_steps=1)
    """The large-batch Plan."""
    flat: float = 0.01
    """A phase ends when the loss falls by less than this share of itself over the latest 16 observations."""
    min_samples: Length = 5_000
    """Shortest phase, in samples over all ranks or as a share of the run."""
    first: Literal["small", "large"] = "small"
    """Which phase comes first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("flat", self.flat, self.flat > 0, "must be above 0")
        require_length(self, "min_samples")
        _require_small_below_large(self.small, self.large)

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        name = seen.phase_name or self.first
        plans = {"small": self.small, "large": self.large}
        if seen.phase < 0:
            return Decision(plans[name], name)
        if missing := seen.missing("loss_trend", "train_loss"):
            return held(seen, memory, *missing)
        fall = -seen.loss_trend * seen.loss_window / seen.train_loss if seen.train_loss > 0 else 0.0
        if self.min_samples < 1 and seen.missing("progress"):
            return held(seen, memory, "progress")
        shortest = samples_of(self.min_samples, seen)
        settled = seen.phase_samples >= max(shortest, seen.loss_window)  # the window lies in this phase
        if settled and fall < self.flat:
            name = "large" if name == "small" else "small"
        return Decision(plans[name], name, {"fall": fall, "flat": self.flat, "phase_samples": seen.phase_samples})

    def plans(self) -> tuple[Plan, ...]:
        return (self.small, self.large)

    def second_phase_at(self, ranks: int) -> Length | None:
        return self.min_samples


def _require_small_below_large(small: Plan, large: Plan) -> None:
    """Refuse two Plans in each other's place."""
    fits, most = small.batch_per_rank <= large.batch_per_rank, large.batch_per_rank
    require("small.batch_per_rank", small.batch_per_rank, fits, f"is above the large Plan's ({most}): swap the two")
