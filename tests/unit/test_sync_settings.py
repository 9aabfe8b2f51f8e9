"""What cannot hold for an average is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from little import (
    LR,
    new_model,
)

from trainer import Constant, LocalSGD, Plan, SyncConfig

EARLY = Plan(8, 4, early_end="divergence", early_end_above=1.0)


@pytest.mark.parametrize(
    ("fields", "plan", "said"),
    [
        ({"delay_steps": 5}, Plan(8, 4), r"delay_steps = 5: must be at most the policy's shortest period above 1 \(4"),
        ({"fragments": 5}, Plan(8, 4), "fragments = 5: must be at most"),
        ({"fragments": 2}, Plan(8, 1), "fragments = 2: averages no parameters at period 1"),
        ({"wire_format": "int4"}, Plan(8, 1), "wire_format = 'int4': .* gradients have sync.gradient_format"),
        ({"wire_format": "int3"}, Plan(8, 4), "wire_format = 'int3': choose one of float32, bf16, int8, int4"),
        ({"gradient_format": "int4"}, Plan(8, 1), "gradient_format = 'int4': choose one of float32, bf16, powersgd"),
        ({"delay_steps": -1}, Plan(8, 4), "delay_steps = -1: must be 0 or more local steps, or auto"),
        ({"node_period_steps": 3}, Plan(8, 4), "node_period_steps = 3: must divide the policy's periods above 1"),
        ({"ranks_per_node": 2}, Plan(8, 4), "ranks_per_node = 2: needs sync.node_period_steps"),
        (
            {"node_period_steps": 2, "node_wire_format": "int8", "delay_steps": 2},
            Plan(8, 4),
            "node_wire_format = 'int8': needs sync.delay_steps = 0",
        ),
        ({"outer_lr": 0.5}, Plan(8, 4), "outer_lr = 0.5: needs sync.outer"),
        ({"delay_steps": 2}, Plan(8, 4, delay_steps=1), "delay_steps = 2: has no effect: the policy's plans say it"),
        ({"wire_format": "int8"}, Plan(8, 4, wire_format="bf16"), "wire_format = 'int8': has no effect"),
        ({"fragments": 2}, Plan(8, 4, fragments=4), "fragments = 2: has no effect: the policy's plans say it"),
        ({"mixing": 0.5}, EARLY, "mixing = 0.5: must be 1 where divergence ends rounds"),
        ({"mixing": 0.5}, Plan(8, 1), "mixing = 0.5: averages no parameters at period 1"),
        ({"node_period_steps": 1, "node_wire_format": "int8"}, Plan(8, 4), "node_wire_format = 'int8': averages no"),
        ({"fragments": 2}, EARLY, "fragments = 2: must be 1 where rounds end early"),
        ({"delay_steps": 2}, EARLY, "delay_steps = 2: must be 0 where rounds end early"),
        (
            {"gradient_format": "powersgd"},
            Plan(8, 1, noise_batch=4),
            "gradient_format = 'powersgd': keeps what it loses",
        ),
        ({"outer": "diloco", "mixing": 0.5}, Plan(8, 4), "outer = 'diloco': needs sync.mixing = 1"),
    ],
)
def test_what_cannot_hold_is_refused_in_one_line(fields: Any, plan: Plan, said: str) -> None:
    model = new_model()
    with pytest.raises(ValueError, match=said) as refused:
        LocalSGD(model, torch.optim.SGD(model.parameters(), lr=LR), Constant(plan), settings=SyncConfig(**fields))
    assert "\n" not in str(refused.value)
