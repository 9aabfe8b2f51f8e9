"""A run that goes on with another number of ranks: from the consensus, and without a sample lost or read twice."""

from __future__ import annotations

import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, run
from torch import nn
from torch.utils.data import TensorDataset
from whole_runs import in_process, lines, settings, weights

from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.loop.manifest import load_rank
from trainer.loop.regroup import Mean

SAMPLES = 720


class Numbered(TensorDataset):
    """Item i is i, of class i modulo 10."""

    classes = 10


def numbered(root: str, train: bool) -> Numbered:
    numbers = torch.arange(SAMPLES if train else 20)
    return Numbered(numbers.float().view(-1, 1, 1, 1), numbers % 10)


class Noting(nn.Module):
    """Notes on the disk which samples it was trained with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            with open(os.environ["NOTED"], "a") as file:
                file.writelines(f"{int(number)}\n" for number in x.flatten())
        out: torch.Tensor = self.inner(x.flatten(1) / SAMPLES)
        return out


def noting(num_classes: int, channels: int) -> nn.Module:
    return Noting()


def noted(world: World, config: Config, name: str) -> None:
    os.environ["NOTED"] = str(Path(config.run.root) / f"{name}-{world.rank}")
    in_process(world, config)


def trained_with(root: Path, name: str) -> list[list[int]]:
    return [[int(line) for line in path.read_text().split()] for path in sorted(root.glob(f"{name}-[0-9]"))]


def going_on(root: Path, samples: int, **sections: Any) -> Config:
    table = {"run": {"samples": samples, "resume": "auto"}, "checkpoint": {"every_samples": 200, "keep": 9}}
    table |= {
        "data": {
            "name": "test_regroup:numbered",
            "train_limit": None,
            "test_limit": None,
            "crop_padding": 0,
            "flip": False,
        }
    }
    table |= {"task": {"model": "test_regroup:noting"}, "eval": {"every_samples": None}}
    for section, fields in sections.items():
        table[section] = {**table.get(section, {}), **fields}
    return settings(root, "one", **table)


WAYS: list[dict[str, Any]] = [
    {"outer": "diloco", "delay_steps": 2, "wire_format": "int8", "state": "average"},
    {"batch_norm": "keep", "state": "reset"},
]


@pytest.mark.parametrize("sync", [{}, *WAYS])
def test_four_then_two_then_three_ranks_read_every_sample_once(tmp_path: Path, sync: dict[str, Any]) -> None:
    for ranks, samples in ((4, 300), (2, 516), (3, 720), (3, 760)):
        run(ranks, noted, going_on(tmp_path, samples, sync=sync), f"on{ranks}-to{samples}")
    read = [
        part for ranks, to in ((4, 300), (2, 516), (3, 720)) for part in trained_with(tmp_path, f"on{ranks}-to{to}")
    ]
    assert len(read) == 4 + 2 + 3
    assert Counter(number for part in read for number in part) == Counter(range(SAMPLES))
    again = [number for part in trained_with(tmp_path, "on3-to760") for number in part]  # the next epoch
    assert len(again) == len(set(again)) >= 40
    folder = tmp_path / "one"
    changed = [line["message"] for line in lines(folder) if line.get("what") == "changed"]
    assert changed[1::2] == ["there are 2 ranks now, and were 4", "there are 3 ranks now, and were 2"]
    assert changed[-1] == "run.samples is 760 now, and was 720"
    rounds = [line for line in lines(folder) if line["kind"] == "round"]
    assert [line["round"] for line in rounds] == sorted({line["round"] for line in rounds}), "none is told twice"
    assert all(a["samples"] < b["samples"] for a, b in itertools.pairwise(rounds))
    assert all(0 < line["seen"]["compute_s"] < 60 for line in rounds)
    assert json.loads((folder / "summary.json").read_text())["samples"] >= 760
    assert bool(weights(folder).isfinite().all())


def test_a_checkpoint_in_mid_round_is_gone_on_with_by_the_mean_of_its_replicas(tmp_path: Path) -> None:
    run(2, noted, going_on(tmp_path, 400), "on2-to400")
    (path,) = [each for each in (tmp_path / "one" / "checkpoints").iterdir() if each.name.endswith("13")]
    states = [load_rank(path, rank) for rank in (0, 1)]
    assert not states[0]["sync"]["timetable"]["are_one"]
    mean = sum(state["model"]["inner.weight"].double() for state in states) / 2
    momenta = [state["optimizer"]["state"][0]["momentum_buffer"].double() for state in states]
    found = run(1, loaded, going_on(tmp_path, 420, run={"samples": 420, "resume": str(path)}))[0]
    assert torch.equal(found["weight"], mean.float())
    assert torch.equal(found["momentum"], (sum(momenta) / 2).float())
    assert found["samples"] == 200 + 8


def loaded(world: World, config: Config) -> dict[str, Any]:
    """What a run begins with."""
    from trainer.loop import run as loop

    found: dict[str, Any] = {}
    restore = loop.Run._restore

    def restored(self: Any, *arguments: Any) -> None:
        restore(self, *arguments)
        parameter = self._sync.replica.model.inner.weight
        momentum = self._sync.optimizer.state[parameter]["momentum_buffer"]
        found.update(weight=parameter.detach().clone(), momentum=momentum.clone(), samples=self._sync.samples)

    loop.Run._restore = restored  # type: ignore[method-assign]
    try:
        noted(world, config, "loaded")
    finally:
        loop.Run._restore = restore  # type: ignore[method-assign]
    return found


def test_private_data_needs_its_ranks(tmp_path: Path) -> None:
    quantity = {"partition": "quantity", "alpha": 5.0}
    run(2, noted, going_on(tmp_path, 100, data={**quantity}), "on2")
    with pytest.raises(
        RankError, match=r"data\.partition = 'quantity': .* was written by 2 ranks, and data is private"
    ):
        run(1, noted, going_on(tmp_path, 200, data={**quantity}), "on1")


def test_means_leave_what_is_one_as_it_is() -> None:
    thirds = torch.tensor([0.1, 0.7])
    mean = Mean({"same": thirds, "count": torch.tensor(3), "other": torch.tensor([1.0]), "lr": 0.5}, 1 / 3)
    for value in (2.0, 6.0):
        one = {"same": thirds.clone(), "count": torch.tensor(5), "other": torch.tensor([value]), "lr": 0.5}
        mean.add(one | {"late": torch.ones(1)}, 1 / 3)
    found = mean.result()
    assert torch.equal(found["same"], thirds)
    assert (found["count"].item(), found["lr"], found["late"].item()) == (5, 0.5, 1)
    assert found["other"].item() == 3


def of_another_world(world: World) -> str:
    from trainer import Constant, LocalSGD, Plan

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LocalSGD(model, optimizer, Constant(Plan(4, 2)), world=world) as sync:
        state = sync.state_dict() | {"ranks": 5}
        try:
            sync.load_state_dict(state)
        except ConfigError as error:
            return str(error)
    return ""


def test_a_loop_of_ones_own_refuses_another_number_of_ranks() -> None:
    assert run(1, of_another_world) == ["state of LocalSGD is of 5 ranks, and there are 1: start as many"]
