"""Signals against computations by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from trainer.control.reports import SKETCH, Report, Total
from trainer.control.signals import Signals, Smoothed, noise, slope
from trainer.sync.gradient_notes import GradientNotes


def with_gradients(*gradients: torch.Tensor) -> list[torch.Tensor]:
    """Parameters that have these gradients."""
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return list(parameters)


def together(reports: Sequence[Report]) -> Total:
    """What the ranks of these reports are told."""
    sums = [sum(column) for column in zip(*(report.sums(len(reports)) for report in reports), strict=True)]
    mosts = [max(column) for column in zip(*(report.mosts() for report in reports), strict=True)]
    return Total.of(sums, mosts, [report.own for report in reports])


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
            notes.note(with_gradients(vector[:150], vector[150:]), number)
            assert notes.noted()["grad_sq"] == pytest.approx(float(vector.square().sum()), rel=1e-4)
            sketches.append(notes.sketch())
        found.append(sum(a * b for a, b in zip(*sketches, strict=True)))
    deviation = float(one.norm() * other.norm()) / math.sqrt(SKETCH)
    assert statistics.mean(found) == pytest.approx(true, abs=4 * deviation / math.sqrt(200))
    assert statistics.stdev(found) < 3 * deviation


def test_noise_by_hand() -> None:
    # gradients (3, 0) and (1, 2) of 10 samples each: mean (2, 1), norms 9, 5 and 5
    reports = [Report(grad_sq=norm, mean_grad_sq=5.0, steps=1, samples=10) for norm in (9.0, 5.0)]
    assert noise(together(reports)) == pytest.approx((2 * 5 - 7, (7 - 5) * 10 * 2))
    reports[1] = replace(reports[1], grad_sq=math.nan)
    assert all(math.isnan(value) for value in noise(together(reports)))


@pytest.mark.parametrize("weighted", [False, True])
def test_noise_of_unequal_batches_is_that_of_the_samples(weighted: bool) -> None:
    """‖G‖² = 3 and tr Σ = 40 with batches of 5 and 20, averaged with equal weights or by samples."""
    batches = (5, 20)
    weights = [batch / sum(batches) for batch in batches] if weighted else [0.5, 0.5]
    mean = 3 + 40 * sum(weight**2 / batch for weight, batch in zip(weights, batches, strict=True))
    reports = [
        Report(
            grad_sq=3 + 40 / batch,
            mean_grad_sq=mean,
            steps=1,
            samples=batch,
            grad_weight=weight if weighted else math.nan,
        )
        for batch, weight in zip(batches, weights, strict=True)
    ]
    assert noise(together(reports)) == pytest.approx((3, 40))


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
    notes.follow(with_gradients(torch.tensor([2.0])))
    assert math.isnan(notes.change)
    notes.follow(with_gradients(torch.tensor([3.0, 4.0])))
    assert notes.change == pytest.approx(1.5)
    notes.follow(with_gradients(torch.tensor([4.0])))
    # changes of 3/2 and 1/5, the newer with a weight of 2/26, over the weights' sum
    assert notes.change == pytest.approx((24 / 26 * 1.5 + 0.2) / (24 / 26 + 1))


def test_a_rank_by_itself_notes_only_how_its_norm_changes() -> None:
    notes = GradientNotes(torch.device("cpu"), alone=True)
    for norm in (2.0, 5.0):
        notes.look(with_gradients(torch.tensor([norm])), 0, every=False, apart=False)
        assert math.isnan(notes.noted()["grad_sq"])
        assert not any(notes.sketch())
        notes.end_step()
        notes.begin()
    assert notes.change == pytest.approx(1.5)


def test_noise_seen_under_a_delay_does_not_dilute_what_was_seen_without() -> None:
    def total(mean: float, *, apart: bool = False) -> Total:
        return together([Report(grad_sq=2.0, mean_grad_sq=mean, steps=1, samples=8, grad_apart=apart)] * 2)

    signals = Signals()
    apart = signals.take(total(1.1, apart=True), 16, 1.0)["noise_scale"]
    assert apart == pytest.approx(0.9 * 16 / 0.2), "better than nothing"
    signals = Signals()
    one = signals.take(total(1.5), 16, 1.0)["noise_scale"]
    restored = Signals()
    restored.load_state_dict(signals.state_dict())
    assert restored.take(total(1.1, apart=True), 32, 1.0)["noise_scale"] == one == pytest.approx(0.5 * 16 / 1.0)
    assert restored.take(total(1.1), 48, 1.0)["noise_scale"] > one
