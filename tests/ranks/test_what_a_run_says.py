"""What a run says to whoever started it: before its first step, at its end, and where something is amiss."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from commands import Command, ranks_env

RECIPE = """
[run]
name = "first"
samples = 1_200
[world]
backend = "gloo"
[data]
name = "fake"
train_limit = 600
test_limit = 100
[policy]
name = "alternating"
samples_per_phase = 0.5
[policy.small]
batch_per_rank = 16
sync_period_steps = 4
[policy.large]
batch_per_rank = 64
sync_period_steps = 1
[sync]
observe_steps = 1
[record]
tensorboard = false
reference_s = 0.0
"""


def train(folder: Path, *flags: str, ranks: int = 1, path: Path | None = None) -> tuple[str, str]:
    """What rank 0 says on both streams of a run that ends well."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE)
    more = {} if path is None else {"PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    given = [str(recipe), "--run.root", str(folder), *flags]
    processes = [Command("trainer", given, env | more) for env in ranks_env(ranks)]
    try:
        told = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, told
    assert told[1:] == [("", "")] * (ranks - 1)
    return told[0]


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two ranks, and what it said."""
    folder = tmp_path_factory.mktemp("runs")
    said, wrong = train(folder, ranks=2)
    assert wrong == ""
    return folder / "first", said


def test_a_run_says_what_it_trains_before_it_starts(first: tuple[Path, str]) -> None:
    folder, said = first
    assert said.splitlines()[:4] == [
        "run first: fake (600 samples), fedavg_cnn (1,663,370 parameters), 1,200 samples to train",
        f"on 2 ranks (cpu, 1 thread a rank), recorded in {folder}",
        "policy alternating: small batch 16 a rank, period 4; large batch 64 a rank, period 1",
        "phase 0: small, batch 16 a rank, period 4",
    ]
    assert "warning" not in said


def test_a_run_draws_its_own_page_and_names_it(first: tuple[Path, str]) -> None:
    folder, said = first
    assert said.splitlines()[-1] == f"report: {folder / 'report.html'}"
    page = (folder / "report.html").read_text()
    for words in ("fake (600 samples), fedavg_cnn (1,663,370 parameters)", "2 ranks", "torch", "UTC"):
        assert words in page


def test_a_share_of_the_run_is_a_phases_length(first: tuple[Path, str]) -> None:
    phases = records(first[0], "phase")
    assert [phase["name"] for phase in phases] == ["small", "large"]
    assert phases[1]["why"] == {"phase_samples": 640, "samples_per_phase": 600}  # a round is 128 samples


def test_the_summary_tells_what_when_and_how_long(first: tuple[Path, str]) -> None:
    summary = json.loads((first[0] / "summary.json").read_text())
    assert (summary["data"], summary["model"], summary["parameters"]) == ("fake", "fedavg_cnn", 1_663_370)
    assert summary["wall_s"] > summary["elapsed_s"] > 0
    (started,) = [event for event in records(first[0], "event") if event["what"] == "started"]
    assert started["started_at"] == summary["started_at"]
    assert [plan["name"] for plan in started["plans"]] == ["small", "large"]


def test_what_is_amiss_is_a_warning_and_never_an_error(first: tuple[Path, str], tmp_path: Path) -> None:
    """A folder that is in use, a run too short for two phases, and a page that cannot be drawn."""
    (tmp_path / "matplotlib.py").write_text("raise RuntimeError('no pictures here')\n")
    root = first[0].parent
    said, wrong = train(root, "--policy.samples-per-phase", "1e4", path=tmp_path)
    assert f"{root / 'first'} held an earlier run: it is now {root / 'first.1'}\n" in said
    assert "warning: run.samples = 1200: the second phase begins after 10,000 samples" in said
    assert wrong == "warning: no report.html: RuntimeError: no pictures here\n"
    assert "report: " not in said
    assert not (root / "first" / "report.html").exists()
    assert (root / "first.1" / "report.html").exists()
    warnings = [event["message"] for event in records(root / "first", "event") if event["what"] == "warning"]
    assert len(warnings) == 2
    assert len(records(root / "first", "end")) == 1
