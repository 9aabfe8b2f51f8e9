"""Communication that training waits for, and samples/s against compute alone, by link, wire format and delay.

    python -m benchmarks.overlap [--repeats 5] [--rounds 12] [--links 100mbit-2 ...] [--ways "int8, delay auto" ...]
                                 [--quick]

Ranks on hosts of their own, one core each, train the FedAvg CNN for some rounds of 16 local steps in every way, one way
after another and all again `repeats` times, in one process each, on one set of hosts. `alone` sends nothing. A row's
ratio is the median over the repeats of its samples/s over those of `alone` in the same repeat. A finished link is kept
in results/overlap/ and skipped the next time. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.provenance import provenance
from benchmarks.shaped import hosts, write_table
from benchmarks.work import BATCH, PERIOD, Work
from trainer import Constant, LocalSGD, Plan, SyncConfig
from trainer.config.config import WorldConfig
from trainer.distributed.collectives import Collectives
from trainer.distributed.world import World, open_world

RESULTS = Path("benchmarks/results/overlap")
HALVES: dict[str, Any] = {"wire_format": "int8", "delay_steps": "auto", "fragments": 2}
WAYS: dict[str, dict[str, Any]] = {
    "alone": {"period": 10**9},
    "float32, blocking": {},
    "float32, delay auto": {"delay_steps": "auto", "max_delay_steps": 16},
    "int8, blocking": {"wire_format": "int8"},
    "int8, delay auto": {"wire_format": "int8", "delay_steps": "auto", "max_delay_steps": 16},
    "int8, delay auto, 4 fragments": {
        "wire_format": "int8",
        "delay_steps": "auto",
        "max_delay_steps": 16,
        "fragments": 4,
    },
    "int4, blocking": {"wire_format": "int4"},
    "int4, delay auto": {"wire_format": "int4", "delay_steps": "auto", "max_delay_steps": 16},
    "int8, delay auto, 2 fragments": HALVES,
    "int8, delay auto, 2 fragments, outer 0.4": {**HALVES, "outer": "fedavgm", "outer_momentum": 0.4},
}
LINKS = {"1gbit-2": ("1gbit", 2), "100mbit-2": ("100mbit", 2), "100mbit-4": ("100mbit", 4), "10mbit-2": ("10mbit", 2)}


def one(world: World, name: str, rounds: int) -> dict[str, float]:
    """Some rounds in one way; what the slowest rank took, and what ranks waited in the mean."""
    work = Work.of(world, 0)
    settings = dict(WAYS[name])
    policy = Constant(Plan(BATCH, settings.pop("period", PERIOD)))
    told = []
    with LocalSGD(work.model, work.optimizer, policy, settings=SyncConfig(**settings), world=world) as sync:
        count = lambda loss: told.extend(sync.step(loss, BATCH))  # noqa: E731  # a method's counter
        work.train(2 * PERIOD, sync.model, work.optimizer, count)  # auto measures
        dist.barrier()
        before = sync.clock.read()
        work.train(rounds * PERIOD, sync.model, work.optimizer, count)
        times = {key: value - before[key] for key, value in sync.clock.read().items()}
    ranks = Collectives(world, None, 2**20).gather({name: times[name] for name in ("elapsed_s", "sync_wait_s")})
    last = told[-1] if told else None
    return {
        "elapsed_s": max(rank["elapsed_s"] for rank in ranks),
        "sync_wait_s": statistics.mean(rank["sync_wait_s"] for rank in ranks),
        "transfer_s": last.seen.transfer_s if last else 0.0,
        "delay_steps": last.seen.delay_steps if last else 0,
        "samples": rounds * PERIOD * BATCH * world.size,
    }


def worker(out: Path, ways: list[str], rounds: int, repeats: int) -> None:
    """One rank of one link: every way, again and again."""
    torch.set_num_threads(1)
    found = []
    with open_world(WorldConfig(backend="gloo")) as world:
        for repeat in range(repeats):
            found += [{"way": name, "repeat": repeat, **one(world, name, rounds)} for name in ways]
    if world.rank == 0:
        out.write_text(json.dumps({"rounds": rounds, "provenance": provenance(), "repeats": found}, indent=1) + "\n")


def rows(folder: Path) -> list[list[str]]:
    """A row a link and way."""
    lines = []
    for place, (rate, count) in LINKS.items():
        path = folder / f"{place}-hosts.json"
        found = json.loads(path.read_text()) if path.exists() else {"repeats": []}
        by_way: dict[str, list[dict[str, float]]] = {}
        for repeat in found["repeats"]:
            by_way.setdefault(repeat["way"], []).append(repeat)
        for name, repeats in by_way.items():
            ratios = sorted(
                base["elapsed_s"] / mine["elapsed_s"] for base, mine in zip(by_way["alone"], repeats, strict=True)
            )
            median = {key: statistics.median(repeat[key] for repeat in repeats) for key in repeats[0] if key != "way"}
            lines.append(
                [
                    rate,
                    str(count),
                    name,
                    f"{median['samples'] / median['elapsed_s']:,.0f}",
                    f"{statistics.median(ratios):.2f}",
                    f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                    f"{1000 * median['sync_wait_s'] / found['rounds']:.0f}",
                    f"{1000 * median['transfer_s']:.0f}",
                    f"{median['delay_steps']:.0f}",
                ]
            )
    return lines


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overlap", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--links", nargs="+", default=list(LINKS), choices=list(LINKS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), help="`alone` goes with them")
    parser.add_argument("--quick", action="store_true", help="one link, few rounds, one repeat; keeps nothing")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    ways = ["alone", *(name for name in args.ways if name != "alone")]
    if args.worker:
        worker(args.worker, ways, args.rounds, args.repeats)
        return
    folder = Path(tempfile.mkdtemp()) if args.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    size = ["--rounds", "4", "--repeats", "1"] if args.quick else ["--rounds", str(args.rounds)]
    size += [] if args.quick else ["--repeats", str(args.repeats)]
    for place in ["100mbit-2"] if args.quick else args.links:
        out, (rate, count) = folder / f"{place}-hosts.json", LINKS[place]
        if not out.exists():
            with hosts(count, rate) as shaped:
                shaped.run("benchmarks.overlap", *size, "--ways", *ways, "--worker", str(out.resolve()), timeout_s=1800)
    head = ["link", "hosts", "way", "samples/s", "of compute alone", "range"]
    head += ["exposed ms a round", "transfer ms", "delay steps"]
    print(write_table(folder / "table.md", head, rows(folder)))


if __name__ == "__main__":
    main()
