"""Every published rule against its equation, worked out by hand; what is missing moves nothing."""

from __future__ import annotations

import ast
import inspect
import math
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from trainer.control.controller import Controller, scaling
from trainer.errors import ConfigError
from trainer.plan import Observation, Plan
from trainer.policies import (
    FDA,
    POLICIES,
    QSR,
    SWAP,
    AdaptivePeriod,
    Alternating,
    Autopilot,
    BatchGrowth,
    Compose,
    Constant,
    Cycle,
    NoiseScale,
    NormTest,
    Policy,
    PostLocal,
    ScaledGradients,
    SelSync,
    SmallBatchNoise,
)
from trainer.policies import constants as autopilots
from trainer.policies.autopilot import _ranked
from trainer.policies.goodput import Costs, fitted, momentum_of, reach_of
from trainer.policies.worth import worth
from trainer.sync.scaled_rate import ScaledRate
from trainer.sync.step_response import step_response


def follow(policy: Policy, **figures: list[float]) -> list[Plan]:
    """The Plans after each observation of these figures; rounds are of 1,000 samples unless given."""
    controller, plans = Controller(policy), []
    for index, values in enumerate(zip(*figures.values(), strict=True), 1):
        given = dict(zip(figures, values, strict=True))
        seen = Observation(round=index, samples=1_000 * index, local_step=10 * index, steps=10, ranks=2)
        controller.observe(replace(seen, **given))
        plans.append(controller.plan)
    return plans


def periods(plans: list[Plan]) -> list[int]:
    return [plan.sync_period_steps for plan in plans]


def batches(plans: list[Plan]) -> list[int]:
    return [plan.batch_per_rank for plan in plans]


def test_qsr_is_the_square_of_growth_over_rate_with_a_floor_and_a_ceiling() -> None:
    policy = QSR(base_period_steps=4, growth=0.1, max_period_steps=64)
    # (0.1 / 0.05)² = 4, (0.1 / 0.03)² = 11.1, (0.1 / 0.02)² = 25, (0.1 / 0.001)² = 10,000
    assert periods(follow(policy, lr=[0.2, 0.05, 0.03, 0.02, 0.001, 0.0])) == [4, 4, 11, 25, 64, 64]
    warm_up = [0.001, 0.01, 0.02, 0.02, 0.01]
    assert periods(follow(policy, lr=warm_up)) == [4, 4, 4, 25, 64]


def test_adaptive_period_falls_as_the_root_of_the_loss_or_else_by_its_factor() -> None:
    policy = AdaptivePeriod(plan=Plan(8, 32), interval_samples=1_000, shrink=0.5)
    # √(2/2) 32 = 32 is not below 32: 16; √(0.25/2) 32 = 11.3: 12; √(0.125/2) 32 = 8; no fall: 4
    assert periods(follow(policy, train_loss=[2.0, 0.25, 0.125, 0.125])) == [16, 12, 8, 4]
    slow = replace(policy, interval_samples=2_000)
    assert periods(follow(slow, train_loss=[2.0, 0.25, 0.125, 0.125])) == [32, 12, 12, 8]
    timid = replace(policy, plan=Plan(8, 4), shrink=0.99)
    assert periods(follow(timid, train_loss=[2.0] * 5)) == [3, 2, 1, 1, 1], "it ends in frequent averaging"


def test_selsync_and_fda_end_rounds_by_their_signal() -> None:
    plan = Controller(SelSync(change=0.2, max_period_steps=99)).plan
    assert (plan.early_end, plan.early_end_above, plan.sync_period_steps) == ("gradient_change", 0.2, 99)
    plan = Controller(FDA(threshold=350.0)).plan
    assert (plan.early_end, plan.early_end_above, plan.delay_steps) == ("divergence", 350.0, 0)


def test_batch_growth_takes_what_the_batch_can_and_leaves_the_rest_to_the_rate() -> None:
    policy = BatchGrowth(plan=Plan(32, 4), milestones=(2_000, 3_000, 4_000), factor=5.0, max_batch_per_rank=400)
    plans = follow(policy, train_loss=[1.0] * 4)
    assert batches(plans) == [32, 160, 400, 400]
    # rate over batch is what it would be with a decay by 5 at each milestone
    ratios = [plan.lr_scale / plan.batch_per_rank * 32 for plan in plans]
    assert ratios == pytest.approx([1, 1 / 5, 1 / 25, 1 / 125])


def test_noise_scale_sets_the_batch_over_all_ranks_with_a_dead_band_and_a_stay() -> None:
    policy = NoiseScale(plan=Plan(32, 4), multiple=8, dead_band=0.25, min_stay_rounds=1, max_batch_per_rank=512)
    # two ranks: half of the noise scale each
    noise = [10.0, 200.0, 210.0, 2_000.0, 100.0]
    assert batches(follow(policy, noise_scale=noise)) == [32, 104, 104, 512, 56]
    assert batches(follow(replace(policy, min_stay_rounds=3), noise_scale=noise)) == [32, 32, 112, 112, 112]


def test_norm_test_grows_the_batch_to_variance_over_tolerated_norm_and_never_back() -> None:
    policy = NormTest(plan=Plan(32, 4), tolerance=0.5, multiple=1, min_stay_rounds=1, max_batch_per_rank=1_000)
    # tr Σ / (ϑ² ‖G‖²): 4 / (0.25 · 1) = 16, 30 / 0.25 = 120, then 3 / 0.25 = 12
    plans = follow(policy, grad_variance=[4.0, 30.0, 3.0], grad_sq_norm=[1.0, 1.0, 1.0])
    assert batches(plans) == [32, 120, 120]


def test_swap_averages_until_the_smoothed_accuracy_and_then_no_more() -> None:
    policy = SWAP(train_accuracy=0.8, smoothing=0.5)
    # bias-corrected means: 0.5, (0.25 · 0.5 + 0.5 · 0.9) / 0.75 = 0.767, (0.2875 + 0.45) / 0.875 = 0.843
    assert periods(follow(policy, train_accuracy=[0.5, 0.9, 0.9, 0.1])) == [1, 1, 0, 0]
    assert periods(follow(replace(policy, last_samples=1_000), train_accuracy=[math.nan, 0.1])) == [0, 0]


def test_cycle_changes_where_the_loss_is_flat_over_a_window_that_lies_in_the_phase() -> None:
    policy = Cycle(flat=0.01, min_samples=2_000)
    figures = {
        "train_loss": [1.0] * 6,
        "loss_trend": [-1e-3, -1e-6, -1e-6, -1e-6, -1e-6, -1e-3],
        "loss_window": [1_000.0, 2_000.0, 2_000.0, 2_000.0, 2_000.0, 2_000.0],
    }
    assert [plan.sync_period_steps == 1 for plan in follow(policy, **figures)] == [0, 1, 1, 0, 0, 0]


def test_compose_takes_the_batch_of_one_and_the_period_of_the_other() -> None:
    policy = Compose(batch=NoiseScale(plan=Plan(32, 4), min_stay_rounds=1), period=QSR(base_period_steps=2, growth=0.1))
    plans = follow(policy, noise_scale=[640.0, math.nan, 100.0], lr=[0.1, 0.02, math.nan])
    assert batches(plans) == [320, 320, 56]
    assert periods(plans) == [2, 25, 25]
    patient = replace(policy, batch=replace(NoiseScale(plan=Plan(32, 4)), min_stay_rounds=3))
    plans = follow(patient, noise_scale=[640.0] * 4, lr=[0.1, 0.05, 0.04, 0.03])
    assert batches(plans) == [32, 32, 320, 320], "the period's changes do not begin the batch's phases"
    assert periods(plans) == [2, 4, 6, 11]


MEASURED = {Constant, Alternating, PostLocal, BatchGrowth, SelSync, FDA, SmallBatchNoise}
"""Policies that look at counts only, or whose signal ends rounds."""


@pytest.mark.parametrize("kind", [kind for kind in POLICIES.values() if kind not in MEASURED])
def test_what_was_not_measured_moves_no_plan_and_the_record_says_so(kind: type[Policy]) -> None:
    controller = Controller(kind())
    before = controller.phase
    for index in range(1, 40):
        controller.observe(Observation(round=index, samples=5_000 * index, local_step=10 * index, steps=10, ranks=2))
        assert controller.phase == before
        told = str(controller.decision.why)
        assert "not measured" in told or "held" in told


@pytest.mark.parametrize(
    ("rule", "expected"),
    # noise 300 on a base of 100 samples: (300 / 100 + 1) / (300 / 400 + 1) = 4 / 1.75
    [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0), ("gain", 4 / 1.75), ("norm", math.sqrt(4 / 1.75))],
)
def test_rate_rules(rule: Any, expected: float) -> None:
    assert scaling(rule, 4.0, 100.0, 300.0) == pytest.approx(expected)
    assert scaling("gain", 4.0, 100.0, math.nan) == 2.0
    assert scaling("gain", 4.0, 100.0, 1e9) == pytest.approx(4.0)
    assert scaling("gain", 4.0, 100.0, 1e-9) == pytest.approx(1.0)
    assert scaling("norm", 4.0, 100.0, math.nan) == 1.0
    assert scaling("norm", 4.0, 100.0, 1e9) == pytest.approx(2.0)  # the root of B / b
    # a step of Adam has grown by the gain's root by itself
    assert scaling("gain", 4.0, 100.0, 300.0, response=0.0) == pytest.approx(math.sqrt(4 / 1.75))


def test_scaled_gradients_are_as_long_as_a_small_batchs() -> None:
    """Gradients with ‖G‖² = 2 and a noise scale of 300: E‖g_b‖² = 2 (1 + 300 / b)."""
    policy = ScaledGradients(small=Plan(50, 1), large=Plan(200, 1), lr_ramp_samples=0)
    controller = Controller(policy)
    assert (controller.plan, controller.lr_scale(0)) == (Plan(200, 1), 1.0)
    controller.observe(Observation(round=1, samples=4_000, ranks=2, noise_scale=300.0))
    small, large = (2 * (1 + 300 / (2 * batch)) for batch in (50, 200))
    assert controller.lr_scale(4_000) ** 2 * large == pytest.approx(small)
    assert controller.plan == Plan(200, 1)
    with pytest.raises(ConfigError, match=r"small\.batch_per_rank = 64: must be at most large"):
        ScaledGradients(small=Plan(64, 1), large=Plan(32, 1))


# ---- autopilot


def test_a_plane_is_fitted_exactly_and_promises_nothing_unseen() -> None:
    def line(*points: tuple[float, float]) -> Any:
        return pytest.approx(fitted([(x, 0.0, t) for x, t in points]), abs=1e-9)

    assert all(map(math.isnan, fitted([])))
    assert line((32, 0.64)) == (0, 0.02, 0), "through the origin"
    assert line((32, 0.164), (128, 0.356), (64, 0.228)) == (0.1, 0.002, 0)
    assert line((1, 2.0), (2, 1.0)) == (1.5, 0, 0)
    assert line((1, 1.0), (2, 3.0)) == (0, 7 / 5, 0)
    plane = [(x, y, 0.01 + 0.001 * x + 0.02 * y) for x, y in ((32, 0), (64, 0), (32, 0.25), (64, 0.5), (32, 0.5))]
    assert fitted(plane) == pytest.approx((0.01, 0.001, 0.02))
    assert fitted([(32, 0, 0.032), (32, 0.5, 0.042)]) == pytest.approx((0, 0.001, 0.02))
    assert fitted([(32, 0, 0.032), (32, 0.5, 0.022)])[2] == 0, "an average does not speed training up"


def test_an_average_beside_training_is_not_free() -> None:
    costs = Costs()
    for delay, period, step_s in ((0, 2, 0.02 + 0.5 * 0.01), (2, 2, 0.02 + 0.01)):
        seen = seen_by(Plan(32, period, delay_steps=delay), round=1, transfer_s=0.01, delay_steps=delay)
        seen = replace(seen, plan=seen.ran, phase_steps=10 * period, slowest_compute_s=period * step_s)
        costs = Costs.restored(costs.saw(replace(seen, sync_wait_s=0.0 if delay else 0.01)).state())
        assert (costs.beside_s > 0) == (delay > 0), "none is promised, and none feared, before a hidden one was seen"
    assert costs.step(32) == pytest.approx(0.02)
    assert costs.beside_s == pytest.approx(0.02), "of which one that is waited for takes half"
    hidden, blocking = (
        worth(Plan(32, 4, delay_steps=delay, wire_format="float32"), costs, 2, 32, 0.01) for delay in (1, 0)
    )
    assert hidden.samples_per_s == pytest.approx(256 / (0.08 + 0.02))
    assert blocking.samples_per_s == pytest.approx(256 / (0.08 + 0.5 * 0.02 + 0.01))


def visited(plan: Plan, momentum: float = 0.9, drift: float = 1e-7, **figures: Any) -> Observation:
    """A round of ten federated devices whose slowest trains 20 samples/s, with a transfer of a second up and down."""
    steps, up = plan.sync_period_steps, autopilots.CONSTANTS.bytes_of_float32[plan.wire_format or "float32"]
    reach = reach_of(momentum, steps)
    known: dict[str, Any] = {
        "slowest_compute_s": steps * plan.batch_per_rank / 20,
        "transfer_s": 0.5 + 0.5 * up,
        "sync_wait_s": 0.5 + 0.5 * up,
        "reach_steps": reach,
        "divergence": drift * reach**1.5,
        "model_sq_norm": 1.0,
        "lr": 1.0,
        "noise_scale": 1_000.0,
    }
    return Observation(ranks=10, steps=steps, ran=plan, plan=plan, phase_steps=99, phase=0, **known | figures)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9, 0.99])
def test_momentum_follows_from_how_far_devices_reach(momentum: float) -> None:
    for steps in (2, 7, 64):
        by_hand = sum((1 - momentum**step) / (1 - momentum) for step in range(1, steps + 1))
        assert reach_of(momentum, steps) == pytest.approx(by_hand)
        assert momentum_of(by_hand, steps) == pytest.approx(momentum, abs=1e-6)


def test_devices_seconds_go_by_their_samples_and_their_optimizers_begin_anew() -> None:
    costs = Costs()
    for _ in range(3):
        costs = Costs.restored(costs.saw(visited(Plan(16, 2, delay_steps=0, wire_format="int4"))).state())
    assert costs.momentum == pytest.approx(0.9)
    for plan in (Plan(16, 1), Plan(16, 8, wire_format="int8"), Plan(64, 4, wire_format="int4")):
        seen = visited(plan)
        assert costs.round(plan, 10) == pytest.approx(seen.slowest_compute_s + seen.transfer_s)
        found = worth(plan, costs, 10, 16, 0.004)
        assert found.reach == pytest.approx(seen.reach_steps * 0.1 / plan.sync_period_steps)
        assert found.drift == pytest.approx(seen.divergence / 2.5)
    at_period_1 = costs.saw(visited(Plan(16, 1)))
    assert at_period_1.momentum == costs.momentum, "of which one step tells nothing"


def driven_by_devices(drift: float, rounds: int = 60, **figures: Any) -> list[Plan]:
    controller, found, steps = Controller(Autopilot(batch_per_rank=16)), [], 0
    for number in range(1, rounds + 1):
        plan = controller.plan
        found.append(plan)
        steps += plan.sync_period_steps
        controller.observe(visited(plan, drift=drift, round=number, local_step=steps, **figures))
    return found


def test_autopilot_plans_devices_longer_rounds_until_they_drift() -> None:
    plans = {drift: driven_by_devices(drift) for drift in (1e-9, 1e-5, 1e-3)}
    for tried in plans.values():
        assert all(not plan.delay_steps and (plan.fragments or 1) == 1 for plan in tried), "devices have neither"
    periods = [tried[-1].sync_period_steps for tried in plans.values()]
    assert periods == sorted(periods, reverse=True)
    assert periods[0] == 64
    assert 2 < periods[1] < 64
    assert periods[2] <= 2
    late = driven_by_devices(1e-5, progress=0.9)[-1]
    assert late.sync_period_steps < periods[1]
    assert late.batch_per_rank == 16


def test_what_a_plan_took_is_believed_before_what_its_parts_let_expect() -> None:
    def saw(costs: Costs, plan: Plan, **figures: float) -> Costs:
        seen = replace(seen_by(plan, round=1, transfer_s=0.1), plan=plan, phase_steps=100, slowest_compute_s=0.08)
        return Costs.restored(costs.saw(replace(seen, **figures)).state())

    waited, hidden, other = (Plan(32, 4, delay_steps=delay, wire_format="float32", fragments=1) for delay in (0, 2, 3))
    costs = Costs()
    for _ in range(100):
        costs = saw(costs, waited, sync_wait_s=0.12)
    assert costs.round(waited, 2) == pytest.approx(0.08 + 0.12), "though a transfer takes 0.1"
    assert costs.round(hidden, 2) == pytest.approx(0.08 + 0.06), "none was tried: its parts tell"
    for _ in range(100):
        costs = saw(costs, hidden, sync_wait_s=0.09)
    assert costs.round(hidden, 2) == pytest.approx(0.08 + 0.09)
    assert costs.round(other, 2) == pytest.approx(0.08 + 0.04), "not tried, so its parts tell"
    assert costs.round(waited, 2) == pytest.approx(0.08 + 0.12), "as before"
    for _ in range(100):
        costs = saw(costs, hidden, slowest_compute_s=0.16, transfer_s=0.2, sync_wait_s=0.18)
    assert costs.round(waited, 2) == pytest.approx(2 * (0.08 + 0.12), rel=1e-3), "as all that is twice as slow"


def test_a_machine_that_slows_down_is_not_taken_for_what_averages_cost() -> None:
    def saw(costs: Costs, delay: int, step_s: float) -> Costs:
        plan = Plan(32, 4, delay_steps=delay, wire_format="int4")
        seen = replace(seen_by(plan, round=1, transfer_s=0.01, delay_steps=delay), plan=plan, phase_steps=100)
        return Costs.restored(costs.saw(replace(seen, slowest_compute_s=4 * step_s)).state())

    costs = Costs()
    for delay, step_s in [(0, 0.02 + 0.5 * 0.002)] * 20 + [(1, 0.022)] * 20:
        costs = saw(costs, delay, step_s)
    assert costs.step(32) == pytest.approx(0.02)
    assert costs.beside_s == pytest.approx(4 * 0.002)
    for _ in range(100):
        costs = saw(costs, 1, 0.033)
    assert costs.step(32) == pytest.approx(0.03, rel=1e-3), "though no step without an average was seen since"
    assert costs.beside_s == pytest.approx(4 * 0.003, rel=1e-3)


def test_worth_is_throughput_times_efficiency() -> None:
    costs = Costs(step_s={"10 0 0": 0.1}, transfer_s={"float32": 1.0}, noise_scale=200.0, unit_drift=0.1, lr=0.1)
    blocking = worth(Plan(10, 4, delay_steps=0, wire_format="float32"), costs, 2, 10, 0.01)
    assert blocking.samples_per_s == pytest.approx(2 * 10 * 4 / (0.4 + 1.0))
    assert blocking.efficiency == pytest.approx(1 / (1 + 3.2e-3 / 0.01)), "4^2.5 / (2.5 * 4) = 3.2"
    assert worth(Plan(10, 4, wire_format="int4"), costs, 2, 10, 0.01).efficiency == pytest.approx(0.99 / 1.32)
    hidden = worth(Plan(20, 4, delay_steps=4, wire_format="int8"), costs, 2, 10, 0.01)
    assert hidden.samples_per_s == pytest.approx(2 * 20 * 4 / 0.8)
    drift = 1e-3 * (8**2.5 - 4**2.5) / (2.5 * 4)
    assert hidden.efficiency == pytest.approx(0.998 * (200 + 20) / (200 + 40) / (1 + drift / 0.01))
    of_four = worth(Plan(10, 4, delay_steps=0, wire_format="float32"), costs, 4, 10, 0.01)
    assert of_four.efficiency == pytest.approx(1 / (1 + 3**1.5 * 3.2e-3 / 0.01)), "as periods of a third"
    gradients = worth(Plan(10, 1), costs, 2, 10, 0.01)
    assert gradients.samples_per_s == pytest.approx(20 / (0.1 + 0.95))
    assert gradients.efficiency == 1.0


def test_a_network_that_changes_is_noticed_by_what_goes_over_it() -> None:
    def saw(costs: Costs, plan: Plan, **figures: float) -> Costs:
        seen = seen_by(plan, round=1, transfer_s=figures.pop("transfer_s", math.nan))
        return costs.saw(replace(seen, plan=plan, phase_steps=100, **figures))

    averages, gradients = Plan(32, 8, delay_steps=0, wire_format="int8"), Plan(32, 1)
    costs = Costs(step_s={"32 0 0": 0.04}, transfer_s={"float32": 0.4, "int8": 0.1})
    for _ in range(100):
        costs = saw(costs, averages, transfer_s=1.0)
    assert costs.transfer("int8") == pytest.approx(0.266, rel=1e-3)
    assert costs.transfer("float32") == pytest.approx(0.4 * 2.66, rel=1e-3), "not in use, but over the same network"
    before = worth(gradients, costs, 2, 32, 0.01).samples_per_s
    for wait_s in (0.06, 0.6):  # gradients tell by how long training waits for them
        for _ in range(100):
            costs = saw(costs, gradients, sync_wait_s=wait_s, slowest_compute_s=0.04)
        assert worth(gradients, costs, 2, 32, 0.01).samples_per_s == pytest.approx(64 / (0.04 + wait_s), rel=1e-2)
        if wait_s == 0.06:
            assert worth(gradients, costs, 2, 32, 0.01).samples_per_s > 5 * before
            first = costs.transfer("int8")
    assert costs.transfer("int8") == pytest.approx(first * 0.62 / 0.08, rel=1e-2)


def test_a_hidden_average_takes_longer_than_one_that_is_waited_for() -> None:
    def saw(costs: Costs, plan: Plan, transfer_s: float) -> Costs:
        return costs.saw(
            replace(seen_by(plan, round=1, transfer_s=0.0), transfer_s=transfer_s, plan=plan, phase_steps=99)
        )

    waited = Plan(32, 2, delay_steps=0, wire_format="int4", fragments=1)
    costs = saw(Costs(), waited, 0.08)
    assert costs.transfer("int4", hidden=True) == pytest.approx(0.08), "the best guess"
    costs = saw(costs, Plan(32, 6, delay_steps=2, wire_format="int4", fragments=2), 0.09)
    assert costs.transfer("int4", 2, hidden=True) == pytest.approx(0.09)
    assert costs.transfer("int4", hidden=True) == pytest.approx(2 * 0.09 / 1.25), "as its halves tell"
    assert costs.transfer("int4") == pytest.approx(0.08)


def test_drift_is_learned_from_snapshots_which_a_delay_leaves_as_far_apart() -> None:
    at_once, late = (
        Costs().saw(seen_by(Plan(32, 8, delay_steps=delay), round=1, transfer_s=0.1, delay_steps=delay))
        for delay in (0, 5)
    )
    assert at_once.drift == late.drift == pytest.approx(1e-5)


def test_drift_follows_the_learning_rate_at_once() -> None:
    costs = Costs()
    for lr in (0.001, 0.002, 0.003):  # a warm-up: steps, and so distances, grow with the rate
        costs = costs.saw(seen_by(Plan(32, 8), round=1, transfer_s=0.1, lr=lr, divergence=8**1.5 * 10 * lr**2))
        assert costs.drift == pytest.approx(10 * lr**2)
    later = costs.saw(replace(Observation(), lr=0.1))
    assert later.drift == pytest.approx(0.1), "and is known for a rate that it was not measured at"
    lower = Costs.restored(later.state()).saw(replace(Observation(), lr=0.02))
    assert lower.drift == pytest.approx(0.1 / 5), "less than by the square, since it is held against the noise's share"


def test_as_the_rate_falls_a_hidden_average_stays_short_until_near_the_end() -> None:
    """Periods that grow with the inverse square of a cosine's rate cost 0.2 points of accuracy (benchmarks/README)."""
    costs = Costs(step_s={"32 0 0": 0.0225, "32 0.125 0": 0.024}, transfer_s={"int4": 0.085, "int4/3 beside": 0.042})
    costs, policy = replace(costs, unit_drift=0.022, most_lr=0.05, noise_scale=100.0), Autopilot()
    chosen = []
    for progress in (0.1, 0.5, 0.8, 0.95):
        costs = replace(costs, lr=0.05 * 0.5 * (1 + math.cos(math.pi * progress)))
        found = (policy._worth(plan, costs, 2) for plan in policy._candidates(costs, 32, 64))
        scored = [(policy._score(each, progress > 0.75), each) for each in found if each.drift <= policy.max_divergence]
        best = _ranked(scored)[0][1].plan
        chosen.append((best.sync_period_steps, best.delay_steps))
    assert chosen == [(6, 2), (8, 2), (8, 2), (32, 7)]


def seen_by(
    plan: Plan, *, round: int, transfer_s: float, noise: float = 2_000.0, memory: float = math.nan, **figures: float
) -> Observation:
    """What a machine of 1 ms a sample and 10 ms a step would tell of a round by this Plan."""
    steps = max(plan.sync_period_steps, 1)
    bytes_of = {"float32": 1.0, "int8": 0.266, "int4": 0.141, None: 1.0}[plan.wire_format]
    step_s = 0.01 + 0.001 * plan.batch_per_rank
    hiding = plan.delay_steps if isinstance(plan.delay_steps, int) else 0
    return replace(
        Observation(
            round=round,
            local_step=100 * round,
            samples=1_000 * round,
            ran=plan,
            ranks=2,
            steps=steps,
            slowest_compute_s=steps * step_s,
            sync_wait_s=max(0.0, transfer_s * bytes_of - (plan.fragments or 1) * hiding * step_s),
            transfer_s=transfer_s * bytes_of / (plan.fragments or 1),
            noise_scale=noise,
            divergence=1e-5 * steps**1.5,
            model_sq_norm=1.0,
            lr=1.0,
            progress=0.1,
            memory_share=memory * plan.batch_per_rank,
        ),
        **figures,
    )


def cruise(policy: Autopilot, transfer_s: float, rounds: int = 60, **figures: float) -> Controller:
    controller = Controller(policy)
    for index in range(1, rounds):
        controller.observe(seen_by(controller.plan, round=index, transfer_s=transfer_s, **figures))
    return controller


class Unlike(torch.optim.SGD):
    """An optimizer of which no twin can be made."""

    def __init__(self, parameters: Any, model: torch.nn.Module) -> None:
        super().__init__(parameters, lr=0.1)


def test_the_length_of_a_step_follows_its_gradients_by_a_power_of_the_optimizers() -> None:
    model, drawn = torch.nn.Linear(3, 2), torch.random.get_rng_state()
    every, kinds = list(model.parameters()), torch.optim
    for sgd in (kinds.SGD(every, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1), Unlike(every, model)):
        assert step_response(sgd) == 1.0
    for adam in (
        kinds.AdamW(every, 1e-3, fused=True),
        kinds.RMSprop(every),
        kinds.Adagrad(every),
        kinds.Adafactor(every),
    ):
        assert step_response(adam) == 0.0
    assert step_response(kinds.LBFGS(every)) == 1.0, "it needs a closure"
    assert torch.equal(drawn, torch.random.get_rng_state()), "a run's own draws stay as they are"


def test_local_steps_of_adam_fall_short_of_those_by_the_mean_gradient() -> None:
    """What N ranks' steps have in common is the root of N times shorter, where steps do not follow the gradient."""
    costs = Costs(step_s={"32 0 0": 1.0}, transfer_s={"float32": 1.0, "gradients": 1.0}, response=0.0)
    by_ranks = {ranks: worth(Plan(32, 4), costs, ranks, 32, 0.004).efficiency for ranks in (1, 2, 4)}
    assert by_ranks == {1: 1.0, 2: pytest.approx(0.5**0.5), 4: pytest.approx(0.5)}
    assert worth(Plan(32, 1), costs, 4, 32, 0.004).efficiency == 1.0
    assert worth(Plan(32, 4), replace(costs, response=0.5), 4, 32, 0.004).efficiency == pytest.approx(0.5**0.5)
    assert worth(Plan(32, 4), replace(costs, response=1.0), 4, 32, 0.004).efficiency == 1.0


@pytest.mark.parametrize(
    ("response", "transfer_s", "stays"), [(0.0, 0.02, True), (0.0, 2.0, False), (1.0, 0.02, False)]
)
def test_autopilot_keeps_averaged_gradients_where_local_steps_fall_short_and_the_network_is_fast(
    response: float, transfer_s: float, stays: bool
) -> None:
    controller = Controller(Autopilot(), response)
    plans = [controller.plan]
    for index in range(1, 60):
        figures = {"step_response": response, "noise": 100.0}
        controller.observe(seen_by(controller.plan, round=index, transfer_s=transfer_s, **figures))
        plans.append(controller.plan)
    assert plans[0].sync_period_steps == (1 if response < 1 else 2)
    assert (plans[-1].sync_period_steps == 1) == stays
    if stays:
        assert {plan.sync_period_steps for plan in plans} == {1}, "such a run is DDP's, bit for bit"


def test_every_constant_of_the_autopilot_says_its_source_and_its_error() -> None:
    body = next(each for each in ast.parse(inspect.getsource(autopilots)).body if isinstance(each, ast.ClassDef)).body
    told = {
        field.target.id: text.value.value
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }
    assert set(told) == {field.name for field in fields(autopilots.Constants)}
    for name, text in told.items():
        assert text.index("Source:") < text.index("Error:"), name


@pytest.mark.parametrize(("noise", "larger"), [(2_000.0, True), (30.0, False)])
def test_autopilot_measures_in_the_shortest_rounds_and_a_larger_batch_only_where_noise_allows_it(
    noise: float, larger: bool
) -> None:
    """A run's first steps are where replicas that part cost most."""
    controller, phases = Controller(Autopilot()), [("probe", 32, 2, 0)]
    steps = 0
    for index in range(1, 100):
        steps += controller.plan.sync_period_steps
        controller.observe(seen_by(controller.plan, round=index, local_step=steps, transfer_s=0.3, noise=noise))
        assert (controller.phase.name == "probe") == (steps < 32)
        plan = controller.plan
        phase = (controller.phase.name, plan.batch_per_rank, plan.sync_period_steps, plan.delay_steps)
        if phase != phases[-1]:
            phases.append(phase)
    assert (phases[1][0], phases[1][1]) == ("cruise", 32), "at the run's start nothing but the smallest batch"
    larger_probes = [phase for phase in phases if phase[0] == "probe larger"]
    assert larger_probes == ([("probe larger", 64, phases[1][2], 0)] if larger else [])
    costs = Costs.restored(controller.state_dict()["memory"]["costs"])
    assert (costs.largest_batch > 32) == larger


def test_a_period_grows_no_further_at_once_than_divergence_was_measured_for() -> None:
    """A warm-up, whose replicas hardly part, would promise the longest rounds to the full rate that follows."""
    controller, periods = Controller(Autopilot()), [2]
    for index in range(1, 100):
        figures = {"divergence": 1e-12, "noise": 30.0}
        controller.observe(seen_by(controller.plan, round=index, transfer_s=20.0, **figures))
        if controller.plan.sync_period_steps != periods[-1]:
            periods.append(controller.plan.sync_period_steps)
    assert periods == [2, 8, 32, 64]


def test_autopilot_averages_more_rarely_and_hides_more_where_the_network_is_slower() -> None:
    slow, fast = (cruise(Autopilot(), transfer_s).plan for transfer_s in (5.0, 0.001))
    assert slow.sync_period_steps > fast.sync_period_steps
    assert slow.wire_format in ("int8", "int4")
    hiding = cruise(Autopilot(care=1), 5.0).plan
    assert isinstance(hiding.delay_steps, int)
    assert hiding.delay_steps > 0


def test_autopilot_hides_a_slow_average_in_fragments_where_a_whole_one_would_come_late() -> None:
    """Of 42 ms a step an average of 140 ms takes four; a quarter of it takes one, and replicas part for fewer steps."""
    policy = Autopilot()
    plan = cruise(policy, 1.0, noise=30.0).plan
    assert plan.fragments is not None
    assert plan.fragments > 1
    whole = math.ceil(0.141 / 0.042)
    assert isinstance(plan.delay_steps, int)
    assert 0 < plan.delay_steps < whole
    assert cruise(policy, 0.01, noise=30.0).plan.fragments == 1, "one step hides the whole"


def test_an_average_in_fragments_is_hidden_sooner_at_more_of_the_cores() -> None:
    costs = Costs(step_s={"32 0 0": 0.04, "32 0.125 0": 0.042}, transfer_s={"int4": 0.12}, unit_drift=1e-5, lr=1.0)
    whole, thirds = (
        worth(Plan(32, 8, delay_steps=delay, wire_format="int4", fragments=fragments), costs, 2, 32, 0.01)
        for delay, fragments in ((3, 1), (2, 3))
    )
    assert costs.transfer("int4", 3) == pytest.approx(0.04 * 1.5)
    assert whole.samples_per_s == pytest.approx(512 / (0.32 + 0.016))
    assert thirds.samples_per_s == pytest.approx(512 / (0.32 + 1.5 * 0.016))
    assert thirds.drift < whole.drift
    late = worth(Plan(32, 3, delay_steps=3, wire_format="int4", fragments=3), costs, 2, 32, 0.01)
    assert late.samples_per_s == pytest.approx(192 / 0.18), "a link has no time for more than this"
    sooner = worth(Plan(32, 8, delay_steps=1, wire_format="int4", fragments=3), costs, 2, 32, 0.01)
    slowed_s = 0.04 + 1.5 * 0.016 / 8
    assert sooner.samples_per_s == pytest.approx(512 / (8 * slowed_s + 3 * (0.06 - slowed_s))), "hidden by slowed steps"


def test_of_plans_that_are_about_as_good_the_one_that_averages_least_is_taken() -> None:
    """A link whose average takes longer than a step, and costs the cores next to nothing."""
    costs = Costs(
        step_s={"32 0 0": 0.02}, transfer_s={"int4 beside": 0.03, "int4/2 beside": 0.018, "int4/4 beside": 0.012}
    )
    costs = replace(costs, unit_drift=1e-9, lr=1.0)
    policy = Autopilot()
    found = [worth(plan, costs, 2, 32, policy.max_divergence) for plan in policy._candidates(costs, 32, 4)]
    scored = [(each.goodput, each) for each in found if each.plan.wire_format == "int4" and each.plan.delay_steps == 1]
    assert {each.plan.fragments for _, each in scored} == {1, 2, 3, 4}
    _, best = _ranked(scored)[0]
    assert (best.plan.sync_period_steps, best.plan.fragments) == (4, 2)


def test_autopilot_raises_the_batch_only_where_noise_allows_it() -> None:
    assert cruise(Autopilot(), 0.1, noise=1e6).plan.batch_per_rank == 256
    assert cruise(Autopilot(), 0.1, noise=30.0).plan.batch_per_rank == 32
    assert cruise(Autopilot(), 0.1, noise=1e6, memory=0.2 / 32).plan.batch_per_rank == 128, "where memory has room"


def test_autopilot_ends_small_and_stays_within_its_bound() -> None:
    policy = Autopilot()
    late = cruise(policy, 0.5, noise=1e6, progress=0.8)
    assert (late.phase.name, late.plan.batch_per_rank) == ("late", 32)
    apart = cruise(policy, 0.5, divergence=1.0).plan
    assert apart.sync_period_steps <= 2, "replicas that part so fast are averaged at once"


def test_autopilot_does_not_flap() -> None:
    policy, changes = Autopilot(), 0
    controller = Controller(policy)
    for index in range(1, 200):
        wobble = 1 + 0.02 * (-1) ** index
        changes += controller.observe(seen_by(controller.plan, round=index, transfer_s=0.3 * wobble))
    assert changes <= 4


def test_autopilot_says_what_it_compared_and_what_came_true() -> None:
    why = cruise(Autopilot(min_stay_steps=1), 0.3).decision.why
    assert {"candidates", "current", "came_true", "expected"} <= why.keys()
    assert why["came_true"] == pytest.approx(why["expected"], rel=0.3)
    goodputs = [each["goodput"] for each in why["candidates"]]
    assert min(goodputs) > 0.9 * max(goodputs)


def test_targets_differ() -> None:
    few, fast = cruise(Autopilot(target="bytes"), 0.5).plan, cruise(Autopilot(target="time"), 0.5).plan
    sent = {"float32": 1.0, "int8": 0.266, "int4": 0.141}
    bytes_of = [sent[str(plan.wire_format)] / (plan.sync_period_steps * plan.batch_per_rank) for plan in (few, fast)]
    assert bytes_of[0] <= bytes_of[1]
    careful, quick = (
        cruise(Autopilot(target=target, min_stay_steps=1), 0.5, divergence=1e-3).decision.why["candidates"][0]
        for target in ("accuracy", "time")
    )
    assert careful["efficiency"] > quick["efficiency"]


def test_care_trades_speed_for_what_a_sample_teaches() -> None:
    chosen = [
        cruise(Autopilot(care=care, min_stay_steps=1), 0.5, divergence=1e-3).decision.why["candidates"][0]
        for care in (1, 3, 12)
    ]
    for quick, careful in pairwise(chosen):
        assert quick["efficiency"] < careful["efficiency"]
        assert quick["samples_per_s"] > careful["samples_per_s"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Plan(1, 1, delay_steps=2), r"delay_steps = 2: must be in 0 \.\. sync_period_steps \(1\)"),
        (lambda: Plan(1, 4, wire_format="int3"), "wire_format = 'int3': choose one of float32"),  # type: ignore[arg-type]
        (lambda: Plan(1, 1, early_end="divergence", early_end_above=1.0), "early_end = 'divergence': needs"),
        (lambda: Plan(1, 4, early_end="divergence"), r"early_end_above = 0\.0"),
        (lambda: Compose(batch=NoiseScale(lr_scaling="gain")), r"batch\.lr_scaling = 'gain': has no effect there"),
        (lambda: Compose(batch=Autopilot()), "batch = 'autopilot': chooses batch and period by what both cost"),
        (lambda: QSR(growth=0), "growth = 0: must be above 0"),
        (lambda: QSR(max_period_steps=2), "max_period_steps = 2: must be at least 4"),
        (lambda: AdaptivePeriod(plan=Plan(8, 32, delay_steps=8)), r"min_period_steps = 1: must be .* \(8\)"),
        (lambda: AdaptivePeriod(shrink=1.0), r"shrink = 1\.0: must be above 0 and below 1"),
        (lambda: SelSync(change=-1), "change = -1: must be above 0"),
        (lambda: FDA(threshold=0), "threshold = 0: must be above 0"),
        (lambda: BatchGrowth(milestones=(5, 3)), r"milestones = \(5, 3\): must be above 0 and rise"),
        (lambda: BatchGrowth(factor=1.0), r"factor = 1\.0: must be above 1"),
        (lambda: NoiseScale(share=0), "share = 0: must be above 0"),
        (lambda: NormTest(tolerance=0), "tolerance = 0: must be above 0"),
        (lambda: NormTest(max_batch_per_rank=8), "max_batch_per_rank = 8: must be 32 or more"),
        (lambda: SWAP(train_accuracy=1.5), r"train_accuracy = 1\.5: must be above 0 and at most 1"),
        (lambda: SWAP(alone=Plan(32, 4)), r"alone\.sync_period_steps = 4: must be 0"),
        (lambda: Cycle(flat=0), "flat = 0: must be above 0"),
        (lambda: Autopilot(max_divergence=0), "max_divergence = 0: must be above 0"),
        (lambda: Autopilot(care=0.5), r"care = 0\.5: must be at least 1"),
        (lambda: Autopilot(target="fun"), "target = 'fun': choose one of time, bytes, accuracy"),  # type: ignore[arg-type]
        (lambda: Autopilot(late_from=2), r"late_from = 2: must be in 0 \.\. 1"),
    ],
)
def test_impossible_settings_are_refused_with_their_range(make: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_a_jump_of_the_rate_needs_no_momentum_correction() -> None:
    """torch's SGD keeps the rate outside its velocity, which equals the other form with Goyal et al.'s correction."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    factors = iter((1.0, 1.0, 4.0, 4.0, 0.5))
    scaled = ScaledRate(optimizer, lambda _: next(factors))
    scaled.open()
    ours, velocity, before = weight.detach().clone(), torch.zeros(2, dtype=torch.float64), 0.1
    for factor in (1.0, 1.0, 4.0, 4.0, 0.5):
        rate = 0.1 * factor
        velocity = 0.9 * (rate / before) * velocity + rate * ours**3
        ours, before = ours - velocity, rate
        weight.grad = weight.detach() ** 3
        optimizer.step()
        torch.testing.assert_close(weight.detach(), ours)
    scaled.close()
    assert optimizer.param_groups[0]["lr"] == 0.1
