"""The synchronization controller: reduced observations in, the Plan of the next round out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.plan import Memory, Observation, Plan
from trainer.policies import Policy


@dataclass(frozen=True)
class Phase:
    """Consecutive rounds under one Plan, and the numbers that began it."""

    number: int
    name: str
    plan: Plan
    why: Mapping[str, float]

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Phase:
        """The Phase whose `asdict` this is."""
        return cls(state["number"], state["name"], Plan(**state["plan"]), state["why"])


class Controller:
    """Asks the policy at round boundaries, counts phases, and scales the learning rate with the batch.

    Every rank runs one, on the same numbers, so all come to the same Plan without a message.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._memory: Memory = {}
        self._begun = Observation()
        self._ramp_from = 1.0
        self.phase = Phase(-1, "", policy.base_plan(), {})
        self.observe(Observation())
        self._ramp_from = self._target()  # no ramp at the start: that is the schedule's warm-up

    @property
    def plan(self) -> Plan:
        """What the current round does."""
        return self.phase.plan

    def observe(self, seen: Observation) -> bool:
        """Decide the next round's Plan; whether a new phase began. Phase figures of `seen` are filled in here."""
        seen = replace(
            seen,
            phase=self.phase.number,
            phase_rounds=seen.round - self._begun.round,
            phase_steps=seen.local_step - self._begun.local_step,
            phase_samples=seen.samples - self._begun.samples,
        )
        decision = self.policy.decide(seen, self._memory)
        self._memory = dict(decision.memory)
        if (decision.phase, decision.plan) == (self.phase.name, self.phase.plan):
            return False
        self._ramp_from = self.lr_scale(seen.samples)
        self._begun = seen
        self.phase = Phase(self.phase.number + 1, decision.phase, decision.plan, dict(decision.why))
        return True

    def lr_scale(self, samples: int) -> float:
        """Factor on the scheduled learning rate at this many samples: the phase's own, ramped after a rise."""
        target, ramp = self._target(), self.policy.lr_ramp_samples
        if target <= self._ramp_from or ramp == 0:
            return target
        share = min(1.0, (samples - self._begun.samples) / ramp)
        return self._ramp_from + share * (target - self._ramp_from)

    def _target(self) -> float:
        ratio = self.plan.batch_per_rank / self.policy.base_plan().batch_per_rank
        rule = {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[self.policy.lr_scaling]
        return self.plan.lr_scale * rule

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on; JSON values."""
        return {
            "memory": dict(self._memory),
            "phase": asdict(self.phase),
            "begun": asdict(self._begun),
            "ramp_from": self._ramp_from,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._memory = dict(state["memory"])
        self.phase = Phase.restored(state["phase"])
        self._begun = Observation(**state["begun"])
        self._ramp_from = state["ramp_from"]
