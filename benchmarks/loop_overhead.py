"""The trainer's own cost: samples/s and memory of one rank against a bare PyTorch loop on the same work.

    python -m benchmarks.loop_overhead [--only speed] [--quick] [--out benchmarks/results/loop_overhead.json]

Both train the FedAvg CNN by the same rule on the same pictures: ours with torch's fused optimizer, which the trainer
takes wherever it may, the bare loop with torch's default. Speed: in turns in one process, at period 1, by batch.
Memory: a fresh process each, the peak in a local phase of two ranks against one bare process, and against the same two
ranks where nothing is averaged, which alone tells what averaging takes; for that CNN (6.7 MB of parameters) and one
with eight times the hidden units (52 MB).
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import os
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.provenance import provenance
from trainer.config.config import DataConfig, OptimConfig, StepConfig, WorldConfig
from trainer.config.sync import SyncConfig
from trainer.data import ShardStream, open_part, shard_of
from trainer.distributed.world import World, open_world
from trainer.loop.optimizer import build_optimizer, learning_rate, set_learning_rate
from trainer.loop.step import LocalStep
from trainer.memory import keep_freed_memory, peak_memory_bytes
from trainer.plan import Plan
from trainer.policies import Constant
from trainer.sync.local_sgd import LocalSGD
from trainer.tasks import FedAvgCNN, parameter_count

OPTIM = OptimConfig()


def bare(data: DataConfig, batch: int, shards: int = 1, hidden: int = 512) -> Iterator[None]:
    """A plain loop that looks up shuffled uint8 pictures, normalises and trains, and nothing else; a step at a time."""
    part = open_part(data, train=True, seed=0)
    pictures, labels = part.subset(np.arange(len(part) // shards)).items.tensors
    del part
    torch.manual_seed(0)
    model, loss_function = FedAvgCNN(hidden=hidden), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), OPTIM.lr, momentum=OPTIM.momentum, nesterov=OPTIM.nesterov)
    order = torch.randperm(len(pictures))
    for step in itertools.count():
        start = step * batch % (len(order) - batch)
        chosen = order[start : start + batch]
        optimizer.zero_grad()
        loss = loss_function(model((pictures[chosen].float() / 255 - 0.286) / 0.353), labels[chosen])
        loss.backward()
        optimizer.step()
        yield


def ours(
    data: DataConfig,
    batch: int,
    world: World | None = None,
    period: int = 1,
    settings: SyncConfig = SyncConfig(),  # noqa: B008  # frozen
    hidden: int = 512,
    steps: int = 2**32,
) -> Iterator[None]:
    """The trainer's loop: stream, step, schedule, synchronizer, observations; a step at a time."""
    world = world or World()
    part = open_part(data, train=True, seed=0)
    stream = ShardStream(part.subset(shard_of("iid", len(part), world.size, world.rank, 0)), data, world, 0)
    del part
    torch.manual_seed(0)
    model = FedAvgCNN(hidden=hidden)
    step_of = LocalStep(StepConfig(), OPTIM, nn.CrossEntropyLoss(), world.device)
    optimizer = build_optimizer(OPTIM, model.parameters(), fused=True)
    total = steps * batch * world.size
    with LocalSGD(model, optimizer, Constant(Plan(batch, period)), settings=settings, world=world) as sync:
        for inputs, labels in sync.batches(stream, total):
            set_learning_rate(optimizer, learning_rate(OPTIM, sync.samples, total))
            loss, skipped, correct = step_of(sync, inputs, labels)
            sync.step(loss, skipped=skipped, correct=correct)
            yield


WARM_UP, TURNS, MEMORY_STEPS = 2, 8, 64
BATCHES, HIDDEN = (32, 256), (512, 4_096)
NO_AVERAGING = "no averaging"
MODES: dict[str, dict[str, Any]] = {
    NO_AVERAGING: {"period": 2**31},
    "blocking": {},
    "delayed float32": {"delay_steps": 8},
    "delayed int8": {"delay_steps": 8, "wire_format": "int8"},
}


def seconds_of(loop: Iterator[None], steps: int) -> float:
    """That so many steps take, once a few have warmed it up again."""
    for _ in range(WARM_UP):
        next(loop)
    began = time.perf_counter()
    for _ in range(steps):
        next(loop)
    return time.perf_counter() - began


def speed(data: DataConfig, batch: int, repeats: int, seconds: float) -> dict[str, Any]:
    """Fresh loops in each repeat, in turns of an eighth of the seconds, each order as often as the other: machines
    change their speed within seconds."""
    steps = max(10, int(seconds / TURNS * 10 / seconds_of(bare(data, batch), 10)))
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(repeats):
        loops = {"bare": bare(data, batch), "ours": ours(data, batch)}
        took = dict.fromkeys(loops, 0.0)
        for turn in range(TURNS):
            for name in ("bare", "ours") if turn % 2 else ("ours", "bare"):
                took[name] += seconds_of(loops[name], steps)
        for name, total in took.items():
            rates[name].append(TURNS * steps * batch / total)
    ratios = [mine / plain for mine, plain in zip(rates["ours"], rates["bare"], strict=True)]
    return {
        "batch": batch,
        "steps": steps,
        "bare_samples_per_s": statistics.median(rates["bare"]),
        "ours_samples_per_s": statistics.median(rates["ours"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def _peak(send: Any, place: dict[str, str], data: DataConfig, batch: int, hidden: int, mode: str) -> None:
    os.environ.update(place)
    torch.set_num_threads(1)
    keep_freed_memory()
    with open_world(WorldConfig(backend="gloo")) if place else nullcontext() as world:
        loop = bare(data, batch, shards=2, hidden=hidden)
        if place:
            settings = dict(MODES[mode])
            period = settings.pop("period", 16)
            loop = ours(data, batch, world, period, SyncConfig(**settings), hidden, steps=WARM_UP + MEMORY_STEPS)
        seconds_of(loop, MEMORY_STEPS)
        send.send(peak_memory_bytes(torch.device("cpu")))
        if place:
            next(loop, None)  # to its end: what is still apart is averaged


def peaks(data: DataConfig, batch: int, hidden: int, ranks: int, mode: str = "blocking") -> list[int]:
    """Peak bytes of each process: `ranks` of ours in a local phase, or 0 for one bare loop."""
    context = mp.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    found, started = [], []
    for rank in range(max(ranks, 1)):
        receive, send = context.Pipe(duplex=False)
        place = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
        }
        place |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_peak, args=(send, place if ranks else {}, data, batch, hidden, mode))
        process.start()
        started.append((process, receive))
    for process, receive in started:
        found.append(receive.recv())
        process.join()
    return found


def memory(data: DataConfig, batch: int, hidden: int, repeats: int) -> dict[str, Any]:
    """A rank's peak in a local phase over the bare loop's and over no averaging, in units of the parameters' bytes."""
    model_bytes = parameter_count(FedAvgCNN(hidden=hidden)) * 4
    plain: list[int] = []
    ranks: dict[str, list[int]] = {mode: [] for mode in MODES}
    for _ in range(repeats):
        plain += peaks(data, batch, hidden, 0)
        for mode, found in ranks.items():
            found += peaks(data, batch, hidden, 2, mode)
    middle = {mode: statistics.median(found) for mode, found in ranks.items()}
    bases = {"bare_loop": statistics.median(plain), "no_averaging": middle[NO_AVERAGING]}
    above = {
        base: {mode: (peak - least) / model_bytes for mode, peak in middle.items()} for base, least in bases.items()
    }
    return {
        "batch": batch,
        "parameter_bytes": model_bytes,
        "bare_peak_bytes": plain,
        "rank_peak_bytes": ranks,
        "above_in_parameters": above,
    }


def speeds(data: DataConfig, repeats: int, seconds: float) -> list[dict[str, Any]]:
    """By batch."""
    found = []
    for batch in BATCHES:
        figures = speed(data, batch, repeats, seconds)
        found.append(figures)
        print(
            f"batch {batch}: ours {figures['ours_samples_per_s']:,.0f}, bare {figures['bare_samples_per_s']:,.0f} "
            f"samples/s, ratio {figures['ratio']:.3f} ({min(figures['ratios']):.3f} to {max(figures['ratios']):.3f})",
            flush=True,
        )
    return found


def memories(data: DataConfig, repeats: int) -> list[dict[str, Any]]:
    """By size."""
    found = []
    for hidden in HIDDEN:
        figures = memory(data, 32, hidden, repeats)
        found.append(figures)
        above = figures["above_in_parameters"]
        for mode in MODES:
            print(
                f"peak of a rank, {figures['parameter_bytes'] / 1e6:.1f} MB, {mode}: in parameters' bytes "
                f"{above['bare_loop'][mode]:.2f} above the bare loop's, {above['no_averaging'][mode]:.2f} above that "
                "without averaging",
                flush=True,
            )
    return found


def main() -> None:
    """Measure, print, write the raw figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop_overhead", description=__doc__)
    parser.add_argument("--only", choices=("speed", "memory"), help="measure one, and keep the other as it was")
    parser.add_argument("--quick", action="store_true", help="a minute instead of several; keeps nothing")
    parser.add_argument("--data", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--out", default="benchmarks/results/loop_overhead.json")
    args = parser.parse_args()
    data = DataConfig(root=args.data)
    repeats, seconds = (3, 2.0) if args.quick else (9, 8.0)
    torch.set_num_threads(1)
    keep_freed_memory()  # for both
    out = Path(args.out)
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for part in [args.only] if args.only else ["speed", "memory"]:
        measured = speeds(data, repeats, seconds) if part == "speed" else memories(data, 2 if args.quick else 6)
        result[part] = {"provenance": provenance(), "measured": measured}
        if not args.quick:
            out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
