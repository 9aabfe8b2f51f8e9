"""Policies that move the period: QSR, AdaComm, and rounds that a signal ends (SelSync, FDA)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from trainer.errors import require, require_at_least
from trainer.plan import Decision, EarlyEnd, Memory, Observation, Plan
from trainer.policies.base import Policy, held, register


@register("qsr")
@dataclass(frozen=True)
class QSR(Policy):
    """The Quadratic Synchronization Rule (Gu et al. 2024, arXiv 2310.14423): H = max(H_base, ⌊(α / η)²⌋).

    η is the rate of the last local step, so a round's period follows the rate that it begins with. While the rate
    rises above what it ever was, in a warm-up, the period is H_base.
    """

    batch_per_rank: int = 32
    """Samples a rank trains in one local step."""
    base_period_steps: int = 4
    """H_base: the period while the rate is high."""
    growth: float = 0.1
    """α: the rate times the square root of the period, once the period grows. Tuned as a learning rate is."""
    max_period_steps: int = 256
    """Longest period; the paper has none, but a rate that ends at zero would never average again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "batch_per_rank", "base_period_steps")
        require("growth", self.growth, self.growth > 0, "must be above 0")
        low = self.base_period_steps
        require("max_period_steps", self.max_period_steps, self.max_period_steps >= low, f"must be at least {low}")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        if seen.phase < 0:
            return Decision(self._plan(self.base_period_steps), f"period {self.base_period_steps}")
        if not seen.lr > 0:
            return held(seen, memory, "lr")
        ratio = self.growth / max(seen.lr, 1e-6 * self.growth)
        period = min(max(self.base_period_steps, math.floor(ratio**2)), self.max_period_steps)
        if seen.lr > memory.get("lr", 0.0):
            period = self.base_period_steps
        why = {"lr": seen.lr, "growth": self.growth}
        return Decision(self._plan(period), f"period {period}", why, {"lr": max(seen.lr, memory.get("lr", 0.0))})

    def plans(self) -> tuple[Plan, ...]:
        return (self._plan(self.base_period_steps), self._plan(self.max_period_steps))

    def _plan(self, period: int) -> Plan:
        return Plan(self.batch_per_rank, sync_period_steps=period)


@register("adaptive_period")
@dataclass(frozen=True)
class AdaptivePeriod(Policy):
    """AdaComm (Wang and Joshi 2019, arXiv 1810.08313): the period falls as the square root of the loss.

    At every interval τ = ⌈√(F / F₀) τ₀⌉; where that is not below the last τ, τ is multiplied by `shrink` (their γ), so
    that a loss that stops falling ends in frequent averaging. The paper's intervals are in seconds, ours in samples.
    """

    plan: Plan = Plan(32, sync_period_steps=32)
    """The first Plan; its period is τ₀."""
    interval_samples: int = 10_000
    """Samples (over all ranks) between two decisions."""
    shrink: float = 0.5
    """γ: factor on the period where the rule does not lower it; it falls by a step at least."""
    min_period_steps: int = 1
    """Shortest period."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "interval_samples", "min_period_steps")
        require("shrink", self.shrink, 0 < self.shrink < 1, "must be above 0 and below 1")
        low, first = self.min_period_steps, self.plan.sync_period_steps
        require("plan.sync_period_steps", first, first >= max(2, low), f"must be at least {max(2, low)} steps")
        delay = self.plan.delay_steps
        fits = not isinstance(delay, int) or delay <= low
        require("min_period_steps", low, fits, f"must be at least policy.plan.delay_steps ({delay})")
        replace(self.plan, sync_period_steps=low)  # refuses what else the shortest period cannot hold

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        if seen.phase < 0:
            return Decision(self.plan, self._name(self.plan), memory={"next": self.interval_samples})
        if not seen.train_loss > 0:
            return held(seen, memory, "train_loss")
        first = memory.get("first", seen.train_loss)
        kept = {"first": first, "next": memory["next"]}
        if seen.samples < memory["next"]:
            return Decision(seen.plan, self._name(seen.plan), memory=kept)
        kept["next"] = (seen.samples // self.interval_samples + 1) * self.interval_samples
        before = seen.plan.sync_period_steps
        rule = math.sqrt(seen.train_loss / first) * self.plan.sync_period_steps
        period = math.ceil(rule) if rule <= before - 1 else min(math.ceil(self.shrink * before), before - 1)
        plan = replace(self.plan, sync_period_steps=max(self.min_period_steps, period))
        why = {"train_loss": seen.train_loss, "first_loss": first, "rule": rule}
        return Decision(plan, self._name(plan), why, kept)

    def plans(self) -> tuple[Plan, ...]:
        return (self.plan,)

    def _name(self, plan: Plan) -> str:
        return f"period {plan.sync_period_steps}"


@dataclass(frozen=True, kw_only=True)
class _Signalled(Policy):
    """Rounds that a signal ends."""

    batch_per_rank: int = 32
    """Samples a rank trains in one local step."""
    max_period_steps: int = 256
    """Longest round, so that ranks hear of one another."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "batch_per_rank")
        require_at_least(self, 2, "max_period_steps")

    def _until(self, signal: EarlyEnd, above: float) -> Plan:
        return Plan(self.batch_per_rank, self.max_period_steps, delay_steps=0, early_end=signal, early_end_above=above)

    def _told(self, name: str, figure: str, seen: Observation) -> Decision:
        """The one Plan, with the figure where it was measured."""
        why = {} if seen.missing(figure) else {figure: getattr(seen, figure)}
        return Decision(self.plans()[0], name, why | {"steps": seen.steps})


@register("selsync")
@dataclass(frozen=True, kw_only=True)
class SelSync(_Signalled):
    """SelSync (Tyagi and Swany 2023, arXiv 2307.07950): average when gradients change.

    A round ends at the first local step where, on any rank, the gradient's norm changes from step to step by at least
    `change` of itself, smoothed over 25 steps. Parameters are averaged, as the paper found best.
    """

    change: float = 0.3
    """δ: the relative change that ends a round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("change", self.change, self.change > 0, "must be above 0")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        return self._told("selective", "grad_change", seen)

    def plans(self) -> tuple[Plan, ...]:
        return (self._until("gradient_change", self.change),)


@register("fda")
@dataclass(frozen=True, kw_only=True)
class FDA(_Signalled):
    """Federated Dynamic Averaging (arXiv 2405.20988), its linear variant: average when replicas have moved apart.

    A round ends at the first local step where an upper estimate of the replicas' variance, mean ‖u_k‖² − ‖mean u_k‖²
    with u_k the move since the last averaging, is above `threshold`.
    """

    threshold: float = 1.0
    """Θ: a squared distance; it grows with the model (350 to 400 for the paper's DenseNet-121)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require("threshold", self.threshold, self.threshold > 0, "must be above 0")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        return self._told("dynamic", "divergence", seen)

    def plans(self) -> tuple[Plan, ...]:
        return (self._until("divergence", self.threshold),)
