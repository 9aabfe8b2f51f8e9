"""What signals and decisions cost a rank, as a share of its local steps.

    python -m benchmarks.signal_cost [--repeats 30]

The FedAvg CNN at batch 32 on one core. A local step is timed, and beside it everything that a round adds for the
controller's sake: at a round's first step, and at most once in eight, the gradient's norm and sketch; at its end the
message's packing and reading (for two ranks), the estimates and the autopilot's decision; every 64 local steps a
comparison of all its candidates; at period 1 the norms of the buckets before and after, once an observation of eight
steps. Medians; the message's extra bytes are counted, not timed.

How many candidates there are depends on how fast replicas part. All is measured twice: with replicas that part as
slowly as this model's did in a run over 100 Mbit/s, and with some that never do, where most candidates are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.provenance import provenance
from trainer.control.controller import Controller
from trainer.control.reports import SKETCH, Report, Total
from trainer.control.signals import Signals
from trainer.plan import Observation, Plan
from trainer.policies import Autopilot
from trainer.policies.constants import CONSTANTS
from trainer.sync.gradient_notes import GradientNotes
from trainer.tasks import FedAvgCNN

RESULT = Path("benchmarks/results/signal_cost.json")
BATCH, OBSERVE = 32, 8
DRIFTS = {"as_in_a_run": 0.03, "most_candidates": 0.0}
"""Divergence over the model's squared norm, of one local step at a learning rate of 1; in that run 0.03 to 0.06."""


def seconds(work: Callable[[], object]) -> float:
    """How long it took."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(repeats: int, drift: float) -> dict[str, float]:
    """Median seconds of each part, where replicas part so; of comparing candidates, seconds a local step."""
    torch.manual_seed(0)
    model = FedAvgCNN(10, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, nesterov=True)
    x, y = torch.randn(BATCH, 1, 28, 28), torch.randint(0, 10, (BATCH,))
    notes, signals, controller = GradientNotes(torch.device("cpu")), Signals(), Controller(Autopilot())
    found: dict[str, list[float]] = {"step": [], "note": [], "message": [], "decide": [], "buckets": []}

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        optimizer.step()

    def message() -> None:
        report = Report(steps=16, samples=16 * BATCH, sketch=notes.sketch(), **notes.noted())
        both = [2 * number for number in report.sums(2)]
        signals.take(Total.of(both, report.mosts(), [report.own] * 2), 0, 1.0)
        notes.begin()

    def buckets() -> None:
        own = [notes.bucket(bucket) for bucket in flat]
        for squared, mean in zip(own, flat, strict=True):
            assert squared is not None, "an observation's first step is noted"
            notes.averaged(squared, mean)
        notes.sum_up()

    for number in range(repeats * OBSERVE):
        found["step"].append(seconds(step))
        found["note"].append(seconds(lambda number=number: notes.note([*model.parameters()], number)))  # type: ignore[misc]
        found["message"].append(seconds(message))
        flat = [torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])]
        found["buckets"].append(seconds(buckets))
        notes.begin()
        seen = observation(number, controller.plan, drift)
        found["decide"].append(seconds(lambda seen=seen: controller.observe(seen)))  # type: ignore[misc]
    medians = {name: statistics.median(times) for name, times in found.items()}
    rest = statistics.mean(found["decide"]) - medians["decide"]  # few decisions compare, and take long
    return medians | {"compare": rest / SEEN.steps}


def observation(number: int, plan: Plan, drift: float) -> Observation:
    """Of a round of `SEEN.steps`, whose replicas parted at this unit drift."""
    divergence = drift * SEEN.lr**2 * SEEN.steps**CONSTANTS.drift_power * SEEN.model_sq_norm
    return replace(SEEN, round=number, local_step=SEEN.steps * number, ran=plan, divergence=divergence)


def share(parts: dict[str, float], period: int) -> float:
    """Of a local step, at a period of so many."""
    rounds = OBSERVE if period == 1 else period
    noted = parts["buckets"] / OBSERVE if period == 1 else parts["note"] / max(period, OBSERVE)
    return (noted + (parts["message"] + parts["decide"]) / rounds + parts["compare"]) / parts["step"]


SEEN = Observation(
    ranks=2,
    steps=16,
    slowest_compute_s=0.5,
    sync_wait_s=0.0,
    transfer_s=0.1,
    noise_scale=500.0,
    model_sq_norm=100.0,
    lr=0.05,
    progress=0.1,
)


def main() -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.signal_cost", description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    torch.set_num_threads(1)
    repeats, kept = parser.parse_args().repeats, {}
    for name, drift in DRIFTS.items():
        parts = measure(repeats, drift)
        shares = {f"period {period}": round(share(parts, period), 5) for period in (1, 4, 8, 16, 32)}
        kept[name] = {"milliseconds": {part: round(1e3 * took, 3) for part, took in parts.items()}, "shares": shares}
    RESULT.write_text(json.dumps(kept | {"bytes_a_message": 8 * (SKETCH + 3), "provenance": provenance()}, indent=1))
    print(json.dumps(kept, indent=1))


if __name__ == "__main__":
    main()
