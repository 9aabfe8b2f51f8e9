"""Outer optimizers against each paper's own equation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from little import (
    LR,
    new_model,
    one_step,
    train,
)
from ranks import run

from trainer import Alternating, Constant, Plan, SyncConfig


@pytest.mark.parametrize("outer", ["slowmo", "diloco", "fedavgm"])
def test_an_outer_optimizer_of_rate_1_without_momentum_is_plain_averaging(outer: Any) -> None:
    policy = Constant(Plan(8, 4))
    plain = run(2, train, SyncConfig(), policy, 8)
    ours = run(2, train, SyncConfig(outer=outer, outer_lr=1.0, outer_momentum=0.0), policy, 8)
    torch.testing.assert_close(ours[0][0][-1], plain[0][0][-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("outer", "delay"), [("slowmo", 0), ("diloco", 0), ("diloco", 4), ("fedavgm", 0), ("fedadam", 0)]
)
def test_outer_rules_by_hand(outer: Any, delay: int) -> None:
    """Two rounds of period 4 by each paper's own equation."""
    lr, beta = 0.5, 0.8
    settings = SyncConfig(outer=outer, outer_lr=lr, outer_momentum=beta, delay_steps=delay)
    weights = run(2, train, settings, Constant(Plan(8, 4)), 8 + delay)[0][0]
    base = new_model().weight.detach().double()
    momentum, second = torch.zeros_like(base), torch.full_like(base, 1e-6)
    replicas = [base.float(), base.float()]
    for round_ in range(2):
        if round_ == 0 or delay == 0:
            for step in range(4 * round_, 4 * round_ + 4):
                replicas = [one_step(replica, rank, step) for rank, replica in enumerate(replicas)]
        snapshots = replicas
        if delay:  # it lands after the next round's four steps
            for step in range(4 * round_ + 4, 4 * round_ + 8):
                replicas = [one_step(replica, rank, step) for rank, replica in enumerate(replicas)]
        delta = base - sum(snapshot.double() for snapshot in snapshots) / 2
        if outer == "slowmo":
            momentum = beta * momentum + delta / LR
            base = base - lr * LR * momentum
        elif outer == "diloco":
            momentum = beta * momentum + delta
            base = base - lr * (delta + beta * momentum)
        elif outer == "fedavgm":
            momentum = beta * momentum + delta
            base = base - lr * momentum
        else:
            momentum = beta * momentum + (1 - beta) * delta
            second = 0.99 * second + 0.01 * delta**2
            base = base - lr * momentum / (second.sqrt() + 1e-3)
        replicas = [(now + base - then).float() for now, then in zip(replicas, snapshots, strict=True)]
        torch.testing.assert_close(weights[4 * round_ + 3 + delay].double(), replicas[0].double(), rtol=1e-4, atol=1e-5)


def test_an_outer_optimizer_begins_anew_after_averaged_gradients() -> None:
    """A round of period 4 on each side of them: without what the first moved, momentum adds nothing to the second."""
    policy = Alternating(small=Plan(8, 4), large=Plan(8, 1), steps_per_phase=4)
    plain = run(2, train, SyncConfig(observe_steps=4), policy, 12)
    ours = run(2, train, SyncConfig(observe_steps=4, outer="fedavgm", outer_momentum=0.5), policy, 12)
    torch.testing.assert_close(ours[0][0][-1], plain[0][0][-1], rtol=1e-5, atol=1e-6)
