"""A rule for the batch with a rule for the period."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.errors import require
from trainer.plan import Decision, Memory, Observation, Plan
from trainer.policies.autopilot import Autopilot
from trainer.policies.base import Policy, policy_name, policy_of, register
from trainer.policies.batches import NoiseScale
from trainer.policies.periods import QSR


@register("compose")
@dataclass(frozen=True)
class Compose(Policy):
    """The batch and the rate of one policy, the period (and how a round ends) of another."""

    batch: Policy = NoiseScale()
    """The policy whose batch and rate are taken."""
    period: Policy = QSR()
    """The policy whose period, delay, wire format and early end are taken."""

    def __post_init__(self) -> None:
        for name in ("batch", "period"):
            object.__setattr__(self, name, policy_of(getattr(self, name), name))
        super().__post_init__()
        for name, policy in (("batch", self.batch), ("period", self.period)):
            rule = policy.lr_scaling
            alone = "chooses batch and period by what both cost: use it alone, as policy.name"
            require(name, policy_name(policy), not isinstance(policy, Autopilot), alone)
            require(f"{name}.lr_scaling", rule, rule == "none", "has no effect there: set policy.lr_scaling")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        batch, of_batch = _ask(self.batch, seen, memory.get("batch", {}))
        period, of_period = _ask(self.period, seen, memory.get("period", {}))
        return Decision(
            self._joined(batch.plan, period.plan),
            f"{batch.phase}, {period.phase}",
            {"batch": batch.why, "period": period.why},
            {"batch": of_batch, "period": of_period},
        )

    def plans(self) -> tuple[Plan, ...]:
        return tuple(self._joined(batch, period) for batch in self.batch.plans() for period in self.period.plans())

    def _joined(self, batch: Plan, period: Plan) -> Plan:
        return replace(period, batch_per_rank=batch.batch_per_rank, lr_scale=batch.lr_scale)


def _ask(policy: Policy, seen: Observation, memory: Memory) -> tuple[Decision, dict[str, Any]]:
    """Ask one of two policies, which sees its own Plan and phases; its Decision, and the memory to keep for it."""
    if memory:
        begun = memory["begun"]
        seen = replace(
            seen,
            plan=Plan(**memory["plan"]),
            phase=memory["phase"],
            phase_name=memory["name"],
            phase_rounds=seen.round - begun[0],
            phase_steps=seen.local_step - begun[1],
            phase_samples=seen.samples - begun[2],
        )
    else:
        begun = [0, 0, 0]
    decision = policy.decide(seen, memory.get("memory", {}))
    begins = not memory or (decision.phase, decision.plan) != (seen.phase_name, seen.plan)
    return decision, {
        "memory": decision.memory,
        "plan": asdict(decision.plan),
        "name": decision.phase,
        "phase": seen.phase + begins,
        "begun": [seen.round, seen.local_step, seen.samples] if begins else begun,
    }
