"""Signals on problems whose answer is known, through real ranks where they come from ranks."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from ranks import run
from torch import nn

from trainer import Constant, LocalSGD, Plan, SyncConfig
from trainer.control.reports import SKETCH
from trainer.control.signals import Signals, Smoothed, noise, slope
from trainer.distributed.world import World
from trainer.sync.gradient_notes import GradientNotes

DIMENSION, DEVIATION, DISTANCE, BATCH = 4_000, 0.5, 2.0, 16
TRUE_VARIANCE = DIMENSION * DEVIATION**2
TRUE_SQ_NORM = DISTANCE**2


class Quadratic(nn.Module):
    """½ ‖w − x‖² over samples x: the gradient of one sample is w − x, of all w − mean x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(DIMENSION))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.weight - x).square().sum(dim=1).mean()


def watched(world: World, period: int, rounds: int) -> list[Any]:
    """What a model that hardly moves is observed to have; its mean gradient is 2 long, along the first axis."""
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    draw = torch.Generator().manual_seed(world.rank)
    seen = []
    settings = SyncConfig(observe_steps=2)
    with LocalSGD(model, optimizer, Constant(Plan(BATCH, period)), settings=settings, world=world) as sync:
        for _ in range(rounds * max(period, 2)):
            x = torch.randn(BATCH, DIMENSION, generator=draw) * DEVIATION
            x[:, 0] += DISTANCE
            optimizer.zero_grad()
            loss = sync.model(x)
            loss.backward()
            optimizer.step()
            seen += [ended.seen for ended in sync.step(loss, BATCH)]
    return seen


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_noise_scale_of_a_known_problem_in_both_kinds_of_phase(ranks: int) -> None:
    estimates = []
    for period in (1, 4):
        each = run(ranks, watched, period, 150)
        assert [o.noise_scale for o in each[0][1:]] == [o.noise_scale for o in each[1][1:]], "one on all ranks"
        settled = each[0][50:]
        variance = statistics.mean(seen.grad_variance for seen in settled)
        sq_norm = statistics.mean(seen.grad_sq_norm for seen in settled)
        assert variance == pytest.approx(TRUE_VARIANCE, rel=0.1)
        assert sq_norm == pytest.approx(TRUE_SQ_NORM, rel=0.25)
        estimates.append(variance / sq_norm)
    assert estimates[1] == pytest.approx(estimates[0], rel=0.25)
    assert estimates[0] == pytest.approx(TRUE_VARIANCE / TRUE_SQ_NORM, rel=0.25)


def test_one_rank_alone_knows_no_noise_scale() -> None:
    assert all(math.isnan(seen.noise_scale) for seen in run(1, watched, 4, 3)[0])


def test_a_sketch_keeps_products_in_the_mean_over_its_signs() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(70_000), torch.randn(70_000)
    other += 0.5 * one
    true = float(torch.dot(one, other))
    found = []
    for number in range(200):
        sketches = []
        for vector in (one, other):
            notes = GradientNotes(torch.device("cpu"))
            notes.note([vector[:150], vector[150:]], number)
            header = notes.header()
            assert header["grad_sq"] == pytest.approx(float(vector.square().sum()), rel=1e-4)
            sketches.append([header[f"sketch{index}"] for index in range(SKETCH)])
        found.append(sum(a * b for a, b in zip(*sketches, strict=True)))
    deviation = float(one.norm() * other.norm()) / math.sqrt(SKETCH)
    assert statistics.mean(found) == pytest.approx(true, abs=4 * deviation / math.sqrt(200))
    assert statistics.stdev(found) < 3 * deviation


def test_noise_by_hand() -> None:
    # gradients (3, 0) and (1, 2) of 10 samples each: mean (2, 1), norms 9, 5 and 5
    headers = [
        {"grad_sq": 9.0, "mean_grad_sq": 5.0, "steps": 1, "samples": 10},
        {"grad_sq": 5.0, "mean_grad_sq": 5.0, "steps": 1, "samples": 10},
    ]
    assert noise(headers) == pytest.approx((2 * 5 - 7, (7 - 5) * 10 * 2))
    headers[1]["grad_sq"] = math.nan
    assert all(math.isnan(value) for value in noise(headers))


def test_smoothing_is_right_from_the_first_value_on() -> None:
    smoothed = Smoothed(decay=0.9)
    assert math.isnan(smoothed.mean)
    smoothed.add(3.0)
    assert smoothed.mean == pytest.approx(3.0)
    smoothed.add(math.nan)
    assert smoothed.mean == pytest.approx(3.0)
    smoothed.add(4.0)
    assert smoothed.mean == pytest.approx((0.9 * 3 + 4) / 1.9)


def test_the_trend_is_the_slope_of_a_line() -> None:
    assert slope([(x, 2 - 0.25 * x) for x in (1.0, 4.0, 9.0, 10.0)]) == pytest.approx(-0.25)
    assert math.isnan(slope([(1.0, 2.0), (2.0, 3.0)]))
    assert math.isnan(slope([(1.0, 2.0)] * 5))


def test_gradient_change_is_selsyncs() -> None:
    notes = GradientNotes(torch.device("cpu"))
    notes.follow([torch.tensor([2.0])])
    assert math.isnan(notes.change)
    notes.follow([torch.tensor([3.0, 4.0])])
    assert notes.change == pytest.approx(1.5)
    notes.follow([torch.tensor([4.0])])
    # changes of 3/2 and 1/5, the newer with a weight of 2/26, over the weights' sum
    assert notes.change == pytest.approx((24 / 26 * 1.5 + 0.2) / (24 / 26 + 1))


def test_a_rank_by_itself_notes_only_how_its_norm_changes() -> None:
    notes = GradientNotes(torch.device("cpu"), alone=True)
    for norm in (2.0, 5.0):
        notes.look([torch.tensor([norm])], 0, every=False, apart=False)
        header = notes.header()
        assert math.isnan(header["grad_sq"])
        assert not any(header[f"sketch{index}"] for index in range(SKETCH))
        notes.end_step()
        notes.begin()
    assert notes.change == pytest.approx(1.5)


def looked(world: World, settings: SyncConfig, period: int, steps: int, evaluated_at: int) -> list[bool]:
    """Whether a round's noted gradients were of replicas that were apart, by round."""
    model = Quadratic()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    draw = torch.Generator().manual_seed(world.rank)
    apart = []
    with LocalSGD(model, optimizer, Constant(Plan(BATCH, period)), settings=settings, world=world) as sync:
        for step in range(steps):
            optimizer.zero_grad()
            loss = sync.model(torch.randn(BATCH, DIMENSION, generator=draw))
            loss.backward()
            begins = sync.between_rounds
            optimizer.step()
            if begins and step % max(period, 4) == 0:
                apart.append(bool(sync._progress.notes.header()["grad_apart"]))
            sync.step(loss, BATCH)
            if step + 1 == evaluated_at:
                sync.settle()
    return apart


@pytest.mark.parametrize(
    ("settings", "period", "apart"),
    [
        (SyncConfig(observe_steps=1), 4, [False, False, False, False]),
        (SyncConfig(observe_steps=1, delay_steps=2), 4, [False, True, True, False]),
        (SyncConfig(observe_steps=1, delay_steps=4, wire_format="int8"), 4, [False, True, True, False]),
        (SyncConfig(observe_steps=1, mixing=0.5), 4, [False, True, True, False]),
        (SyncConfig(observe_steps=1, fragments=2), 4, [False, True, True, False]),
        (SyncConfig(observe_steps=4), 1, [False, False, False, False]),
        (SyncConfig(observe_steps=4), 0, [False, True, True, True]),
    ],
    ids=["blocking", "delay", "delay of a round", "mixing", "fragments", "averaged gradients", "never averaged"],
)
def test_ranks_know_whether_the_gradients_they_look_at_are_of_one_model(
    settings: SyncConfig, period: int, apart: list[bool]
) -> None:
    """An evaluation after the third round makes replicas one, where the Plan averages at all."""
    for found in run(2, looked, settings, period, 16, 12):
        assert found == apart


def test_noise_seen_under_a_delay_does_not_dilute_what_was_seen_without() -> None:
    def headers(mean: float) -> list[dict[str, float]]:
        return [{"grad_sq": 2.0, "mean_grad_sq": mean, "steps": 1.0, "samples": 8.0}] * 2

    signals = Signals()
    apart = signals.take(headers(1.1), 16, 1.0, apart=True)["noise_scale"]
    assert apart == pytest.approx(0.9 * 16 / 0.2), "better than nothing"
    signals = Signals()
    one = signals.take(headers(1.5), 16, 1.0)["noise_scale"]
    restored = Signals()
    restored.load_state_dict(signals.state_dict())
    assert restored.take(headers(1.1), 32, 1.0, apart=True)["noise_scale"] == one == pytest.approx(0.5 * 16 / 1.0)
    assert restored.take(headers(1.1), 48, 1.0)["noise_scale"] > one
