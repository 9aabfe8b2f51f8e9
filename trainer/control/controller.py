"""The synchronization controller: reduced observations in, the Plan of the next round out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.plan import Decision, Memory, Observation, Plan
from trainer.policies import LrScaling, Policy


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

    Args:
        policy: which decides.
        step_response: the optimizer's, as in the Observation; the first decision knows nothing else.
    """

    def __init__(self, policy: Policy, step_response: float = 1.0) -> None:
        self.policy = policy
        self._memory: Memory = {}
        self._begun = Observation()
        self._ranks = 1
        self._ramp_from, self._ramp_at = 1.0, 0
        self._noise = math.nan
        self._response = step_response
        self.phase = Phase(-1, "", policy.base_plan(), {})
        self.decision = Decision(self.phase.plan, "")
        """The latest."""
        self.observe(Observation(step_response=step_response))
        self._ramp_from = self._target()  # no ramp at the start: that is the schedule's warm-up

    @property
    def plan(self) -> Plan:
        """The Plan of the current round."""
        return self.phase.plan

    def observe(self, seen: Observation, samples: int | None = None) -> bool:
        """Decide the next round's Plan; whether a new phase began. What `seen` says of the current phase and Plan is
        filled in here; `samples` are those trained by now, where that is more than `seen` knows of."""
        seen = replace(
            seen,
            phase=self.phase.number,
            phase_name=self.phase.name,
            phase_rounds=seen.round - self._begun.round,
            phase_steps=seen.local_step - self._begun.local_step,
            phase_samples=seen.samples - self._begun.samples,
            plan=self.phase.plan,
        )
        if seen.noise_scale > 0:
            self._noise = seen.noise_scale
        self._ranks, self._response = max(seen.ranks, 1), seen.step_response
        decision = self.decision = self.policy.decide(seen, self._memory)
        self._memory = dict(decision.memory)
        if (decision.phase, decision.plan) == (self.phase.name, self.phase.plan):
            return False
        now = seen.samples if samples is None else samples
        scale, target = self.lr_scale(now), self._target()
        self._begun = seen
        self.phase = Phase(self.phase.number + 1, decision.phase, decision.plan, dict(decision.why))
        if self._target() != target:  # else a ramp that is under way goes on
            self._ramp_from, self._ramp_at = scale, now
        return True

    def lr_scale(self, samples: int) -> float:
        """Factor on the scheduled learning rate at this many samples: the phase's own, ramped after a rise."""
        target, ramp = self._target(), self.policy.lr_ramp_samples
        if target <= self._ramp_from or ramp == 0:
            return target
        share = min(1.0, (samples - self._ramp_at) / ramp)
        return self._ramp_from + share * (target - self._ramp_from)

    def batch_factor(self, batch: float) -> float:
        """Factor on `lr_scale` where this batch a rank is trained in place of the Plan's."""
        return self._scaling(batch) / self._scaling(self.plan.batch_per_rank)

    def _target(self) -> float:
        return self.plan.lr_scale * self._scaling(self.plan.batch_per_rank)

    def _scaling(self, batch: float) -> float:
        base = self.policy.base_plan().batch_per_rank
        return scaling(self.policy.lr_scaling, batch / base, base * self._ranks, self._noise, self._response)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later decisions depend on; JSON values."""
        return {
            "memory": dict(self._memory),
            "phase": asdict(self.phase),
            "begun": asdict(self._begun),
            "ramp_from": self._ramp_from,
            "ramp_at": self._ramp_at,
            "noise": self._noise,
            "ranks": self._ranks,
            "response": self._response,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._memory = dict(state["memory"])
        self.phase = Phase.restored(state["phase"])
        self._begun = Observation.restored(state["begun"])
        self._ramp_from, self._ramp_at = state["ramp_from"], state["ramp_at"]
        self._noise, self._ranks, self._response = state["noise"], state["ranks"], state["response"]


def scaling(rule: LrScaling, ratio: float, base_samples: float, noise_scale: float, response: float = 1.0) -> float:
    """Factor on the learning rate where a step's samples are `ratio` times the base's.

    gain: of AdaScale (Johnson et al. 2020, arXiv 2007.05105), (φ / B₀ + 1) / (φ / B + 1) with the noise scale φ;
    1 for no noise, `ratio` for nothing but noise. Until φ is known it is sqrt's. Where steps are as long whatever the
    gradient's length is (a response of 0: Adam), a step along the mean gradient has grown by the gain's square root by
    itself, and the rate grows by the other.
    norm: its square root, by which a gradient is as long as the base's in the mean; 1 until φ is known.
    """
    if rule == "norm":
        return math.sqrt(scaling("gain", ratio, base_samples, noise_scale)) if noise_scale > 0 else 1.0
    if rule == "gain" and noise_scale > 0:
        gain = (noise_scale / base_samples + 1) / (noise_scale / (base_samples * ratio) + 1)
        return float(gain ** ((1 + response) / 2))
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio), "gain": math.sqrt(ratio)}[rule]
