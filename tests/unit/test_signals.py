"""Signals against computations by hand."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from trainer.control.reports import SKETCH
from trainer.control.signals import Signals, Smoothed, noise, slope
from trainer.sync.gradient_notes import GradientNotes


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
