"""The README's own loop runs as it stands, on one rank and on two."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run
from torch import nn

from trainer import PostLocal, SyncConfig
from trainer.control.controller import Controller
from trainer.distributed.world import World
from trainer.plan import Observation
from trainer.policies import POLICIES, policy_class

README = Path(__file__).parents[2] / "README.md"


def block_with(text: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    return next(block for block in blocks if text in block)


def run_it(world: World) -> tuple[int, torch.Tensor, float, float]:
    torch.manual_seed(world.rank)
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 12, generator=draw)
    labels = (inputs[:, :4].sum(dim=1) > 0).long()
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 2))
    mine: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "dataset": list(zip(inputs, labels, strict=True)),
        "loss_fn": nn.CrossEntropyLoss(),
    }
    before = mine["loss_fn"](model(inputs), labels).item()
    exec(block_with("with LocalSGD"), mine)
    after = mine["loss_fn"](model(inputs), labels).item()
    return mine["sync"].samples, torch.cat([p.detach().flatten() for p in model.parameters()]), before, after


@pytest.mark.parametrize("size", [1, 2])
def test_the_loop_of_ones_own(size: int) -> None:
    results = run(size, run_it)
    for samples, weights, before, after in results:
        assert samples == 4000
        assert torch.equal(weights, results[0][1])
        assert after < before / 3


def test_the_settings_of_a_slow_network() -> None:
    model = nn.Linear(3, 2)
    mine: dict[str, Any] = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "policy": PostLocal()}
    exec("from trainer import LocalSGD\n" + block_with("settings = SyncConfig"), mine)
    assert mine["sync"].settings == SyncConfig(
        wire_format="int4", delay_steps="auto", fragments=2, outer="fedavgm", outer_momentum=0.4
    )


def test_the_policy_of_ones_own() -> None:
    mine: dict[str, Any] = {"__name__": __name__}
    exec(block_with("class Patient"), mine)
    controller = Controller(mine["Patient"](batch_per_rank=8))
    periods = [controller.plan.sync_period_steps]
    for number, loss in enumerate((2.0, 2.5, 1.0, 1.0, 0.5), start=1):
        controller.observe(Observation(round=number, train_loss=loss))
        periods.append(controller.plan.sync_period_steps)
    assert periods == [1, 1, 2, 2, 4, 4]
    assert policy_class("patient") is mine["Patient"]
    del POLICIES["patient"]
