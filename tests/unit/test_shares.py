"""Lengths of phases as shares of a run, on observations by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from trainer.config.config import Config
from trainer.control.controller import Controller
from trainer.errors import ConfigError
from trainer.plan import Observation, Plan
from trainer.policies import SWAP, Alternating, Constant, Cycle, Policy, PostLocal
from trainer.policies.base import samples_of

SMALL, LARGE = Plan(8, 2), Plan(16, 1)
LOSS = {"train_loss": 1.0, "loss_trend": 0.0, "loss_window": 16}


def phases(policy: Policy, total: int | None, marks: int = 10, every: int = 100) -> str:
    """The first letter of the phase after each of ten observations, 100 samples apart."""
    controller, found = Controller(policy), ""
    for mark in range(1, marks + 1):
        progress = mark * every / total if total else math.nan
        controller.observe(Observation(round=mark, samples=mark * every, progress=progress, ranks=1, **LOSS))
        found += controller.phase.name[0]
    return found


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Alternating(SMALL, LARGE, samples_per_phase=0.5), "sssslllll" + "s"),
        (Alternating(SMALL, LARGE, samples_per_phase=0.3), "sslllsssll"),
        (Alternating(SMALL, LARGE, samples_per_phase=0.2, large_length=0.3), "slllssllls"),
        (Alternating(SMALL, LARGE, samples_per_phase=200, large_length=0.3), "slllssllls"),
        (PostLocal(Plan(16, 1), Plan(16, 4), switch_samples=0.7), "l" * 10),
        (SWAP(last_samples=0.4), "lllaaaaaaa"),
        (Cycle(SMALL, LARGE, min_samples=0.3), "sslllsssll"),
    ],
)
def test_a_share_is_counted_from_the_runs_length(policy: Policy, expected: str) -> None:
    assert phases(policy, total=1_000) == expected


def test_post_local_switches_at_its_share() -> None:
    controller = Controller(PostLocal(Plan(16, 1), Plan(16, 4), switch_samples=0.7))
    for samples, period in ((699, 1), (700, 4)):
        controller.observe(Observation(samples=samples, progress=samples / 1_000))
        assert controller.plan.sync_period_steps == period


@pytest.mark.parametrize(
    "policy",
    [Alternating(SMALL, LARGE, samples_per_phase=0.1), SWAP(last_samples=0.1), Cycle(SMALL, LARGE, min_samples=0.1)],
)
def test_where_no_end_is_known_the_first_phase_goes_on(policy: Policy) -> None:
    assert len(set(phases(policy, total=None))) == 1


def test_shares_come_out_in_whole_samples() -> None:
    for total in (1_000, 160_000, 99_999):
        for samples in range(1, total, total // 7):
            seen = Observation(samples=samples, progress=samples / total)
            assert samples_of(0.3, seen) == round(0.3 * total)
    assert samples_of(500, Observation()) == 500


@pytest.mark.parametrize(
    ("policy", "ranks", "begins"),
    [
        (Alternating(SMALL, LARGE), 2, 50_000),
        (Alternating(SMALL, LARGE, rounds_per_phase=3), 2, 3 * 2 * 8 * 2),
        (Alternating(SMALL, LARGE, steps_per_phase=3, first="large", large_length=5), 4, 5 * 16 * 4),
        (Alternating(SMALL, LARGE, samples_per_phase=0.25), 2, 0.25),
        (PostLocal(switch_samples=70), 2, 70),
        (Cycle(SMALL, LARGE), 2, 5_000),
        (Constant(), 2, None),
        (SWAP(last_samples=5), 2, None),
    ],
)
def test_when_a_second_phase_begins_is_known_beforehand(policy: Policy, ranks: int, begins: float | None) -> None:
    assert policy.second_phase_at(ranks) == begins


REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: Alternating(samples_per_phase=1.5), "samples_per_phase = 1.5: must be at least 1 sample, or a share"),
    (lambda: Alternating(samples_per_phase=0), "samples_per_phase = 0: must be at least 1 sample, or a share"),
    (lambda: Alternating(rounds_per_phase=3, large_length=0.5), "large_length = 0.5: a share goes with"),
    (lambda: Alternating(rounds_per_phase=0.5), "rounds_per_phase = 0.5: must be a whole number"),  # type: ignore[arg-type]
    (lambda: PostLocal(switch_samples=-0.5), "switch_samples = -0.5: must be at least 1 sample, or a share"),
    (lambda: Config(policy=Cycle(min_samples=2.5)), "min_samples = 2.5: must be at least 1 sample, or a share"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_what_is_neither_samples_nor_a_share_is_refused(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert said in str(refused.value)
