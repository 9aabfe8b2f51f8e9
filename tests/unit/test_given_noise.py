"""Small-batch noise for large batches, against its equation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from trainer.control.controller import Controller
from trainer.errors import ConfigError
from trainer.plan import Observation, Plan
from trainer.policies import Alternating, SmallBatchNoise
from trainer.sync.given_noise import GivenNoise, directions, excess

SMALL, LARGE, DRAWS = 8, 32, 40_000
MEAN, ROOT = np.array([1.0, -2.0]), np.array([[2.0, 0.0], [1.5, 0.5]])
SIGMA = ROOT @ ROOT.T
"""The covariance of one sample's gradient: not diagonal."""


def gradients(*shape: int) -> Any:
    """Gradients of batches of LARGE."""
    return MEAN + np.random.default_rng(0).standard_normal((*shape, 2)) @ ROOT.T / LARGE**0.5


@pytest.mark.parametrize("ranks", [2, 5])
def test_a_mean_of_noisy_weights_has_the_mean_and_covariance_of_small_batches(ranks: int) -> None:
    noise = np.array([directions(ranks, LARGE / SMALL - 1, step) for step in range(DRAWS)])
    assert np.abs(noise.sum(axis=1)).max() < 1e-9
    assert np.square(noise).sum(axis=1) == pytest.approx((LARGE / SMALL - 1) / ranks)
    found = np.einsum("sr,srd->sd", 1 / ranks + noise, gradients(DRAWS, ranks))
    assert found.mean(axis=0) == pytest.approx(MEAN, abs=0.01)
    assert np.cov(found.T) == pytest.approx(SIGMA / (ranks * SMALL), rel=0.04)


def test_one_ranks_own_gradients_have_the_covariance_of_a_small_batchs() -> None:
    given, parameter, found = GivenNoise(), torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)), []
    plan = Plan(LARGE, 4, noise_batch=SMALL)
    for step, gradient in enumerate(gradients(DRAWS // 4)):
        parameter.grad = torch.tensor(gradient)
        if step == 100:  # as a checkpoint does
            state, given = given.state_dict(), GivenNoise()
            given.load_state_dict(state, parameter.device)
        given.add([parameter], plan, step, rank=1)
        found.append(parameter.grad.numpy().copy())
    assert (found[0] == gradients(1)[0]).all(), "there is no gradient before the first"
    assert np.mean(found, axis=0) == pytest.approx(MEAN, abs=0.02)
    assert np.cov(np.array(found).T) == pytest.approx(SIGMA / SMALL, rel=0.06)
    given.add([parameter], Plan(LARGE, 4), 0, rank=1)
    assert given.state_dict() == {"count": 0}, "a Plan without it keeps no gradient"


def test_the_policy_gives_the_small_batchs_noise_and_alternating_only_where_it_is_asked() -> None:
    controller = Controller(SmallBatchNoise(small=Plan(SMALL, 1), large=Plan(LARGE, 1)))
    assert (controller.plan, controller.lr_scale(0)) == (Plan(LARGE, 1, noise_batch=SMALL), 1.0)
    controller.observe(Observation(round=1, samples=4_000, ranks=2, noise_scale=300.0))
    assert excess(controller.plan) == LARGE / SMALL - 1
    assert [excess(plan) for plan in Alternating(large=Plan(128, 1, noise_batch=32)).plans()] == [0.0, 3.0]
    with pytest.raises(ConfigError, match=r"noise_batch = 64: must be in 1 \.\. batch_per_rank \(32\)"):
        Plan(32, 1, noise_batch=64)
    with pytest.raises(ConfigError, match=r"large\.noise_batch = 4: is small's; leave it out"):
        SmallBatchNoise(small=Plan(8, 1), large=Plan(32, 1, noise_batch=4))
