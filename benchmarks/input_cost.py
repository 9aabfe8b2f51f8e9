"""Processor time that reading a user's own data costs, a sample, beside a plain DataLoader.

    python -m benchmarks.input_cost [--samples 4096] [--repeats 5]

Reading happens in the training process. Two data sets: one whose items take about no time, which shows what is added,
and one whose items draw from every random state. Passes of `LocalSGD.batches` and of the DataLoader alternate, so that
a slow moment meets both; the figure is the least of the repeats. No step is trained in between.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.provenance import provenance
from trainer import Constant, LocalSGD, Plan

RESULT = Path("benchmarks/results/input_cost.json")
BATCHES = (8, 32, 128)


class Rows(Dataset[Any]):
    """Rows of a table that is held in memory, with a label each."""

    def __init__(self, samples: int, noise: bool) -> None:
        self.rows, self.noise = torch.randn(samples, 16), noise

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        row = self.rows[index]
        if self.noise:
            row = row + torch.rand(()) * np.random.rand() * random.random()
        return row, index % 10


def processor_s(batches: Iterable[Any]) -> float:
    """Of reading them all."""
    began = time.process_time()
    for _ in batches:
        pass
    return time.process_time() - began


def measure(dataset: Dataset[Any], batch: int, samples: int, repeats: int) -> dict[str, float]:
    """Microseconds a sample of both, and their ratio."""
    model = torch.nn.Linear(1, 1)
    policy = Constant(Plan(batch, 4))
    with LocalSGD(model, torch.optim.SGD(model.parameters(), 0.1), policy) as sync:
        ways: dict[str, Callable[[], Iterable[Any]]] = {
            "dataloader": lambda: DataLoader(dataset, batch_size=batch, shuffle=True),
            "batches": lambda: sync.batches(dataset),
        }
        for begin in ways.values():  # warm up
            processor_s(begin())
        taken = {name: [0.0] * repeats for name in ways}
        for repeat in range(repeats):
            for name, begin in ways.items():
                taken[name][repeat] = processor_s(begin())
    found = {f"{name}_us": round(min(each) / samples * 1e6, 3) for name, each in taken.items()}
    return found | {"ratio": round(found["batches_us"] / found["dataloader_us"], 3)}


def main() -> None:
    """Measure, print a table, and write the figures down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets: dict[str, Dataset[Any]] = {
        "rows": Rows(args.samples, noise=False),
        "rows with random draws": Rows(args.samples, noise=True),
        "tensors": TensorDataset(torch.randn(args.samples, 16), torch.arange(args.samples)),
    }
    figures = {}
    print(f"{'data set':24}{'batch':>6}{'DataLoader':>12}{'batches':>10}{'ratio':>8}   processor time, us a sample")
    for name, dataset in datasets.items():
        for batch in BATCHES:
            found = measure(dataset, batch, args.samples, args.repeats)
            figures[f"{name}, batch {batch}"] = found
            print(f"{name:24}{batch:6}{found['dataloader_us']:12.2f}{found['batches_us']:10.2f}{found['ratio']:8.2f}")
    RESULT.write_text(json.dumps({"provenance": provenance(), "samples": args.samples, **figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
