"""Whole runs of a small model on made-up data: their configuration, their ranks, their records."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from commands import Command
from ranks import fork_readers, free_port
from torch import nn

from trainer.config import recipes
from trainer.config.config import Config
from trainer.distributed.world import World

SETTINGS = {
    "run": {"samples": 1600},
    "world": {"backend": "gloo", "timeout_s": 30.0},
    "data": {"name": "fake", "train_limit": 700, "test_limit": 101, "crop_padding": 1, "flip": True},
    "task": {"model": "whole_runs:small_model"},
    "optim": {"lr": 0.02},
    "policy": {
        "name": "alternating",
        "samples_per_phase": 320,
        "lr_scaling": "sqrt",
        "lr_ramp_samples": 200,
        "small": {"batch_per_rank": 8, "sync_period_steps": 6},
        "large": {"batch_per_rank": 20, "sync_period_steps": 1},
    },
    "eval": {"every_samples": 500},
    "checkpoint": {"every_samples": 200, "keep": 3},
    "record": {"reference_s": 0.0, "tensorboard": False, "progress": False, "report": False},
}


def small_model(num_classes: int, channels: int) -> nn.Module:
    """A model that is quick, with statistics and with dropout of its own."""
    return nn.Sequential(
        nn.Conv2d(channels, 4, 5, stride=3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(4 * 64, num_classes),
    )


def settings(root: Path, name: str, **sections: dict[str, Any]) -> Config:
    """The configuration of a run of this name, with other fields in some sections."""
    table = json.loads(json.dumps(SETTINGS))
    for section, fields in ({"run": {"root": str(root), "name": name}} | sections).items():
        table.setdefault(section, {}).update(fields)
    table["run"] |= {"root": str(root), "name": name}
    return recipes.from_dict(table)


def start(config: Config, folder: Path, ranks: int = 2, *, forked: bool = True) -> list[Any]:
    """The ranks of `python -m trainer`, as a launcher would start them, or forked from a warm process."""
    recipe = folder / f"{config.run.name}.toml"
    recipes.save(config, recipe)
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    flags = ["--recipe", str(recipe)]
    places = [os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    if forked:
        return [Command("trainer", flags, env) for env in places]
    command, pipe = [sys.executable, "-m", "trainer", *flags], subprocess.PIPE
    return [subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) for env in places]


def end(processes: list[Any], timeout_s: float = 60) -> tuple[list[int], str]:
    """Wait until all have ended; their exit codes, and what they said."""
    try:
        told = [process.communicate(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], "".join(out + err for out, err in told)


def lines(folder: Path) -> list[dict[str, Any]]:
    """A run's records, all of them whole."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def told(folder: Path) -> list[dict[str, Any]]:
    """The records without times and without what only a resumed run says."""
    times = {"elapsed_s", "compute_s", "slowest_compute_s", "sync_wait_s", "input_wait_s", "eval_s", "checkpoint_s"}
    times |= {"samples_per_s", "transfer_s", "peak_memory_bytes", "memory_share", "name", "started_at", "wall_s"}

    def timeless(line: dict[str, Any]) -> dict[str, Any]:
        return {
            name: timeless(value) if isinstance(value, dict) else value
            for name, value in line.items()
            if name not in times
        }

    return [timeless(line) for line in lines(folder) if line.get("what") not in ("resumed", "started")]


def weights(folder: Path) -> torch.Tensor:
    """A run's model as one vector."""
    state = torch.load(folder / "model.pt", weights_only=True)
    return torch.cat([value.double().flatten() for value in state.values()])


def in_process(world: World, config: Config) -> None:
    """Train one run in a world that is there."""
    from trainer.loop.job import Job
    from trainer.train import train_in

    fork_readers()
    train_in(world, Job.open(config))
