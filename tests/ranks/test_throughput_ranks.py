"""The throughput suite on real ranks: measured, gone on with, and refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Command, ranks_env
from torch import nn

SHORT = "--batches 4 --periods 4 --image-size 8 --repeats 1 --seconds 0.1"


def little(num_classes: int, channels: int) -> nn.Module:
    """A user's own model."""
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, num_classes))


class Hungry(nn.Module):
    """Asks for more memory than there is, on one rank of two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = little(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.environ["RANK"] == "1":
            torch.empty(2**60, dtype=torch.uint8)
        out: torch.Tensor = self.inner(x)
        return out


def hungry(num_classes: int, channels: int) -> nn.Module:
    return Hungry()


def suite(out: Path, *flags: str, ranks: int = 2) -> tuple[list[int | None], str, str]:
    """Exit codes, and what all ranks said on their output and on their error stream."""
    given = [*SHORT.split(), "--out", str(out), *flags]
    processes = [Command("benchmarks.throughput", given, env) for env in ranks_env(ranks)]
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *map("".join, zip(*told, strict=True))


def test_a_suite_measures_goes_on_and_reports(tmp_path: Path) -> None:
    codes, said, wrong = suite(tmp_path, "--models", "test_throughput_ranks:little")
    assert (codes, wrong) == ([0, 0], "")
    assert said.count("samples/s") == 2
    assert said.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    table = json.loads((tmp_path / "cost.json").read_text())
    assert table["links"]["node"]["ranks"] == 2
    assert table["compute"]["test_throughput_ranks:little"]["per_sample_s"] > 0
    files = sorted((tmp_path / "runs").glob("*.json"))
    records: list[dict[str, Any]] = [json.loads(path.read_text()) for path in files]
    assert [record["case"]["world_size"] for record in records] == [1, 2]
    for record in records:
        figures = record["figures"]
        assert figures["samples_per_s"] > 0
        assert figures["peak_memory_bytes"] > 0
        assert sum(figures["shares"].values()) == pytest.approx(1)
    before = {path: path.read_bytes() for path in files}
    codes, said, wrong = suite(
        tmp_path, "--models", "test_throughput_ranks:little", "--wire-formats", "float32", "int8"
    )
    assert (codes, wrong) == ([0, 0], "")
    assert said.count("samples/s") == 1, "the rest was there"
    assert all(path.read_bytes() == kept for path, kept in before.items())


def test_a_model_that_does_not_fit_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    models = (
        "--models",
        "test_throughput_ranks:hungry",
        "test_throughput_ranks:little",
        "--world-sizes",
        "2",
        "--no-links",
    )
    codes, said, wrong = suite(tmp_path, *models)
    assert codes == [2, 2], wrong
    assert wrong.count("\n") == 1, wrong
    assert (
        "models = 'test_throughput_ranks:hungry': does not fit in memory with 4 samples a rank on 2 ranks; choose"
        in wrong
    )
    assert said.count("samples/s") == 1
    assert "does not fit in memory" in (tmp_path / "report.html").read_text()


def test_worlds_that_the_launcher_did_not_give_are_refused(tmp_path: Path) -> None:
    codes, _, wrong = suite(tmp_path, "--models", "test_throughput_ranks:little", "--world-sizes", "1", "4")
    assert codes == [2, 2]
    assert wrong.count("\n") == 1, wrong
    assert "world_sizes = 4: the launcher gave 2 ranks" in wrong
