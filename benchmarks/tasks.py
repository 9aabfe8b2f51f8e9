"""A second task for the autopilot: a byte-level GPT under AdamW, beside DDP and constant Plans.

    python -m benchmarks.tasks [--rate 100mbit] [--methods ddp H4 H16 H4_outer H16_outer autopilot] [--seeds 1]
                               [--samples 6400] [--lr 0.001 0.002 0.004]

Every run is `python -m trainer` on two hosts of their own (network namespaces, one core each), as a user starts it:
a GPT of 445,952 parameters on the bytes of Python's own standard library (its .py files), 8 pieces of 128 bytes a rank,
AdamW (second decay 0.95) with clipping at 1, a warm-up over an eighth of the samples, then cosine. Each method is
trained at each of the rates with seed 0, and its best one, by the final loss, with the further seeds. Constant Plans
send float32 and wait for it without a shaped link; over one they send int8 behind delays that hide them. `outer` is
`fedavgm` with momentum 0.4. A finished run is kept in results/tasks/ and skipped the next time. Losses are nats a byte
on pieces that no rank trains. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from benchmarks.provenance import provenance
from benchmarks.shaped import hosts, place_of, write_table
from trainer.records.reader import load_run

RESULTS = Path("benchmarks/results/tasks")
LENGTH, WIDTH, BLOCKS, HEADS = 128, 128, 2, 4
TEST_PIECES = 256
SAMPLES, RATES = 6_400, (0.001, 0.002, 0.004)
GOAL_SHARE = 0.9
"""The loss to reach is DDP's at this share of its samples."""


class Block(nn.Module):
    """Causal attention and two linear layers, each behind a norm and beside a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.asked, self.told = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, WIDTH] to the same."""
        count, length, _ = x.shape
        parts = self.asked(self.before(x)).view(count, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.told(seen.transpose(1, 2).reshape(count, length, WIDTH))
        out: torch.Tensor = x + self.narrow(F.gelu(self.wide(self.between(x))))
        return out


class ByteGPT(nn.Module):
    """Bytes [B, T] to scores of the byte after each, [B, 256, T]."""

    def __init__(self, num_classes: int = 256, channels: int = 1) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(num_classes, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.scores = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.scores.weight = self.bytes.weight

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        """The scores."""
        scores: torch.Tensor = self.scores(self.norm(self.blocks(self.bytes(text) + self.places.weight)))
        return scores.transpose(1, 2)


class PythonText(TensorDataset):
    """Pieces of the standard library's source, and the same one byte on; some are kept apart for tests."""

    classes = 256

    def __init__(self, root: str, train: bool) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
        count = len(text) // (LENGTH + 1)
        pieces = text[: count * (LENGTH + 1)].view(count, LENGTH + 1)
        pieces = pieces[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
        chosen = pieces[TEST_PIECES:] if train else pieces[:TEST_PIECES]
        super().__init__(chosen[:, :-1].clone(), chosen[:, 1:].clone())


def constant(period: int, *, outer: bool = False) -> list[str]:
    """The flags of one Plan for the whole run."""
    plan = ["--policy.name", "constant", "--policy.batch-per-rank", "8", "--policy.sync-period-steps", str(period)]
    return [*plan, *(["--sync.outer", "fedavgm", "--sync.outer-momentum", "0.4"] if outer else [])]


HIDDEN = ["--sync.wire-format", "int8", "--sync.delay-steps", "auto"]
METHODS = {
    "ddp": constant(1),
    "H4": constant(4),
    "H16": constant(16),
    "H4_outer": constant(4, outer=True),
    "H16_outer": constant(16, outer=True),
    "autopilot": ["--policy.name", "autopilot", "--policy.batch-per-rank", "8", "--policy.max-batch-per-rank", "64"],
}


def command(method: str, rate: str, samples: int, seed: int, lr: float, root: str) -> list[str]:
    """The flags of a run."""
    task = ["--task.model", "benchmarks.tasks:ByteGPT", "--data.name", "benchmarks.tasks:PythonText"]
    optim = ["--optim.name", "adamw", "--optim.lr", str(lr), "--optim.clip-norm", "1.0", "--optim.beta2", "0.95"]
    optim += ["--optim.warmup-samples", str(samples // 8)]
    run = ["--run.samples", str(samples), "--run.seed", str(seed), "--run.root", root, "--run.name", "run"]
    records = ["--record.reference-s", "0", "--record.no-tensorboard", "--record.no-progress", "--record.no-report"]
    rest = ["--eval.every-samples", str(samples // 10), "--world.backend", "gloo", "--checkpoint.every-s", "1000000"]
    hidden = HIDDEN if rate and method.startswith("H") else []
    return [*METHODS[method], *hidden, *task, *optim, *run, *records, *rest]


def measure(method: str, rate: str, samples: int, seed: int, lr: float, out: Path) -> None:
    """One run, whose evaluations, phases and summary are kept."""
    kept: dict[str, Any] = {"method": method, "seed": seed, "lr": lr, "samples": samples}
    with tempfile.TemporaryDirectory() as root, hosts(2, rate) as shaped:
        shaped.run("trainer", *command(method, rate, samples, seed, lr, root), timeout_s=3_600)
        run = load_run(Path(root) / "run")
        kept["evals"] = [[each.elapsed_s, each.samples, each.loss] for each in run.evals]
        kept["phases"] = [[each.begin_samples, each.name, dict(each.plan)] for each in run.phases]
        kept["summary"] = dict(run.figures)
    kept["loss"] = kept["evals"][-1][2]
    out.write_text(json.dumps(kept | {"provenance": provenance()}, indent=1) + "\n")
    print(method, seed, lr, round(kept["loss"], 4), round(kept["summary"]["elapsed_s"]), flush=True)


def reached(run: dict[str, Any], goal: float) -> str:
    """Seconds and share of the samples after which a run's loss was at most this."""
    found = next((each for each in run["evals"] if each[2] <= goal), None)
    return "never" if found is None else f"{found[0]:.0f} at {found[1] / run['samples']:.2f}"


def rows(found: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row a method, each at the rate of its lowest loss, with what it gave at every rate."""
    by_method: dict[str, list[dict[str, Any]]] = {}
    for run in found:
        by_method.setdefault(run["method"], []).append(run)
    best = {method: min(runs, key=lambda run: run["loss"])["lr"] for method, runs in by_method.items()}
    finals = {method: [run for run in runs if run["lr"] == best[method]] for method, runs in by_method.items()}
    ddp = finals.get("ddp", [])
    goal = next((each[2] for run in ddp for each in run["evals"] if each[1] >= GOAL_SHARE * run["samples"]), None)
    base = statistics.mean(run["loss"] for run in ddp) if ddp else None
    lines = []
    for method, runs in finals.items():
        tried = sorted((run["lr"], run["loss"]) for run in by_method[method] if run["seed"] == 0)
        losses, summary = [run["loss"] for run in runs], runs[0]["summary"]
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        loss = statistics.mean(losses)
        line = [f"`{method}`", f"{loss:.4f}{spread}", f"{100 * (loss / base - 1):+.1f} %" if base else ""]
        line.append(reached(runs[0], goal) if goal else "")
        line += [f"{summary['elapsed_s']:.0f}", f"{summary['wire_bytes'] / 1e6:.0f}", f"{best[method]:g}"]
        lines.append([*line, ", ".join(f"{loss:.3f}" for _, loss in tried), str(len(runs))])
    return lines


HEAD = ["method", "final loss", "over DDP", "seconds to the goal, share of samples", "seconds", "MB sent a rank"]
HEAD += ["rate", "losses by rate", "seeds"]


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=__doc__)
    parser.add_argument("--rate", default="", help='of every link; "" is as fast as it goes')
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--lr", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--series", help="of other code or another machine, whose results lie apart under this name")
    args = parser.parse_args()
    place = place_of(args.rate, 2, args.series)
    folder = RESULTS / place
    folder.mkdir(parents=True, exist_ok=True)

    def outcome(method: str, seed: int, lr: float) -> dict[str, Any]:
        out = folder / f"{method}-{lr:g}-{seed}.json"
        if not out.exists():
            measure(method, args.rate, args.samples, seed, lr, out)
        run: dict[str, Any] = json.loads(out.read_text())
        return run

    best = {}
    for method in args.methods:
        tried = [outcome(method, 0, lr) for lr in args.lr]
        best[method] = min(tried, key=lambda run: float(run["loss"]))["lr"]
    for seed in range(1, args.seeds):
        for method in args.methods:
            outcome(method, seed, best[method])
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found.sort(key=lambda run: (list(METHODS).index(run["method"]), run["seed"], run["lr"]))
    print(write_table(RESULTS / f"{place}.md", HEAD, rows(found)))


if __name__ == "__main__":
    main()
