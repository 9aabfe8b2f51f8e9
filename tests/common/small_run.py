"""A small run for tests of launching: its recipe, its records, and whether two of them came to one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

RECIPE = """
[run]
samples = 3_200
[data]
name = "fake"
train_limit = 2_048
test_limit = 256
[policy]
name = "alternating"
samples_per_phase = 1_500
[policy.small]
batch_per_rank = 16
sync_period_steps = 8
[policy.large]
batch_per_rank = 64
sync_period_steps = 1
[sync]
observe_steps = 2
[eval]
every_samples = 1_500
[checkpoint]
every_samples = 500
[record]
progress = false
tensorboard = false
reference_s = 0.0
report = false
"""


def records(run: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The whole lines that the run has written so far, of one kind or all."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [line for line in map(json.loads, lines) if kind in (None, line["kind"])]


def assert_same_model(run: Path, other: Path) -> None:
    """Both ended with the very same weights."""
    ours, theirs = (torch.load(folder / "model.pt", weights_only=True) for folder in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
