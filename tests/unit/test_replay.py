"""Replays of really recorded runs, and of small hand-written ones whose decisions are known."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from trainer.config import recipes
from trainer.config.config import Config
from trainer.errors import ConfigError
from trainer.plan import Decision, Memory, Observation, Plan, observed, plain
from trainer.policies import QSR, Alternating, Constant, Policy, PostLocal
from trainer.replay import replay
from trainer.replay.__main__ import main

SMALL, LARGE = Plan(16, 8), Plan(64, 1)
NAME = "test_replay:Widening"


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
