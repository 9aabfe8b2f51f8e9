"""What goes wrong in whole runs: exceptions, bad losses, signals, ranks that do not answer."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, run
from small_run import records
from torch import nn
from whole_runs import end, in_process, lines, settings, start

from trainer.config.config import WorldConfig
from trainer.distributed.world import World, compare_ranks
from trainer.errors import ConfigError, MismatchError


class Faulty(nn.Module):
    """Raises on rank 1 in its fourth step."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 4:
            raise ArithmeticError("the fourth step of rank 1 went wrong")
        out: torch.Tensor = self.inner(x)
        return out


def faulty_model(num_classes: int, channels: int) -> nn.Module:
    return Faulty()


@pytest.mark.parametrize("policy", ["small", "large"])
def test_one_ranks_exception_ends_all_within_seconds_with_its_message(tmp_path: Path, policy: str) -> None:
    config = settings(tmp_path, "faulty", task={"model": "test_faults:faulty_model"}, policy={"first": policy})
    processes = start(config, tmp_path)
    assert processes[1].wait(60) == 1
    began = time.monotonic()
    codes, said = end(processes, timeout_s=20)
    assert time.monotonic() - began < 10
    assert codes == [1, 1], said
    assert "rank 1: ArithmeticError: the fourth step of rank 1 went wrong" in said
    why = "rank 1 left with ArithmeticError: the fourth step of rank 1 went wrong"
    assert re.search(rf"rank 0: .+ failed on rank 0 of 2: {why}", said), said
    assert said.count("Traceback") == 1 + said.count("The above exception"), "only the rank that failed tells where"


def nan_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs.sum() * float("nan")


@pytest.mark.parametrize("first", ["small", "large"])
def test_too_many_bad_losses_end_the_run_on_every_rank(tmp_path: Path, first: str) -> None:
    config = settings(tmp_path, "nan", task={"loss": "test_faults:nan_loss"}, policy={"first": first})
    codes, said = end(start(config, tmp_path))
    assert codes == [1, 1]
    assert said.count("no finite loss and gradient in") == 2
    assert "Traceback" not in said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_one_rank_leaves_a_checkpoint_to_go_on_from(whole: Path, number: signal.Signals) -> None:
    root, name = whole.parent, f"stopped-{number.name}"
    config = settings(root, name, checkpoint={"every_samples": 10**6})
    processes = start(config, root, forked=number != signal.SIGTERM)  # the real command, once
    folder, deadline = root / name, time.monotonic() + 60
    # a round's record says that rank 1 has begun to train, and so to heed signals
    while time.monotonic() < deadline and not (folder / "metrics.jsonl").exists():
        time.sleep(0.01)
    while time.monotonic() < deadline and not any(line["kind"] == "round" for line in records(folder)):
        time.sleep(0.01)
    processes[1].send_signal(number)
    processes[1].send_signal(number)  # a launcher passes on what the terminal has sent already
    codes, said = end(processes)
    assert codes == [1, 1]
    assert "Traceback" not in said
    assert not (folder / "summary.json").exists()
    assert [line["what"] for line in lines(folder) if line["kind"] == "event"][1:] == ["stopped", "checkpoint"], said
    run(2, in_process, settings(root, name, checkpoint={"every_samples": 10**6}, run={"resume": "auto"}))
    assert json.loads((folder / "summary.json").read_text())["samples"] == 1600


def two_jobs(world: World) -> str:
    try:
        compare_ranks(world, "abc" if world.rank < 2 else "xyz")
    except MismatchError as error:
        return str(error)
    return ""


def test_ranks_of_two_jobs_are_told_apart() -> None:
    said = run(3, two_jobs)
    assert said[0] == said[1] == said[2]
    assert "configuration is abc on ranks 0, 1 but xyz on rank 2" in said[0]


def meshed(world: World, names: str) -> tuple[Any, ...]:
    world = world.with_nodes(names)
    totals = []
    for group in world.new_levels():
        value = torch.tensor(world.rank)
        torch.distributed.all_reduce(value, group=group)
        totals.append(value.item())
    return world.node, world.local_rank, *totals


def test_groups_of_a_node_and_between_nodes() -> None:
    places = run(4, meshed, "aabb")
    assert places == [(0, 0, 0 + 1, 0 + 2), (0, 1, 0 + 1, 1 + 3), (1, 0, 2 + 3, 0 + 2), (1, 1, 2 + 3, 1 + 3)]


def test_groups_where_a_launcher_deals_ranks_out_to_nodes_in_turn() -> None:
    places = run(4, meshed, "abab")
    assert places == [(0, 0, 0 + 2, 0 + 1), (1, 0, 1 + 3, 0 + 1), (0, 1, 0 + 2, 2 + 3), (1, 1, 1 + 3, 2 + 3)]


def test_unequal_nodes_are_refused_on_every_rank_alike() -> None:
    world = World(size=3)
    with pytest.raises(ConfigError, match="there are 2 on a, 1 on b"):
        world.with_nodes("aab")


def test_a_collective_that_nobody_joins_times_out_and_says_so() -> None:
    with pytest.raises(RankError, match="averaging failed on rank 0 of 2: a peer went away, or did not answer in 2 s"):
        run(2, lonely, timeout_s=60)


def lonely(world: World) -> None:
    from datetime import timedelta

    from trainer.distributed.clock import Clock
    from trainer.distributed.collectives import Collectives

    group = torch.distributed.new_group(timeout=timedelta(seconds=2))
    torch.distributed.barrier()  # that a rank which starts late does not use up the other's time
    if world.rank == 1:
        time.sleep(4)
        return
    late = World(rank=0, size=2, timeout_s=WorldConfig(timeout_s=2).timeout_s, group=group)
    Collectives(late, Clock(world.device), 2**20).mean_([torch.ones(3)], 0.5)
