"""What LocalSGD itself costs a loop: a step, a round's first step, and a round's message by the number of ranks.

    python -m benchmarks.overhead [--quick] [--out benchmarks/results/overhead.json]

Steps: the time of `optimizer.step()` and `sync.step()`, less that of the same optimizer by itself, in turns, one rank.
Once for a model of two tensors (microseconds), once for 2,000 tensors of 64 values (as a share of AdamW's own step). A
round's first step also notes its gradient, as it does beside other ranks. Message: processor time that a rank takes to
make its report and to turn all ranks' reports into an observation, and the bytes that it sends. The network is left
out, and the ranks are made up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.provenance import provenance
from trainer.control.reports import Report, Total
from trainer.control.signals import Signals, reduce
from trainer.plan import Plan
from trainer.policies import Constant
from trainer.sync.gradient_notes import GradientNotes
from trainer.sync.local_sgd import LocalSGD

PERIOD = 16
RANKS = (64, 512, 4_096)


def two_tensors() -> nn.Module:
    """The smallest model that is one."""
    return nn.Linear(4, 1)


def many_tensors() -> nn.Module:
    """2,000 tensors of 64 values."""
    model = nn.Module()
    model.weights = nn.ParameterList([nn.Parameter(torch.zeros(64)) for _ in range(2_000)])
    return model


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3, foreach=True)


def seconds(work: Callable[[], Any]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def steps(build: Callable[[], nn.Module], rounds: int) -> dict[str, float]:
    """Median seconds of the optimizer's step alone, of a step under LocalSGD, and of a round's first and last one."""
    torch.manual_seed(0)
    bare, ours = build(), build()
    optimizers = make_optimizer(bare), make_optimizer(ours)
    loss = torch.tensor(1.0)
    found: dict[str, list[float]] = {"bare": [], "step": [], "first": [], "last": []}
    with LocalSGD(ours, optimizers[1], Constant(Plan(8, PERIOD))) as sync:
        # one rank alone notes no gradients; here it shall, as beside others
        sync._progress.notes = sync._early._notes = GradientNotes(torch.device("cpu"), 1)

        def step() -> None:
            optimizers[1].step()
            sync.step(loss, samples=8)

        for number in range(rounds * PERIOD):
            for model in (bare, ours):
                give_gradients(model)
            found["bare"].append(seconds(optimizers[0].step))
            place = number % PERIOD
            kind = "first" if place == 0 else "last" if place == PERIOD - 1 else "step"
            found[kind].append(seconds(step))
    return {name: statistics.median(times[len(times) // 5 :]) for name, times in found.items()}


def message(ranks: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of processor time and bytes a rank, of one round's message among so many ranks."""
    signals = Signals()
    report = Report(steps=16, samples=512, grad_sq=2.0, sketch=[0.1] * 256, compute_s=1.0, loss_sum=512.0)
    took = []
    for number in range(repeats):
        began = time.process_time()
        sums, mosts = report.sums(ranks), report.mosts()
        everyone = torch.full((ranks,), report.own, dtype=torch.float64)
        total = Total.of([ranks * value for value in sums], mosts, everyone.numpy())
        total.weights().tolist()
        total.mean_sq_norm()
        seen = reduce(total, 0)
        signals.take(total, number, seen.train_loss)
        took.append(time.process_time() - began)
    sent = 2 * 8 * (len(sums) + len(mosts)) + 8 * ranks
    return {"ranks": ranks, "milliseconds": 1e3 * statistics.median(took), "bytes": sent}


def main() -> None:
    """Measure, print, write the raw figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="seconds in place of a minute; keeps nothing")
    parser.add_argument("--out", default="benchmarks/results/overhead.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rounds, repeats = (20, 50) if args.quick else (150, 400)
    small, large = steps(two_tensors, 4 * rounds), steps(many_tensors, rounds)
    messages = [message(ranks, repeats) for ranks in RANKS]
    for kind in ("step", "first", "last"):
        micro = 1e6 * (small[kind] - small["bare"])
        share = (large[kind] - large["bare"]) / large["bare"]
        print(f"{kind:>5} step: two tensors {micro:.0f} µs, 2,000 tensors {share:.2f} of AdamW's step", flush=True)
    for each in messages:
        print(f"message, {each['ranks']:,} ranks: {each['milliseconds']:.2f} ms, {each['bytes'] / 1e3:.1f} kB")
    if not args.quick:
        result = {"provenance": provenance(), "two_tensors": small, "many_tensors": large, "messages": messages}
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
