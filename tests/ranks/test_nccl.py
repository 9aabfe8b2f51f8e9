"""Over NCCL the same comes out as over Gloo; needs a CUDA device, which ranks share where NCCL can (2.30 or later)."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from little import CLASSES, FEATURES, LR, trained
from ranks import RankError, run
from torch import nn
from whole_runs import SETTINGS, in_process, lines, settings, weights

from trainer import Alternating, Constant, LocalSGD, Plan, SyncConfig
from trainer.config import recipes
from trainer.distributed.world import World

RANKS = 2


def reason() -> str:
    """Why ranks cannot meet over NCCL here, or nothing."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.device_count() < RANKS and os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE") != "1":
        return f"fewer than {RANKS} CUDA devices, and NCCL_MULTI_RANK_GPU_ENABLE=1 is not set to share one"
    return ""


pytestmark = pytest.mark.skipif(bool(reason()), reason=reason())

WAYS: dict[str, dict[str, Any]] = {
    f"{wire} behind {delay} in {fragments}": {"wire_format": wire, "delay_steps": delay, "fragments": fragments}
    for wire, delay, fragments in itertools.product(("float32", "bf16", "int8", "int4"), (0, 2), (1, 3))
}
WAYS |= {
    "state": {"state": "average", "delay_steps": 2},
    "diloco": {"outer": "diloco", "delay_steps": 2},
    "fedadam": {"outer": "fedadam"},
    "mixing": {"mixing": 0.5},
    "bf16 gradients": {"gradient_format": "bf16"},
}
OFF = {"float32": 1e-5, "bf16": 2e-3, "int8": 2e-3, "int4": 3e-2}


def every_way(world: World) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The weights in mid-run and in the end, after local rounds, averaged gradients and local rounds again."""
    found = {}
    for name, ways in WAYS.items():
        torch.manual_seed(7)
        model = nn.Sequential(nn.Linear(FEATURES, 256), nn.Tanh(), nn.Linear(256, CLASSES)).to(world.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.5)
        policy = Alternating(small=Plan(8, 4), large=Plan(8, 1), steps_per_phase=8)
        with LocalSGD(model, optimizer, policy, settings=SyncConfig(**ways), world=world) as sync:
            for step in range(22):
                trained(sync, world.rank, step)
                if step == 5:
                    middle = nn.utils.parameters_to_vector(model.parameters()).detach().cpu()
            sync.finish()
        found[name] = middle, nn.utils.parameters_to_vector(model.parameters()).detach().cpu()
    return found


def test_every_way_of_averaging_comes_to_the_weights_that_gloo_comes_to() -> None:
    over_gloo, over_nccl = (run(RANKS, every_way, backend=backend, timeout_s=200) for backend in ("gloo", "nccl"))
    for name, ways in WAYS.items():
        first, *others = (found[name][1] for found in over_nccl)
        assert all(torch.equal(first, other) for other in others), f"{name}: replicas are not one"
        off = OFF[ways.get("wire_format", "bf16" if "gradient_format" in ways else "float32")]
        for ours, theirs in zip(over_nccl, over_gloo, strict=True):
            for mine, expected in zip(ours[name], theirs[name], strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=off, msg=lambda text, name=name: name + text)


def linear_model(num_classes: int, channels: int) -> nn.Module:
    """Without convolutions, whose gradients on CUDA differ from run to run."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 28 * 28, 32), nn.ReLU(), nn.Linear(32, num_classes))


ON_CUDA = {
    "world": {"backend": "nccl", "timeout_s": 60.0},
    "task": {"model": "test_nccl:linear_model"},
    "data": {"crop_padding": 0, "flip": False},
}


def test_a_run_leaves_its_records_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    sync = {"delay_steps": 2, "wire_format": "int8"}
    for name in ("whole", "cut"):
        run(RANKS, in_process, settings(tmp_path, name, sync=sync, **ON_CUDA), backend="nccl")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    waits = summary["sync_wait_s"] + summary["input_wait_s"]
    assert summary["elapsed_s"] == pytest.approx(summary["compute_s"] + waits, rel=1e-6)
    assert summary["sync_wait_s"] > 0
    assert summary["peak_memory_bytes"] > 0
    cut = tmp_path / "cut"
    first = min((cut / "checkpoints").iterdir())
    on = settings(tmp_path, "cut", sync=sync, run={"resume": str(first)}, **ON_CUDA)
    run(RANKS, in_process, on, backend="nccl")
    assert any(line.get("what") == "resumed" for line in lines(cut))
    assert torch.equal(weights(cut), weights(tmp_path / "whole"))


def test_the_autopilot_decides_from_what_it_measures(tmp_path: Path) -> None:
    table = json.loads(json.dumps(SETTINGS)) | ON_CUDA
    table["run"] = {"root": str(tmp_path), "name": "pilot", "samples": 16_000}
    table["policy"] = {"name": "autopilot", "batch_per_rank": 8, "max_batch_per_rank": 32}
    run(RANKS, in_process, recipes.from_dict(table), backend="nccl")
    phases = [line for line in lines(tmp_path / "pilot") if line["kind"] == "phase"]
    assert len(phases) > 1
    weighed = [phase["why"] for phase in phases if "candidates" in phase["why"]]
    assert weighed
    assert all(candidate["goodput"] > 0 for candidate in weighed[-1]["candidates"])


def lonely(world: World) -> None:
    """A rank leaves without a word while the other averages."""
    model = nn.Linear(FEATURES, CLASSES).to(world.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with LocalSGD(model, optimizer, Constant(Plan(8, 2)), world=world) as sync:
        for step in range(6):
            if world.rank == 1 and step == 3:
                raise OSError("gone")
            trained(sync, world.rank, step)


def test_a_rank_that_is_gone_ends_the_others() -> None:
    with pytest.raises(RankError, match="gone"):
        run(RANKS, lonely, backend="nccl", timeout_s=120)
