"""What one blocking average costs, against the ring's bound 2 (N - 1) / N * bytes / rate.

    python -m benchmarks.sync_cost [--quick]

For every rate and number of hosts, ranks on hosts of their own average a flat model of each size in every wire format,
interleaved; a repeat's time is the slowest rank's. A finished setting is kept in results/sync_cost/ and skipped the
next time. Bytes are the interface's own count, over those that float32 took. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.provenance import provenance
from benchmarks.shaped import bits_per_s, hosts, interface_bytes, write_table
from trainer.config.config import WorldConfig
from trainer.config.sync import SyncConfig
from trainer.distributed.collectives import Collectives
from trainer.distributed.world import open_world
from trainer.wire.choose import make_exchange
from trainer.wire.exchange import OWED

RESULTS = Path("benchmarks/results/sync_cost")
FORMATS = ("float32", "bf16", "int8", "int4")
SIZES = {"6.6 MB": 1_663_370, "50 MB": 12_500_000}
SETTINGS = [("100mbit", 2), ("100mbit", 4), ("1gbit", 2), ("1gbit", 4)]


def worker(out: Path, repeats: int, sizes: list[int], bucket_bytes: int) -> None:
    """One rank: measure every size and format, and let rank 0 write what the slowest rank took."""
    torch.set_num_threads(1)
    found = []
    with open_world(WorldConfig(backend="gloo")) as world:
        via = Collectives(world, None, bucket_bytes)
        weights = [1 / world.size] * world.size
        for count in sizes:
            values = torch.randn(count)
            owed = torch.zeros(count, dtype=OWED)
            exchanges = {name: make_exchange(name, values, count, world.size, bucket_bytes) for name in FORMATS}
            for repeat in range(repeats + 1):  # the first warms up
                for name, exchange in exchanges.items():
                    via.gather({"ready": 1})
                    sent, before, began = interface_bytes(), via.sent_bytes, time.perf_counter()
                    own, fresh = (owed, values.__getitem__) if exchange.lossy else (values, None)
                    for _, mean in exchange.means(own, weights, via, fresh):
                        mean.sum()
                    took = time.perf_counter() - began
                    ranks = via.gather(
                        {"s": took, "sent": interface_bytes() - sent, "counted": via.sent_bytes - before}
                    )
                    worst = {figure: max(rank[figure] for rank in ranks) for figure in ranks[0]}
                    if repeat:
                        found.append({"values": count, "format": name, **worst})
    if world.rank == 0:
        out.write_text(json.dumps({"provenance": provenance(), "repeats": found}, indent=1) + "\n")


def measure(rate: str, count: int, out: Path, *, quick: bool, bucket_bytes: int) -> None:
    """One setting, on hosts of its own."""
    sizes = list(SIZES.values())[: 1 if quick else 2]
    repeats = 3 if quick else 7
    with hosts(count, rate, mtu=1500) as shaped:
        shaped.run(
            "benchmarks.sync_cost",
            "--worker",
            str(out.resolve()),
            "--repeats",
            str(repeats),
            "--bucket-bytes",
            str(bucket_bytes),
            "--sizes",
            *map(str, sizes),
            timeout_s=900,
        )


def rows(folder: Path) -> list[list[str]]:
    """A row a setting, size and format, of what is there."""
    lines = []
    for rate, count in SETTINGS:
        path = folder / f"{rate}-{count}-hosts.json"
        if not path.exists():
            continue
        repeats = json.loads(path.read_text())["repeats"]
        for label, values in SIZES.items():
            base = [repeat["sent"] for repeat in repeats if (repeat["values"], repeat["format"]) == (values, "float32")]
            for name in FORMATS:
                those = [repeat for repeat in repeats if (repeat["values"], repeat["format"]) == (values, name)]
                if not those:
                    continue
                seconds = sorted(repeat["s"] for repeat in those)
                bound = 2 * (count - 1) / count * values * 4 * 8 / bits_per_s(rate)
                sent = statistics.median(repeat["sent"] for repeat in those)
                lines.append(
                    [
                        rate,
                        str(count),
                        label,
                        name,
                        f"{statistics.median(seconds):.3f}",
                        f"{seconds[0]:.3f} to {seconds[-1]:.3f}",
                        f"{statistics.median(seconds) / bound:.2f}",
                        f"{sent / statistics.median(base):.3f}",
                    ]
                )
    return lines


def main() -> None:
    """Measure what is missing, then write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync_cost", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one setting, one size; keeps nothing")
    parser.add_argument("--bucket-bytes", type=int, default=SyncConfig().bucket_bytes)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.repeats, args.sizes, args.bucket_bytes)
        return
    folder = Path(tempfile.mkdtemp()) if args.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    for rate, count in SETTINGS[:1] if args.quick else SETTINGS:
        out = folder / f"{rate}-{count}-hosts.json"
        if not out.exists():
            measure(rate, count, out, quick=args.quick, bucket_bytes=args.bucket_bytes)
    head = ["link", "hosts", "model", "format", "median s", "range", "of float32's bound", "bytes of float32's"]
    print(write_table(folder / "table.md", head, rows(folder)))


if __name__ == "__main__":
    main()
