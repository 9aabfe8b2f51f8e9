"""One process by itself: a world of one, its learning rate, and the parts of an average without ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from little import (
    CLASSES,
    FEATURES,
    LR,
    Net,
    Values,
    new_model,
    optimizer_of,
    train,
)
from torch import nn
from torch.nn import functional as F

from trainer import Alternating, Constant, LocalSGD, Plan, SyncConfig
from trainer.distributed.collectives import Collectives
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.sync.outer_optimizer import Outer
from trainer.sync.replica import Replica


def test_a_world_of_one_needs_no_process_group() -> None:
    torch.manual_seed(0)
    model = Net()
    dataset = [(torch.randn(FEATURES), torch.tensor(index % CLASSES)) for index in range(50)]
    sizes = []
    with LocalSGD(
        model, optimizer_of("sgd", model), Alternating(small=Plan(4, 2), large=Plan(9, 1), samples_per_phase=8)
    ) as sync:
        for x, y in sync.batches(dataset):
            sync.optimizer.zero_grad()
            loss = F.cross_entropy(sync.model(x), y)
            loss.backward()
            sync.optimizer.step()
            sync.step(loss)
            sizes.append(len(x))
    assert sum(sizes) == 50
    assert set(sizes[:-1]) == {4, 9}
    assert sync.samples == 50


@pytest.mark.parametrize("settings", [{"wire_format": "int4", "delay_steps": 3}, {"node_period_steps": 2}])
def test_a_world_of_one_loses_nothing_whatever_the_settings(settings: dict[str, Any]) -> None:
    (plain, _) = train(World(), SyncConfig(), Constant(Plan(8, 4)), 10)
    (ours, _) = train(World(), SyncConfig(**settings), Constant(Plan(8, 4)), 10)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_the_learning_rate_is_scaled_only_while_the_optimizer_steps() -> None:
    model = nn.Linear(FEATURES, CLASSES, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    policy = Constant(Plan(8, 1, lr_scale=0.1))
    with LocalSGD(model, optimizer, policy) as sync:
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.5
        torch.testing.assert_close(model.weight.detach(), torch.full_like(model.weight, -0.05))
        with pytest.raises(ValueError, match="samples = None"):
            sync.step(torch.tensor(0.0))
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), torch.full_like(model.weight, -0.55))


def test_ranks_without_a_process_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"call torch\.distributed\.init_process_group"):
        LocalSGD(model, optimizer_of("sgd", model), Constant(Plan(8, 2)))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9),
        lambda parameters: torch.optim.AdamW(parameters, lr=LR),
        lambda parameters: torch.optim.RMSprop(parameters, lr=LR, momentum=0.5, centered=True),
        lambda parameters: torch.optim.Adagrad(parameters, lr=LR),
    ],
)
def test_a_corrected_optimizer_state_is_as_if_it_had_begun_from_the_average(optimizer: Any) -> None:
    """Of the same gradients on top of a rank's own state and of another, corrected, and never corrected."""
    draw = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, CLASSES, FEATURES, generator=draw)

    def begun(history: Values) -> Replica:
        model = new_model()
        replica = Replica(model, optimizer(model.parameters()), Collectives(World(), None, 2**20), keeps_state=False)
        advance(replica, history)
        return replica

    def advance(replica: Replica, history: Values) -> None:
        for gradient in history:
            replica.parameters[0].grad = gradient.clone()
            replica.optimizer.step()

    own, other = begun(gradients[:3]), begun(10 * gradients[3:])
    snapshot, mean = ({place: each.clone() for place, each in one.state().items()} for one in (own, other))
    advance(own, gradients[2:6])
    advance(other, gradients[2:6])
    own.correct_state(mean, snapshot, 4)
    assert own.state()
    for place, value in own.state().items():
        if place[1] != "momentum_buffer" or "alpha" not in own.optimizer.param_groups[0]:  # RMSprop's is not linear
            torch.testing.assert_close(value, other.state()[place], rtol=1e-4, atol=1e-5, msg=str(place))


def test_slowmo_stands_still_where_a_schedule_ends_at_rate_0() -> None:
    outer = Outer.of(SyncConfig(outer="slowmo"), torch.zeros(4))
    moved = outer.direct_(torch.full((4,), 0.2), slice(0, 4), 0.1)
    torch.testing.assert_close(moved, torch.full((4,), 0.2))
    still = outer.direct_(torch.zeros(4), slice(0, 4), 0.0)
    torch.testing.assert_close(still, torch.zeros(4), rtol=0, atol=1e-6)
