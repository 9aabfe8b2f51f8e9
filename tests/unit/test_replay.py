"""Replays of really recorded runs, and of small hand-written ones whose decisions are known."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ranks import run
from small_run import RECIPE, records
from torch import nn

from trainer.config import recipes
from trainer.config.config import Config
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.plan import Decision, Memory, Observation, Plan, observed, plain
from trainer.policies import QSR, Alternating, Constant, Policy, PostLocal
from trainer.replay import replay
from trainer.replay.__main__ import main

FIRST = {"plan": {"batch_per_rank": 16, "sync_period_steps": 8}, "max_batch_per_rank": 64}
TWO = {name: {"batch_per_rank": 64, "sync_period_steps": 1} for name in ("large",)}
POLICIES: dict[str, dict[str, Any]] = {
    "alternating": {},
    "autopilot": {"batch_per_rank": 16, "max_batch_per_rank": 64, "max_period_steps": 16, "min_stay_steps": 16},
    "qsr": {"batch_per_rank": 16},
    "adaptive_period": {"plan": FIRST["plan"], "interval_samples": 800},
    "batch_growth": FIRST | {"milestones": [800, 1_600], "factor": 2.0},
    "compose": {"batch": {"name": "noise_scale", **FIRST}, "period": {"name": "qsr", "batch_per_rank": 16}},
    "cycle": TWO | {"small": FIRST["plan"], "min_samples": 500, "flat": 0.5},
    "fda": {"batch_per_rank": 16, "threshold": 0.01},
    "noise_scale": FIRST | {"min_stay_rounds": 1},
    "norm_test": FIRST | {"min_stay_rounds": 1},
    "selsync": {"batch_per_rank": 16, "change": 0.1},
    "swap": TWO | {"alone": {"batch_per_rank": 16, "sync_period_steps": 0}, "last_samples": 1_000},
}
SMALL, LARGE = Plan(16, 8), Plan(64, 1)
NAME = "test_replay:Widening"


def linear_model(num_classes: int, channels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 28 * 28, num_classes))


def settings(root: Path, name: str, resume: str | None = None) -> Config:
    table = tomllib.loads(RECIPE)
    if POLICIES[name]:
        table["policy"] = {"name": name} | POLICIES[name]
    table["run"] |= {"root": str(root), "name": name} | ({"resume": resume} if resume else {})
    table["task"] = {"model": "test_replay:linear_model"}
    table["checkpoint"]["keep"] = 9
    return recipes.from_dict(table)


def train_all(world: World, configs: Sequence[Config]) -> None:
    from trainer.loop.job import Job
    from trainer.train import train_in

    for config in configs:
        train_in(world, Job.open(config))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks for every one of these policies."""
    root = tmp_path_factory.mktemp("runs")
    run(2, train_all, [settings(root, name) for name in POLICIES])
    return root


@dataclass(frozen=True)
class Widening(Policy):
    """A user's own policy."""

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        count = memory.get("count", 0) + 1
        return Decision(Plan(8 * count, 4), "wider", memory={"count": count})

    def plans(self) -> tuple[Plan, ...]:
        return (Plan(8, 4),)


def by_hand(folder: Path, rounds: int = 6) -> Path:
    """A run of alternating phases of two rounds, each of 1,000 samples at a rate that halves."""
    policy = Alternating(small=SMALL, large=LARGE, rounds_per_phase=2)
    folder.mkdir()
    recipes.save(Config(policy=policy), folder / "config.toml")
    first = {"kind": "phase", "number": 0, "name": "small", "plan": plain(SMALL), "why": {}}
    lines: list[dict[str, Any]] = [first, {"kind": "event", "what": "checkpoint"}]
    for n in range(1, rounds + 1):
        seen = Observation(round=n, local_step=8 * n, samples=1_000 * n, ranks=2, steps=8, lr=0.1 / 2**n)
        name, plan = ("small", SMALL) if n // 2 % 2 == 0 else ("large", LARGE)
        decided = {"phase": name, "plan": plain(plan), "why": {"phase_rounds": n}}
        lines.append({"kind": "round", "round": n, "seen": observed(seen), "decided": decided})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def edit(folder: Path, number: int, old: str, new: str) -> None:
    """Change a line of the records, counted from 1."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")
    assert old in lines[number - 1]
    lines[number - 1] = lines[number - 1].replace(old, new)
    path.write_text("\n".join(lines))


def refusal(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """What the command says when it refuses: one line."""
    assert main([str(each) for each in argv]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("name", POLICIES)
def test_a_recorded_run_decides_again_as_it_did(runs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    rounds = records(runs / name, "round")
    assert main([str(runs / name)]) == 0
    assert capsys.readouterr().out == f"{len(rounds) + 1} decisions, none differs\n"
    found = replay(runs / name)
    assert [each.round for each in found] == [0, *(line["round"] for line in rounds)]
    assert [each.samples for each in found] == [0, *(line["samples"] for line in rounds)]
    if name in ("fda", "selsync"):
        assert len({line["seen"]["steps"] for line in rounds}) > 1, "no round ended early"
    elif name != "cycle":  # whose loss's trend takes 16 observations, more than this run has
        assert len({(each.recorded.phase, each.recorded.plan) for each in found}) > 1, "it never changed its Plan"
    # the very same numbers decided
    assert all(json.loads(json.dumps(dict(each.decided.why))) == each.recorded.why for each in found)


def test_a_run_that_was_resumed_and_killed_replays_too(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = runs / "resumed"
    shutil.copytree(runs / "autopilot", root / "autopilot")
    before = records(root / "autopilot", "round")
    chosen = sorted((root / "autopilot" / "checkpoints").iterdir())[2]
    run(2, train_all, [settings(root, "autopilot", resume=str(chosen))])
    assert records(root / "autopilot", "round") != before
    assert main([str(root / "autopilot")]) == 0
    path = root / "autopilot" / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])  # ends within a record
    capsys.readouterr()
    assert main([str(root / "autopilot")]) == 0
    rounds = records(root / "autopilot", "round")
    assert capsys.readouterr().out == f"{len(rounds) + 1} decisions, none differs\n"


def test_decisions_that_differ_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand(tmp_path / "a")
    assert not any(each.differs for each in replay(folder))
    edit(folder, 5, '"batch_per_rank": 64', '"batch_per_rank": 63')
    edit(folder, 7, '"small"', '"tiny"')
    assert main([str(folder)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "7 decisions, 2 differ from the recorded:"
    assert said[2].split() == ["3", "3,000", "batch_per_rank", "63", "batch_per_rank", "64"]
    assert said[3].split() == ["5", "5,000", "phase", "tiny", "phase", "small"]


def test_an_observation_that_was_changed_leads_elsewhere(tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "a")
    edit(folder, 4, '"seen": {"round": 2', '"seen": {"round": 1')
    found = replay(folder)
    assert [each.samples for each in found if each.differs] == [2_000, 4_000, 6_000]
    assert [each.decided.phase for each in found] == ["small", "small", "small", "large", "large", "small", "small"]


def test_many_differences_are_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand(tmp_path / "a", rounds=25)
    recipes.save(Config(policy=Constant(Plan(5, 3))), folder / "config.toml")
    assert main([str(folder)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("26 decisions, 26 differ from the recorded:\n")
    assert "\nand 6 more\n" in said


def test_what_another_policy_decides(tmp_path: Path) -> None:
    folder = by_hand(tmp_path / "a")
    other = PostLocal(large=Plan(128, 1), local=Plan(32, 4), switch_samples=3_000)
    found = replay(folder, other)
    assert [each.decided.phase for each in found] == ["large"] * 3 + ["local"] * 4
    assert [each.decided.plan for each in found] == [other.large] * 3 + [other.local] * 4
    assert [each.recorded.plan for each in found] == [SMALL, SMALL, LARGE, LARGE, SMALL, SMALL, LARGE]
    # α / η at α = 0.1: 2, 4, 8, 16 ... and the period its square, at most 100
    found = replay(folder, QSR(batch_per_rank=8, growth=0.1, max_period_steps=100))
    assert [each.decided.plan.sync_period_steps for each in found] == [4, 4, 16, 64, 100, 100, 100]


def test_another_policy_gets_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand(tmp_path / "a")
    assert main([str(folder), "--policy", "qsr"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["recorded:", "alternating", "replayed:", "qsr"]
    columns = ["phase", "batch", "period", "delay", "wire", "lr", "scale"]
    assert said[1].split() == ["round", "samples", *columns, *columns]
    first = ["0", "0", "small", "16", "8", "—", "—", "1", "period", "4", "32", "4", "—", "—", "1"]
    assert said[2].split() == first
    assert said[3].split() == [
        "2",
        "2,000",
        "large",
        "64",
        "1",
        "—",
        "—",
        "1",
        "period",
        "16",
        "32",
        "16",
        "—",
        "—",
        "1",
    ]
    assert said[4].split() == ["3", "3,000", "period", "64", "32", "64", "—", "—", "1"]  # the recorded phase goes on
    assert "did not feed back" in " ".join(said)
    assert said[-1] == f"picture: {folder / 'replay-qsr.png'}"
    assert (folder / "replay-qsr.png").read_bytes().startswith(b"\x89PNG")


def test_a_really_recorded_run_with_another_policy(runs: Path, tmp_path: Path) -> None:
    for name in ("alternating", "swap", "selsync"):
        assert main([str(runs / "autopilot"), "--policy", name, "--out", str(tmp_path / "new")]) == 0
    assert len(list((tmp_path / "new").glob("replay-*.png"))) == 3
    assert not list((runs / "autopilot").glob("*.png"))


def test_the_other_policy_may_come_from_a_recipe_or_a_module(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = by_hand(tmp_path / "a")
    recipe = tmp_path / "other.toml"
    recipe.write_text('[policy]\nname = "constant"\nbatch_per_rank = 40\nwire_format = "int8"\ndelay_steps = 2\n')
    assert main([str(folder), "--policy", str(recipe)]) == 0
    assert "constant 40 16 2 int8 1" in " ".join(capsys.readouterr().out.split())
    assert (folder / "replay-constant.png").exists()
    assert main([str(folder), "--policy", NAME]) == 0
    assert "wider" in capsys.readouterr().out
    assert (folder / "replay-test_replay.Widening.png").exists()


def test_a_run_that_has_only_begun_has_its_first_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_hand(tmp_path / "a", rounds=0)
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == "1 decision, none differs\n"
    assert main([str(folder), "--policy", "swap"]) == 0


def test_what_cannot_be_replayed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name a run's directory" in refusal(capsys, tmp_path)
    assert "command line" in refusal(capsys)
    folder = by_hand(tmp_path / "a")
    assert "--policy = 'qsrr': choose one of" in refusal(capsys, folder, "--policy", "qsrr")
    assert "--policy = 'none.toml': cannot be read" in refusal(capsys, folder, "--policy", "none.toml")
    assert "--policy = 'no:Where'" in refusal(capsys, folder, "--policy", "no:Where")
    assert "only with --policy" in refusal(capsys, folder, "--out", tmp_path)
    metrics = folder / "metrics.jsonl"
    assert f"--out = '{metrics}'" in refusal(capsys, folder, "--policy", "qsr", "--out", metrics)
    (folder / "config.toml").unlink()
    assert f"config = '{folder / 'config.toml'}': cannot be read" in refusal(capsys, folder)
    assert len(replay(folder, Constant())) == 7


@pytest.mark.parametrize(
    ("number", "old", "new", "said"),
    [
        (4, '"seen"', '"saw"', "line 4: seen is missing: rounds were recorded without it once; train the run again"),
        (4, '"decided"', '"chose"', "line 4: decided is missing"),
        (4, '"samples": 2000', '"samples": "2000"', "line 4: seen.samples = '2000': must be a number"),
        (4, '"steps": 8', '"strides": 8', "line 4: seen: "),
        (5, '"batch_per_rank": 64', '"batch_per_rank": 0', "line 5: decided: batch_per_rank = 0: must be at least 1"),
        (5, '"phase"', '"stage"', "line 5: decided: 'phase' is missing"),
        (5, "{", "[", "line 5: is not JSON"),
        (1, '"number": 0', '"number": 3', "phase 0 is missing"),
        (1, '"why"', '"because"', "line 1: plan: 'why' is missing"),
    ],
)
def test_a_corrupt_record_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, old: str, new: str, said: str
) -> None:
    folder = by_hand(tmp_path / "a")
    edit(folder, number, old, new)
    assert said in refusal(capsys, folder)
    with pytest.raises(ConfigError):
        replay(folder)


def test_the_command_needs_no_torch() -> None:
    look = "import sys, trainer.replay.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], timeout=60).returncode == 0
