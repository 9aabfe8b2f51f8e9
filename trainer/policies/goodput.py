"""Goodput of a Plan: samples a second from fitted costs, times how much a sample teaches.

After Pollux (Qiao et al. 2021), with a period, a delay and a wire format besides the batch. Everything is
kept in a JSON memory of a few numbers, so that a policy that uses it stays pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any

import numpy as np

from trainer.plan import Observation, Plan
from trainer.policies.constants import CONSTANTS, GRADIENTS

BESIDE = " beside"
ALIKE = {GRADIENTS: "float32", "float32": GRADIENTS}
"""As many bytes, by the same sums; lossy formats also take time to code."""
LEAST_LR = 1e-12  # below it nothing moves by the rate
DEPENDENT = 1e-10  # squared sine of an angle below which columns of points are taken for one


def fitted(points: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """The least-squares a, c, v, none below 0, of t = a + c · x + v · y through points (x, y, t); NaN without points.

    Of fits that are as good the one that promises least: of one point alone a plane through the origin, so that neither
    a larger x nor a smaller y gains what was not seen.
    """
    if not points:
        return math.nan, math.nan, math.nan
    seen = np.array([(1.0, *point) for point in points])
    lengths = np.sqrt(np.square(seen).sum(axis=0))
    lengths[lengths == 0] = 1.0
    unit = seen / lengths
    products = unit.T @ unit  # of 1, x, y and t, each of length 1
    among = np.where(_BOTH, products[:3, :3], np.eye(3))
    among[np.linalg.det(among) < DEPENDENT] = np.nan  # fewer columns say the same
    found = np.linalg.solve(among, (_CHOSEN * products[:3, 3])[:, :, None])[:, :, 0]
    errors = 1.0 - found @ products[:3, 3]
    good = [(error, fit) for error, fit in zip(errors, found, strict=True) if fit.min() >= 0]
    least = min(error for error, _ in good)
    best = next(fit for error, fit in good if error < least + 1e-9)
    start, slope, beside = (best * lengths[3] / lengths[:3]).tolist()
    return start, slope, beside


# the columns (1, x, y) of each fit, the one that promises least first
_CHOSEN = np.array([(0, 1, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1), (1, 0, 0), (1, 0, 1)])
_BOTH = (_CHOSEN[:, :, None] * _CHOSEN[:, None, :]).astype(bool)


@dataclass(frozen=True)
class Costs:
    """Figures of compute, network, gradients and replicas that were measured so far."""

    step_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a local step as seen, by "batch hidden waited" with the averages a step that are hidden beside
    training and that are waited for, as `averages` counts them."""
    step_rounds: Mapping[str, int] = field(default_factory=dict)
    """Rounds that each of these was seen in."""
    transfer_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a transfer by what is sent (as `sent` names it, or gradients), where it was seen."""
    took: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a round over what was expected of it, by the Plan as `tried` names it."""
    took_rounds: Mapping[str, int] = field(default_factory=dict)
    """Rounds that each of these was seen in."""
    unit_drift: float = math.nan
    """Divergence over the model's squared norm, of one local step at a learning rate of 1."""
    lr: float = math.nan
    """The latest learning rate."""
    most_lr: float = 0.0
    """The highest so far."""
    noise_scale: float = math.nan
    """In samples."""
    response: float = 1.0
    """As `Observation.step_response`."""
    memory_share: float = math.nan
    """Most memory ever held, of what there is,"""
    memory_batch: int = 0
    """and the largest batch up to then."""
    sample_s: float = math.nan
    """Of federated devices: seconds of a sample on a round's slowest, since a device's steps take as long as its
    samples; the mean over rounds."""
    sample_rounds: int = 0
    """Rounds in that mean."""
    momentum: float = math.nan
    """Of federated devices' optimizers, by how far they reached; NaN without devices."""

    def saw(self, seen: Observation) -> Costs:
        """With one more observation; what it did not measure stays as it was."""
        ran, found = seen.ran, self._saw_devices(seen)
        # a phase's first rounds pay for its beginning, and may tell of the transfer before it
        # by the Plan: an evaluation takes an average sooner, but the steps before it ran beside the one before
        begins = 2 if ran.delay_steps else 1  # rounds
        settled = ran == seen.plan and seen.phase_steps > begins * seen.steps > 0
        if settled and seen.slowest_compute_s > 0:
            hidden, waited = (count / (ran.sync_period_steps or 1) for count in averages(ran))
            found = found._saw_step(f"{ran.batch_per_rank} {hidden:g} {waited:g}", seen.slowest_compute_s / seen.steps)
        if settled and seen.transfer_s > 0 and ran.sync_period_steps > 1:
            found = replace(found, transfer_s=self._transfers(sent(ran), seen.transfer_s))
        waits = settled and not found.of_devices and seen.sync_wait_s > 0 and seen.slowest_compute_s > 0
        if waits and ran.sync_period_steps == 1:
            seconds = (seen.sync_wait_s + CONSTANTS.hiding_share * seen.slowest_compute_s) / seen.steps
            found = replace(found, transfer_s=self._transfers(GRADIENTS, seconds))
        seconds = seen.slowest_compute_s + seen.sync_wait_s
        if settled and seconds > 0 and ran.sync_period_steps == seen.steps and not found.of_devices:
            found = found._saw_round(ran, seen.ranks, seconds, self.round(ran, seen.ranks))
        if seen.lr > 0:
            found = replace(found, lr=seen.lr, most_lr=max(seen.lr, self.most_lr))
        if seen.divergence > 0 and seen.model_sq_norm > 0 and seen.steps and seen.lr > LEAST_LR:
            # with a delay too: since a snapshot an average has come, so the next holds the steps between the two
            steps = seen.reach_steps if seen.reach_steps > 0 else float(seen.steps)
            drift = seen.divergence / seen.model_sq_norm / steps**CONSTANTS.drift_power / seen.lr**2
            before = self.unit_drift if self.unit_drift > 0 else drift
            found = replace(found, unit_drift=CONSTANTS.mean_decay * before + (1 - CONSTANTS.mean_decay) * drift)
        if seen.noise_scale > 0:
            found = replace(found, noise_scale=seen.noise_scale)
        if seen.step_response != self.response:
            found = replace(found, response=seen.step_response)
        if seen.memory_share > 0:
            batch = max(self.memory_batch, ran.batch_per_rank)
            found = replace(found, memory_share=seen.memory_share, memory_batch=batch)
        return found

    def _saw_devices(self, seen: Observation) -> Costs:
        """With a round of federated devices; nothing without them."""
        if not seen.reach_steps > 0 or not seen.steps:
            return self
        momentum = momentum_of(seen.reach_steps, seen.steps) if seen.steps > 1 else math.nan
        known = self.momentum if self.of_devices else 0.0
        found = replace(self, momentum=momentum if momentum == momentum else known)
        if not seen.slowest_compute_s > 0:
            return found
        seconds = seen.slowest_compute_s / (seen.steps * seen.ran.batch_per_rank)
        rounds = min(self.sample_rounds + 1, CONSTANTS.cohorts)
        mean = seconds if rounds == 1 else self.sample_s + (seconds - self.sample_s) / rounds
        return replace(found, sample_s=mean, sample_rounds=rounds)

    @property
    def of_devices(self) -> bool:
        """Federated devices were seen."""
        return self.momentum == self.momentum

    def reach(self, steps: int) -> float:
        """Local steps' worth that so many steps are, of an optimizer that begins anew: ‖a‖₁ of Wang et al. 2020."""
        return reach_of(self.momentum if self.of_devices else 0.0, steps)

    def _saw_step(self, used: str, seconds: float) -> Costs:
        """With one more round's seconds of a local step. Once what is in use is known, what is not moves as that does:
        a machine that slows down, slows all of them down."""
        rounds = self.step_rounds.get(used, 0) + 1
        found = _with(self.step_s, used, seconds, max(1 / rounds, 1 - CONSTANTS.mean_decay))
        if rounds > CONSTANTS.known_rounds:
            moved = found[used] / self.step_s[used]
            found = {each: known if each == used else known * moved for each, known in found.items()}
        step_rounds = {**self.step_rounds, used: min(rounds, CONSTANTS.known_rounds + 1)}
        return replace(self, step_s=found, step_rounds=step_rounds)

    def _transfers(self, used: str, seconds: float) -> dict[str, float]:
        """Seconds of a transfer with one more of what is in use; what is not in use moves as that does, since all go
        by one network."""
        found = _with(self.transfer_s, used, seconds)
        moved = found[used] / self.transfer_s.get(used, found[used])
        return {each: known if each == used else known * moved for each, known in found.items()}

    def _saw_round(self, plan: Plan, ranks: int, seconds: float, before: float) -> Costs:
        """With one more round's seconds, which were thought to be as many as `before`."""
        expected, name = self._round(plan, ranks), tried(plan)
        if not expected > 0:
            return self
        rounds = self.took_rounds.get(name, 0) + 1
        mean = seconds if rounds == 1 else before + max(1 / rounds, 1 - CONSTANTS.mean_decay) * (seconds - before)
        took_rounds = {**self.took_rounds, name: min(rounds, CONSTANTS.known_rounds)}
        return replace(self, took={**self.took, name: mean / expected}, took_rounds=took_rounds)

    def round(self, plan: Plan, ranks: int) -> float:
        """Seconds of a Plan's round: what its parts let expect, times what more it took where it was tried; NaN where
        nothing was measured. So a Plan that promises more than it holds is tried once."""
        return self._round(plan, ranks) * self.took.get(tried(plan), 1.0)

    def _round(self, plan: Plan, ranks: int) -> float:
        """Seconds of a Plan's round by its parts: steps, slowed by averages, and what is waited for."""
        period, fragments, wire = plan.sync_period_steps, plan.fragments or 1, plan.wire_format or "float32"
        delay = delay_of(plan)
        step_s = self.step(plan.batch_per_rank)
        if self.of_devices:
            return period * step_s + self.transfer(wire)
        if ranks <= 1:
            return period * step_s
        if period == 1:
            return step_s + max(0.0, self.transfer(GRADIENTS) - CONSTANTS.hiding_share * step_s)
        hidden, waited = averages(plan)
        step_s += (
            (hidden + CONSTANTS.waited_cost * waited) * self.beside_s / period
        )  # which also hide more, as they are slower
        transfer_s = self.transfer(wire, fragments, hidden=delay > 0)
        exposed = max(0.0, fragments * (transfer_s - delay * step_s), fragments * transfer_s - period * step_s)
        return period * step_s + exposed

    def step(self, batch: int) -> float:
        """Seconds of a local step, by what was measured; NaN where nothing was."""
        if self.of_devices:
            return self.sample_s * batch
        start, slope, _ = self._fit
        return start + slope * batch

    @property
    def largest_batch(self) -> int:
        """Of those whose local steps were timed; 0 where none were."""
        return max((int(each.split()[0]) for each in self.step_s), default=0)

    @property
    def beside_s(self) -> float:
        """Seconds by which a hidden average slows the local steps that it goes on beside, in all: its work is done by
        the cores, and the memory, that train. 0 until one was seen."""
        return self._fit[2]

    @property
    def drift(self) -> float:
        """Divergence over the model's squared norm, of one local step at the latest learning rate, held against what
        SGD's own noise leaves at that rate: over the rate's share of the highest.

        Divergence is taken to be in proportion to the rate's square, so that a warm-up is not mistaken for replicas
        that hardly part, and what noise leaves to be in proportion to the rate (stationary SGD). So as a rate falls
        replicas may part more, but not as much more as they would stay together.
        """
        return self.unit_drift * self.lr * max(self.lr, self.most_lr)

    @cached_property
    def _fit(self) -> tuple[float, float, float]:
        seen = [([float(part) for part in each.split()], seconds) for each, seconds in self.step_s.items()]
        # from waited ones alone what a hidden one takes would be told by their small differences, times four and more
        cost = CONSTANTS.waited_cost if any(hidden > 0 for (_, hidden, _), _ in seen) else 0.0
        return fitted([(batch, hidden + cost * waited, seconds) for (batch, hidden, waited), seconds in seen])

    def transfer(self, wire: str, fragments: int = 1, *, hidden: bool = False) -> float:
        """Seconds of a fragment's average, waited for or hidden beside training, which takes longer, since it shares
        the cores: measured, or from others by their bytes; NaN where none was seen."""
        name = sent_as(wire, fragments, hidden=hidden)
        if self.of_devices and name not in self.transfer_s and self.transfer_s:
            seen, seconds = next(iter(self.transfer_s.items()))  # on its way down a model is of float32
            return seconds * (1 + _share(name)) / (1 + _share(seen))
        if name in ALIKE and name not in self.transfer_s:
            name = ALIKE[name]
        return self.transfer_s.get(name) or _share(name) * self._model_s[hidden]

    @cached_property
    def _model_s(self) -> dict[bool, float]:
        """Seconds that the model takes in float32, waited for and hidden, by the slowest of the transfers seen."""
        known = {each: seconds / _share(each) for each, seconds in self.transfer_s.items()}
        slowest = max(known.values(), default=math.nan)
        alike = {hidden: [each for name, each in known.items() if name.endswith(BESIDE) == hidden] for hidden in (0, 1)}
        return {bool(hidden): max(found, default=slowest) for hidden, found in alike.items()}

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Costs:
        """The Costs whose `state` this is."""
        return cls(**state)


def reach_of(momentum: float, steps: int) -> float:
    """Σ (1 − m^i) / (1 − m) for i = 1 to `steps`: how often a round's gradients count in its steps, in all."""
    if momentum <= 0:
        return float(steps)
    left = 1 - momentum
    return (steps - momentum * (1 - momentum**steps) / left) / left


def momentum_of(reach: float, steps: int) -> float:
    """The momentum by which so many steps reach as far; 0 where they reach no farther than without one."""
    low, high = 0.0, 0.999
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if reach_of(middle, steps) < reach else (low, middle)
    return low if low > 1e-6 else 0.0


def sent_as(wire: str, fragments: int, *, hidden: bool) -> str:
    """Names what one transfer sends: "int4", or of several fragments beside training "int4/3 beside"."""
    return wire + (f"/{fragments}" if fragments > 1 else "") + (BESIDE if hidden else "")


def sent(plan: Plan) -> str:
    """Names the content of one transfer of a Plan."""
    return sent_as(plan.wire_format or "float32", plan.fragments or 1, hidden=bool(plan.delay_steps))


def delay_of(plan: Plan) -> int:
    """A Plan's delay in steps, 0 where it leaves it to others."""
    return plan.delay_steps if isinstance(plan.delay_steps, int) else 0


def tried(plan: Plan) -> str:
    """Names a Plan by all that its rounds' seconds depend on."""
    return f"{plan.batch_per_rank} {plan.sync_period_steps} {delay_of(plan)} {sent(plan)}"


@cache
def _share(name: str) -> float:
    """Time of a transfer of this name, over that of the whole model in float32; by bytes and the cost of fragments."""
    wire, _, fragments = name.removesuffix(BESIDE).partition("/")
    return CONSTANTS.bytes_of_float32[wire] * _work(int(fragments or 1)) / int(fragments or 1)


def _work(fragments: int) -> float:
    """Work of an average in so many fragments, over that of the whole model."""
    return 1 + CONSTANTS.fragment_cost * (fragments - 1)


def averages(plan: Plan) -> tuple[float, float]:
    """Averages of the whole model that a round's work comes to: hidden beside training, and waited for."""
    if plan.sync_period_steps <= 1:
        return 0.0, 0.0
    return (_work(plan.fragments or 1), 0.0) if plan.delay_steps else (0.0, 1.0)


def _with(
    means: Mapping[str, float], name: str, value: float, share: float = 1 - CONSTANTS.mean_decay
) -> dict[str, float]:
    """Running means with one more value, of which they take this share."""
    before = means.get(name, value)
    return {**means, name: before + share * (value - before)}
