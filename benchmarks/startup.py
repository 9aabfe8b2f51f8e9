"""How long a user waits before anything happens: importing the package and `--help`, against importing torch alone.

python -m benchmarks.startup [--repeats 7] [--out benchmarks/results/startup.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.provenance import provenance

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import trainer": ["-c", "import trainer"],
    "from trainer import LocalSGD": ["-c", "from trainer import LocalSGD"],
    "python -m trainer --help": ["-m", "trainer", "--help"],
}


def main() -> None:
    """Whole processes, interleaved; medians, and ratios to the first command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", default="benchmarks/results/startup.json")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for repeat in range(-1, args.repeats):  # the first round warms the file cache, and is not counted
        for name, command in COMMANDS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median / medians["import torch"] for name, median in medians.items()}
    for name, median in medians.items():
        print(f"{name:<30} {median:6.2f} s  {ratios[name]:5.2f} x import torch")
    told = {"provenance": provenance(), "seconds": seconds, "ratios": ratios}
    Path(args.out).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
