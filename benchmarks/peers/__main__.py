"""Ebbtide and its peers on the very same work, over links of a given rate.

    python -m benchmarks.peers [--rate 100mbit] [--hosts 2] [--seeds 3] [--methods ebbtide accelerate ...] [--lr 0.05]
                              [--series NAME] [--quick]

The work: the FedAvg CNN on Fashion-MNIST, batch 32 a rank, period 16, SGD 0.05 with Nesterov momentum 0.9, cosine,
118,784 samples over all ranks (1,856 local steps of two ranks: a whole number of rounds). Every method gets the same
initial model, the same batches in the same order and the same schedule, on one core a host; only what is sent, and
when, is its own. Evaluation and start-up are off the clock. A finished run is kept in results/peers/LINK-HOSTS-hosts/
and skipped the next time; the table lies beside that folder. Runs of several days may lie in one folder: each is
compared with compute alone of its own day (a file name is free to say more, as alone-0-beside-peers.json). `--lr` is a
trial of another rate than the 0.05 that all have. `ddp` takes a third of an hour at 100 Mbit/s: `--steps N` times N of
its steps instead, and `--rate ""` has its accuracy. Needs root, iproute2 and the `bench` extra.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.peers.methods import METHODS
from benchmarks.provenance import provenance
from benchmarks.shaped import hosts, interface_bytes, place_of, write_table
from benchmarks.work import BATCH, LR, PERIOD, SAMPLES, Work
from trainer.config.config import WorldConfig
from trainer.distributed.collectives import Collectives
from trainer.distributed.world import open_world

RESULTS = Path("benchmarks/results/peers")
DEFAULT = ["alone", "ebbtide_int4_outer_4", "ebbtide_int4", "ebbtide", "ebbtide_int4_period_4"]
DEFAULT += ["post_local_sgd", "accelerate", "torchft_local_sgd", "torchft_diloco"]


def worker(name: str, seed: int, lr: float, steps: int | None, out: Path) -> None:
    """One rank of one run; rank 0 writes what the slowest rank took, and the accuracy of the final model."""
    torch.set_num_threads(1)
    with open_world(WorldConfig(backend="gloo")) as world:
        work = Work.of(world, seed, lr)
        done = min(steps or work.steps, work.steps)
        with METHODS[name](work.model, work.optimizer, world, BATCH, PERIOD) as method:
            dist.barrier()
            sent, began = interface_bytes(), time.perf_counter()
            work.train(done, method.model, method.optimizer, method.step)
            method.finish()
            took = time.perf_counter() - began
            sent = interface_bytes() - sent
        figures = {"elapsed_s": took, "sent_bytes": sent, "weights": checksum(work.model.parameters())}
        ranks = Collectives(world, None, 2**20).gather(figures)
        accuracy = work.accuracy()
    if world.rank == 0:
        result = {
            "method": name,
            "seed": seed,
            "lr": lr,
            "hosts": world.size,
            "local_steps": done,
            "samples": done * BATCH * world.size,
            "elapsed_s": max(rank["elapsed_s"] for rank in ranks),
            "sent_bytes": max(rank["sent_bytes"] for rank in ranks),
            "one_model": len({rank["weights"] for rank in ranks}) == 1,
            "test_accuracy": accuracy,
            "versions": {package: _version(package) for package in ("torch", "accelerate", "torchft")},
        }
        out.write_text(json.dumps(result | {"provenance": provenance()}, indent=1) + "\n")


def checksum(parameters: Iterable[torch.Tensor]) -> float:
    """A number that replicas share if they are one."""
    return float(torch.stack([parameter.detach().double().sum() for parameter in parameters]).sum())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def rows(found: list[dict[str, Any]]) -> list[list[str]]:
    """A row a method: mean and spread over its seeds, and its time over compute alone's of the same days, since the
    machine is not every day as fast: the medians' ratio, and of the ratios of each seed's neighbours in time, since it
    is not every minute as fast, median and range."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in found:
        other = "" if run.get("lr", LR) == LR else f", rate {run['lr']:g}"
        by_method.setdefault(f"`{run['method']}`{other}", []).append(run)
    lines = []
    alone = {(run["seed"], run["provenance"]["when"]): step_s([run]) for run in by_method.get("`alone`", [])}
    for name, runs in sorted(by_method.items(), key=lambda item: step_s(item[1])):
        days = {run["provenance"]["when"] for run in runs}
        base = [run for run in by_method.get("`alone`", []) if run["provenance"]["when"] in days]
        beside = [(run, alone.get((run["seed"], run["provenance"]["when"]))) for run in runs]
        ratios = [step_s([run]) / least for run, least in beside if least is not None]
        whole = [run for run in runs if run["samples"] == SAMPLES]
        accuracy = [run["test_accuracy"] for run in whole if run["one_model"]]
        spread = f" ± {statistics.stdev(accuracy):.4f}" if len(accuracy) > 1 else ""
        seconds = [run["elapsed_s"] for run in whole]
        lines.append(
            [
                name,
                f"{statistics.median(seconds):.1f}" if seconds else f"not run whole: {runs[0]['local_steps']} steps",
                f"{min(seconds):.1f} to {max(seconds):.1f}" if seconds else "",
                f"{1000 * step_s(runs):.1f}",
                f"{step_s(runs) / step_s(base):.2f}" if base else "",
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "",
                f"{statistics.mean(accuracy):.4f}{spread}" if accuracy else "",
                f"{1000 * statistics.median(run['sent_bytes'] / run['local_steps'] for run in runs) / 1e6:.0f}",
                str(len(runs)),
            ]
        )
    return lines


def step_s(runs: list[dict[str, Any]]) -> float:
    """Median seconds a local step."""
    seconds: list[float] = [run["elapsed_s"] / run["local_steps"] for run in runs]
    return statistics.median(seconds)


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--rate", default="100mbit", help='of every link; "" is as fast as it goes')
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=DEFAULT, choices=list(METHODS))
    parser.add_argument("--lr", type=float, default=LR, help="peak learning rate of these runs")
    parser.add_argument("--steps", type=int, help="stop after so many local steps; accuracy then means little")
    parser.add_argument("--series", help="of other ways or another machine, whose results lie apart under this name")
    parser.add_argument("--quick", action="store_true", help="64 steps and one seed of every method; keeps nothing")
    parser.add_argument("--worker", nargs=3, metavar=("METHOD", "SEED", "OUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker[0], int(args.worker[1]), args.lr, args.steps, Path(args.worker[2]))
        return
    place = place_of(args.rate, args.hosts, args.series)
    folder = Path(tempfile.mkdtemp()) if args.quick else RESULTS / place
    folder.mkdir(parents=True, exist_ok=True)
    steps = 64 if args.quick else args.steps
    limit = ["--lr", str(args.lr), *(["--steps", str(steps)] if steps else [])]
    trial = "" if args.lr == LR else f"-{args.lr:g}"
    for seed in range(1 if args.quick else args.seeds):
        for name in args.methods:
            out = folder / f"{name}-{seed}{trial}.json"
            if not out.exists():
                with hosts(args.hosts, args.rate) as shaped:
                    shaped.run(
                        "benchmarks.peers", *limit, "--worker", name, str(seed), str(out.resolve()), timeout_s=1800
                    )
                print(name, seed, json.loads(out.read_text())["elapsed_s"], flush=True)
    head = ["method", "median s", "range", "ms a step", "of compute alone", "by seed", "test accuracy"]
    head += ["MB sent a rank in 1,000 steps", "seeds"]
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    table = Path(tempfile.mkdtemp()) / "table.md" if args.quick else RESULTS / f"{place}.md"
    print(write_table(table, head, rows(found)))


if __name__ == "__main__":
    main()
