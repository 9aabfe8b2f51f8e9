"""The policy that decides by itself, from what it measures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from operator import itemgetter
from typing import Any, Literal

from trainer.errors import require, require_at_least
from trainer.plan import Decision, Memory, Observation, Plan
from trainer.policies.base import LrScaling, Policy, held, register
from trainer.policies.constants import CONSTANTS, GRADIENTS
from trainer.policies.goodput import Costs
from trainer.policies.worth import Worth, drift_of, worth

SHOWN = 4
_plan = cache(Plan)  # the same candidates come again and again, and a Plan checks itself


@register("autopilot")
@dataclass(frozen=True)
class Autopilot(Policy):
    """Chooses batch, period, delay, fragments and wire format by expected goodput.

    It begins with the shortest rounds at the smallest batch, to measure compute, network, gradient noise and how fast
    replicas part (under Adam with averaged gradients, since there the shortest rounds cost as much as longer ones);
    then it compares all candidates again and again, and takes a better one where that promises enough. A
    larger batch is measured once the noise is such that it might pay. A run has only so many samples, and what one
    fails to teach is lost for good, while seconds are only spent: so efficiency counts `care` times. The last part of
    the run is spent at the smallest batch and with four times the care, for generalization.
    """

    lr_scaling: LrScaling = "gain"
    """How the learning rate follows the per-rank batch; see Policy."""
    batch_per_rank: int = 32
    """Smallest batch; the learning rate is meant at it."""
    max_batch_per_rank: int = 256
    """Largest batch; memory may set a lower bound."""
    max_period_steps: int = 64
    """Longest period."""
    max_delay_steps: int = 16
    """Longest delay."""
    max_divergence: float = 0.004
    """Bound on the mean squared distance of replicas from their mean, over the mean's squared norm, of two ranks; of N
    ranks that over (N - 1)^1.5. There a sample is held to teach half."""
    target: Literal["time", "bytes", "accuracy"] = "time"
    """Aim: the most goodput, efficiency counted twice or (accuracy) sixteen times; or the fewest bytes
    at half of that or more."""
    care: float | None = None
    """How often efficiency counts, in place of the target's own number; 1 is goodput itself."""
    min_gain: float = 0.05
    """Expected gain that is worth a change of Plan."""
    min_stay_steps: int = 64
    """Local steps between two comparisons, and before a better Plan may end a phase."""
    late_from: float = 0.75
    """Share of the run's samples after which only the smallest batch is used, with four times the care."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "batch_per_rank", "max_delay_steps", "min_stay_steps")
        require_at_least(self, 2, "max_period_steps")
        low = self.batch_per_rank
        require("max_batch_per_rank", self.max_batch_per_rank, self.max_batch_per_rank >= low, f"must be {low} or more")
        require("max_divergence", self.max_divergence, self.max_divergence > 0, "must be above 0")
        require("care", self.care, self.care is None or self.care >= 1, "must be at least 1")
        require("min_gain", self.min_gain, self.min_gain >= 0, "must be 0 or more")
        require("late_from", self.late_from, 0 <= self.late_from <= 1, "must be in 0 .. 1")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        if seen.phase < 0 and seen.step_response < 1:
            return Decision(_plan(self.batch_per_rank, 1), "probe gradients")
        if seen.phase < 0:
            return Decision(self._probe(self.batch_per_rank), "probe")
        if seen.missing("slowest_compute_s"):
            return held(seen, memory, "slowest_compute_s")
        costs = Costs.restored(memory.get("costs", {})).saw(seen)
        kept: dict[str, Any] = {"costs": costs.state(), "expected": memory.get("expected")}
        kept["since"] = memory.get("since", 0) + seen.steps  # the latest comparison
        why: dict[str, Any] = {"came_true": self._rate(seen), "expected": kept["expected"]}
        if seen.phase_name.startswith("probe"):
            return self._end_probe(seen, costs, kept, why)
        return self._compare(seen, costs, kept, why)

    def plans(self) -> tuple[Plan, ...]:
        delayed = Plan(self.batch_per_rank, self.max_period_steps, delay_steps=1, wire_format="int4", fragments=1)
        return (self._probe(self.batch_per_rank), delayed, _plan(self.batch_per_rank, 1))

    def _probe(self, batch: int) -> Plan:
        # of the shortest rounds, since replicas that part in a run's first steps cost its final accuracy
        return Plan(batch, CONSTANTS.probe_period, delay_steps=0, wire_format="int4", fragments=1)

    def _end_probe(self, seen: Observation, costs: Costs, kept: dict[str, Any], why: dict[str, Any]) -> Decision:
        """Measure on, until what was measured can be compared.

        Where local rounds fall short of averaged gradients however short they are, the run begins with these: it goes
        on so if nothing is better by what is then known, and else measures local rounds.
        """
        known = GRADIENTS in costs.transfer_s or seen.ranks == 1 or seen.phase_steps >= CONSTANTS.probe_steps
        if seen.phase_name == "probe gradients" and known:
            best = self._compare(seen, costs, kept, why, at_once=True)
            local = Decision(self._probe(self.batch_per_rank), "probe", why, kept)
            return best if best.plan.sync_period_steps == 1 else local
        if seen.phase_steps < CONSTANTS.probe_steps or costs.largest_batch < seen.plan.batch_per_rank:
            return Decision(seen.plan, seen.phase_name, why, kept)
        if not costs.transfer_s and seen.ranks > 1:
            return Decision(seen.plan, seen.phase_name, why | {"held": "not measured: transfer_s"}, kept)
        return self._compare(seen, costs, kept, why, at_once=True)

    def _compare(
        self, seen: Observation, costs: Costs, kept: dict[str, Any], why: dict[str, Any], *, at_once: bool = False
    ) -> Decision:
        """The best candidate, if it is better enough than the current Plan; now and then, for it takes its time."""
        late = seen.progress >= self.late_from
        largest = self.batch_per_rank if late else self._largest(costs)
        entering = late and not seen.phase_name.startswith("late")
        apart = drift_of(seen.plan, costs, seen.ranks) > CONSTANTS.slack * self.max_divergence
        forced = at_once or entering or apart or seen.plan.batch_per_rank > largest
        if not forced and kept["since"] < self.min_stay_steps:
            return Decision(seen.plan, seen.phase_name, why, kept)
        kept["since"] = 0
        current = self._worth(seen.plan, costs, seen.ranks)
        why["current"] = current.told()
        kept["expected"] = current.samples_per_s
        if not at_once and self._may_pay(current, costs, largest, seen.ranks):
            period = min(seen.plan.sync_period_steps, CONSTANTS.larger_period)
            plan = replace(self._probe(2 * self.batch_per_rank), sync_period_steps=period)
            return Decision(plan, "probe larger", why, kept)
        largest = min(largest, 2 * max(seen.plan.batch_per_rank, self.batch_per_rank))  # what is near was measured
        longest = min(CONSTANTS.reach * seen.plan.sync_period_steps, self.max_period_steps)
        found = [self._worth(plan, costs, seen.ranks) for plan in self._candidates(costs, largest, longest)]
        usable = [each for each in found if math.isfinite(each.goodput)]
        if not usable:
            return Decision(seen.plan, seen.phase_name, why | {"held": "nothing can be predicted yet"}, kept)
        bounded = [each for each in usable if each.drift <= self.max_divergence]
        scored = [(self._score(each, late), each) for each in bounded or [min(usable, key=lambda each: each.drift)]]
        score = self._score(current, late)
        if self.target == "bytes":
            least = max(goodput for goodput, _ in scored) / 2
            scored = [(each.efficiency / each.bytes_per_sample, each) for goodput, each in scored if goodput >= least]
            forced |= score < least
            score = current.efficiency / current.bytes_per_sample
        ranked = _ranked(scored)
        top, best = ranked[0]
        why |= {
            "candidates": [each.told() | {"score": float(f"{found:.5g}")} for found, each in ranked[:SHOWN]],
            "noise_scale": costs.noise_scale if costs.noise_scale > 0 else None,
            "drift": costs.drift if costs.drift > 0 else None,
            "gain": top / score - 1 if score > 0 else None,
        }
        if not forced and not top > (1 + self.min_gain) * score:
            return Decision(seen.plan, seen.phase_name, why, kept)
        kept["expected"] = best.samples_per_s
        return Decision(best.plan, "late" if late else "cruise", why, kept)

    def _may_pay(self, current: Worth, costs: Costs, largest: int, ranks: int) -> bool:
        """Whether twice the smallest batch is to be measured: where none but the smallest was, and its steps, should
        they take no longer, would be worth a change."""
        batch = 2 * self.batch_per_rank
        if batch > largest or costs.largest_batch >= batch or costs.of_devices:
            return False  # a device's seconds go by its samples, whatever the batch
        doubled = self._worth(replace(current.plan, batch_per_rank=batch), costs, ranks)
        at_best = replace(doubled, samples_per_s=2 * current.samples_per_s)
        return self._score(at_best, late=False) > (1 + self.min_gain) * self._score(current, late=False)

    def _worth(self, plan: Plan, costs: Costs, ranks: int) -> Worth:
        return worth(plan, costs, ranks, self.batch_per_rank, self.max_divergence)

    def _score(self, each: Worth, late: bool) -> float:
        """Goodput with care."""
        care = (CONSTANTS.care[self.target] if self.care is None else self.care) * (CONSTANTS.late_care if late else 1)
        return float(each.samples_per_s * each.reach * each.efficiency**care)

    def _candidates(self, costs: Costs, largest: int, longest: int) -> Iterator[Plan]:
        batch = self.batch_per_rank
        while batch <= largest:
            step_s = costs.step(batch)
            yield _plan(batch, 1)
            for period in self._periods(longest):
                for wire in CONSTANTS.formats:
                    yield _plan(batch, period, delay_steps=0, wire_format=wire, fragments=1)
                    if costs.of_devices:
                        continue  # they have no delays and no fragments
                    for fragments in (each for each in CONSTANTS.fragments if each <= period):
                        transfer_s = costs.transfer(wire, fragments, hidden=True)
                        if fragments > 1 and fragments * transfer_s > period * step_s:
                            continue  # a link has no time for more than this
                        hiding = self._hiding(transfer_s, step_s, period)
                        for delay in range(max(1, hiding - 1), hiding + 1):
                            yield _plan(batch, period, delay_steps=delay, wire_format=wire, fragments=fragments)
            batch *= 2

    @staticmethod
    def _periods(longest: int) -> list[int]:
        """Above 1, each about 1.4 times the one before: 2, 3, 4, 6, 8, 12 and so on."""
        doubled = [2**power for power in range(1, longest.bit_length())]
        between = [half + half // 2 for half in doubled]
        return sorted(each for each in doubled + between if each <= longest)

    def _hiding(self, transfer_s: float, step_s: float, period: int) -> int:
        """The fewest steps that hide a transfer, as far as they may."""
        most = min(self.max_delay_steps, period)
        return min(most, math.ceil(transfer_s / step_s)) if transfer_s < most * step_s else most

    def _largest(self, costs: Costs) -> int:
        """The largest batch that noise is known for and memory has room for."""
        if not costs.noise_scale > 0:
            return self.batch_per_rank
        return self._room(costs)

    def _room(self, costs: Costs) -> int:
        """The largest batch that memory has room for, if it grows with the batch."""
        if not costs.memory_share > 0:
            return self.max_batch_per_rank
        room = costs.memory_batch * CONSTANTS.full_memory / costs.memory_share
        return max(self.batch_per_rank, math.floor(min(self.max_batch_per_rank, room)))

    @staticmethod
    def _rate(seen: Observation) -> float | None:
        """Samples a second, over all ranks, of the observed round."""
        seconds = seen.slowest_compute_s + seen.sync_wait_s
        return seen.steps * seen.ran.batch_per_rank * seen.ranks / seconds if seconds > 0 else None


def _ranked(scored: Sequence[tuple[float, Worth]]) -> list[tuple[float, Worth]]:
    """Best first; of those that are about as good the one that averages least often, and in the fewest fragments."""
    ranked = sorted(scored, key=itemgetter(0), reverse=True)
    ties = [place for place, (score, _) in enumerate(ranked) if score >= (1 - CONSTANTS.tie) * ranked[0][0]]
    best = ranked.pop(max(ties, key=lambda place: _rarity(ranked[place][1].plan)))
    return [best, *ranked]


def _rarity(plan: Plan) -> tuple[int, int]:
    """Samples a rank trains between two averages, then how few fragments they have."""
    return plan.sync_period_steps * plan.batch_per_rank, -(plan.fragments or 1)
