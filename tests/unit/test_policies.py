"""Policies by table: a policy is pure, so its test is what goes in and what comes out."""

from __future__ import annotations

import json
import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.control.controller import Controller
from trainer.errors import ConfigError
from trainer.plan import Decision, Memory, Observation, Plan
from trainer.policies import POLICIES, Alternating, Constant, Policy, PostLocal

SMALL, LARGE = Plan(32, 16), Plan(256, 1)


def names(policy: Policy, rounds: int, samples_per_round: int = 100, steps_per_round: int = 2) -> str:
    """The first letters of the phases that the rounds belong to."""
    controller = Controller(policy)
    letters = controller.phase.name[0]
    for number in range(1, rounds):
        seen = Observation(round=number, local_step=number * steps_per_round, samples=number * samples_per_round)
        controller.observe(seen)
        letters += controller.phase.name[0]
    return letters


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Constant(SMALL), "cccccccc"),
        (Alternating(samples_per_phase=200), "ssllssll"),
        (Alternating(samples_per_phase=250), "ssslllss"),  # rounded up to a round's end
        (Alternating(rounds_per_phase=3), "ssslllss"),
        (Alternating(steps_per_phase=2), "slslslsl"),
        (Alternating(rounds_per_phase=1, large_length=3), "slllslll"),
        (Alternating(rounds_per_phase=2, first="large"), "llssllss"),
        (Alternating(rounds_per_phase=1, cycles=2), "slslllll"),
        (Alternating(rounds_per_phase=1, cycles=2, last="small"), "slslssss"),
        (Alternating(rounds_per_phase=1, cycles=1, first="large"), "lsssssss"),
        (PostLocal(switch_samples=300), "llllllll".replace("l", "l")),
    ],
)
def test_phases(policy: Policy, expected: str) -> None:
    assert names(policy, 8) == expected


def test_post_local_switches_once() -> None:
    controller = Controller(PostLocal(large=LARGE, local=SMALL, switch_samples=300))
    plans = [controller.plan]
    for samples in (100, 200, 300, 400):
        controller.observe(Observation(round=samples // 100, samples=samples))
        plans.append(controller.plan)
    assert plans == [LARGE, LARGE, LARGE, SMALL, SMALL]
    assert controller.phase.why == {"samples": 300, "switch_samples": 300}


def test_a_phase_change_is_recorded_with_its_numbers() -> None:
    controller = Controller(Alternating(samples_per_phase=200))
    assert not controller.observe(Observation(round=1, samples=199))
    assert controller.observe(Observation(round=2, samples=210))
    assert (controller.phase.number, controller.phase.name) == (1, "large")
    assert controller.phase.why == {"phase_samples": 210, "samples_per_phase": 200}


@pytest.mark.parametrize(("rule", "scale"), [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_learning_rate_follows_the_batch_and_ramps_only_up(rule: str, scale: float) -> None:
    plans = {"small": Plan(32, 16), "large": Plan(128, 1)}
    policy = Alternating(**plans, samples_per_phase=1000, lr_scaling=rule, lr_ramp_samples=400)  # type: ignore[arg-type]
    controller = Controller(policy)
    assert controller.lr_scale(0) == 1.0
    controller.observe(Observation(round=1, samples=1000))
    assert controller.lr_scale(1000) == 1.0
    assert controller.lr_scale(1200) == pytest.approx((1 + scale) / 2)
    assert controller.lr_scale(1400) == controller.lr_scale(1900) == scale
    controller.observe(Observation(round=2, samples=2000))
    assert controller.lr_scale(2000) == 1.0, "a fall is taken at once"


def test_a_ramp_that_was_cut_short_goes_on_from_where_it_was() -> None:
    controller = Controller(PostLocal(large=Plan(32, 1, lr_scale=1), local=Plan(32, 4, lr_scale=3), switch_samples=10))
    controller.observe(Observation(round=1, samples=10))
    assert controller.lr_scale(10) == 1.0
    assert controller.lr_scale(10 + 2500) == pytest.approx(2.0)


class Remembering(Policy):
    """Doubles its period whenever the loss has not fallen below the best so far."""

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        best, period = memory.get("best", 1e9), memory.get("period", 1)
        period = period if seen.train_loss < best else min(period * 2, 1024)
        return Decision(
            Plan(8, period), f"period {period}", memory={"best": min(best, seen.train_loss), "period": period}
        )

    def plans(self) -> tuple[Plan, ...]:
        return (Plan(8, 1),)


FIGURES = (
    *("progress", "lr", "train_loss", "train_accuracy", "slowest_compute_s", "sync_wait_s", "transfer_s"),
    *("divergence", "model_sq_norm", "grad_sq_norm", "grad_variance", "noise_scale", "memory_share"),
)


def observed(draw: Random) -> Observation:
    """Any observation. Drawn by itself, since hypothesis takes a hundred times as long over each figure."""

    def figure() -> float:
        return draw.choice((math.nan, 0.0, 1.0, 1e9, draw.uniform(0, 1), 10 ** draw.uniform(-12, 9)))

    return Observation(
        round=draw.randint(1, 100),
        local_step=draw.randint(1, 1000),
        samples=draw.randint(1, 10**6),
        ran=Plan(draw.randint(1, 512), draw.randint(0, 64)),
        delay_steps=draw.randint(0, 16),
        ranks=draw.randint(0, 8),
        steps=draw.randint(0, 64),
        loss_window=draw.randint(0, 10**5),
        loss_trend=draw.choice((math.nan, draw.uniform(-1, 1))),
        **{name: figure() for name in FIGURES},
    )


@pytest.mark.parametrize(
    "policy", [*(kind() for kind in POLICIES.values()), Remembering()], ids=lambda p: type(p).__name__
)
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 30), cut=st.integers(0, 30))
def test_plans_are_a_function_of_observations_through_any_save_and_load(
    policy: Policy, seed: int, count: int, cut: int
) -> None:
    draw = Random(seed)
    seen = [observed(draw) for _ in range(count)]
    whole, split = Controller(policy), Controller(policy)
    for index, observation in enumerate(seen):
        if index == cut:
            saved = json.loads(json.dumps(split.state_dict()))
            split = Controller(policy)
            split.load_state_dict(saved)
        assert whole.observe(observation) == split.observe(observation)
        assert whole.phase.plan == split.phase.plan
        assert json.loads(json.dumps(whole.decision.why)) is not None
        assert whole.lr_scale(observation.samples) == split.lr_scale(observation.samples)


def test_every_policy_runs_by_its_name_alone() -> None:
    for kind in POLICIES.values():
        assert Controller(kind()).plan in kind().plans()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Plan(0), "batch_per_rank = 0"),
        (lambda: Plan(1, -1), "sync_period_steps = -1"),
        (lambda: Plan(1, 1, float("nan")), "lr_scale = nan"),
        (lambda: Alternating(samples_per_phase=0), "samples_per_phase = 0"),
        (lambda: Alternating(samples_per_phase=5, rounds_per_phase=5), "one unit"),
        (lambda: Alternating(last="small"), "last = 'small'"),
        (lambda: Constant(lr_scaling="cubic"), "lr_scaling = 'cubic'"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(make: object, named: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=named):
        make()
