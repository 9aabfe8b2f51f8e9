"""Policies that move the batch: growth in place of decay, the noise scale, and the norm test."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trainer.errors import require, require_at_least
from trainer.plan import Decision, Memory, Observation, Plan
from trainer.policies.base import Policy, held, register


@register("batch_growth")
@dataclass(frozen=True)
class BatchGrowth(Policy):
    """Raise the batch instead of decaying the rate (Smith et al. 2018, arXiv 1711.00489).

    At each milestone the batch is multiplied by `factor` and the rate kept; once the batch may grow no further the rate
    is divided instead, so that rate / batch falls as it would under the decay. Meant for a constant schedule.
    """

    plan: Plan = Plan(32, sync_period_steps=16)
    """The first Plan."""
    milestones: tuple[int, ...] = (60_000, 90_000)
    """Samples (over all ranks) at which a decay would come."""
    factor: float = 5.0
    """Number that the decay would divide the rate by."""
    max_batch_per_rank: int = 512
    """Largest batch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rise = bool(self.milestones) and list(self.milestones) == sorted(set(self.milestones))
        require("milestones", self.milestones, rise and self.milestones[0] >= 1, "must be above 0 and rise")
        require("factor", self.factor, self.factor > 1, "must be above 1")
        low = self.plan.batch_per_rank
        require("max_batch_per_rank", self.max_batch_per_rank, self.max_batch_per_rank >= low, f"must be {low} or more")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        passed = sum(seen.samples >= milestone for milestone in self.milestones)
        growth = self.factor**passed
        batch = min(round(self.plan.batch_per_rank * growth), self.max_batch_per_rank)
        left = growth / (batch / self.plan.batch_per_rank)  # what the batch could not take
        scale = 1.0 if batch < self.max_batch_per_rank else min(1.0, 1 / left)
        plan = replace(self.plan, batch_per_rank=batch, lr_scale=self.plan.lr_scale * scale)
        return Decision(plan, f"growth {passed}", {"samples": seen.samples, "milestones_passed": passed})

    def plans(self) -> tuple[Plan, ...]:
        return (self.plan,)


@dataclass(frozen=True, kw_only=True)
class _Measured(Policy):
    """The batch follows something measured, with hysteresis."""

    plan: Plan = Plan(32, sync_period_steps=16)
    """The first Plan; its batch is the smallest."""
    max_batch_per_rank: int = 512
    """Largest batch."""
    multiple: int = 8
    """The batch is a multiple of it."""
    dead_band: float = 0.25
    """Relative change of the batch that is worth a change of Plan."""
    min_stay_rounds: int = 4
    """Rounds of a phase before the next may begin."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "multiple", "min_stay_rounds")
        require("dead_band", self.dead_band, self.dead_band >= 0, "must be 0 or more")
        low = self.plan.batch_per_rank
        require("max_batch_per_rank", self.max_batch_per_rank, self.max_batch_per_rank >= low, f"must be {low} or more")

    def plans(self) -> tuple[Plan, ...]:
        return (self.plan,)

    def _towards(self, seen: Observation, wanted: float, why: dict[str, float], *, only_up: bool) -> Decision:
        low, high = self.plan.batch_per_rank, self.max_batch_per_rank
        now = seen.plan.batch_per_rank
        batch = min(max(math.ceil(min(wanted, high) / self.multiple) * self.multiple, low), high)
        worth = abs(batch - now) > self.dead_band * now and seen.phase_rounds >= self.min_stay_rounds
        if not worth or (only_up and batch < now):
            batch = now
        return Decision(replace(self.plan, batch_per_rank=batch), f"batch {batch}", why)


@register("noise_scale")
@dataclass(frozen=True, kw_only=True)
class NoiseScale(_Measured):
    """The batch follows the gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162, eq. 2.9).

    The batch of one step over all ranks is `share` times B_simple = tr Σ / ‖G‖²: at 1 a step is half as much worth as
    one without noise, and a sample half as much as one of a small batch.
    """

    share: float = 1.0
    """Of the noise scale."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("share", self.share, self.share > 0, "must be above 0")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        if seen.phase < 0:
            return Decision(self.plan, f"batch {self.plan.batch_per_rank}")
        if not seen.noise_scale > 0:
            return held(seen, memory, "noise_scale")
        wanted = self.share * seen.noise_scale / max(seen.ranks, 1)
        return self._towards(seen, wanted, {"noise_scale": seen.noise_scale, "wanted": wanted}, only_up=False)


@register("norm_test")
@dataclass(frozen=True, kw_only=True)
class NormTest(_Measured):
    """The approximate norm test for local gradient methods (Lau et al. 2024, arXiv 2406.13936, after Byrd et al. 2012).

    The variance of a rank's gradient may be at most ϑ² times the gradient's squared norm: where tr Σ / b is more, the
    rank's batch grows to tr Σ / (ϑ² ‖G‖²). It never shrinks.
    """

    tolerance: float = 1.0
    """ϑ: smaller asks for larger batches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("tolerance", self.tolerance, self.tolerance > 0, "must be above 0")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        if seen.phase < 0:
            return Decision(self.plan, f"batch {self.plan.batch_per_rank}")
        if not seen.grad_sq_norm > 0 or not seen.grad_variance > 0:
            return held(seen, memory, *(seen.missing("grad_sq_norm", "grad_variance") or ["grad_sq_norm"]))
        wanted = seen.grad_variance / (self.tolerance**2 * seen.grad_sq_norm)
        why = {"grad_variance": seen.grad_variance, "grad_sq_norm": seen.grad_sq_norm, "wanted": wanted}
        return self._towards(seen, wanted, why, only_up=True)
