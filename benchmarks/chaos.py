"""Faults at random places of runs whose ranks come and go: what they cost, and whether anything is lost.

    python -m benchmarks.chaos [--faults 200] [--first-seed 0] [--quick]
    python -m benchmarks.chaos --overhead

Each run trains a small network on Fashion-MNIST with LocalSGD on 2 to 4 ranks of one machine, over loopback. A seed
draws the Plan, the settings, the faults and their places: SIGKILL before or within the n-th collective, a freeze
(SIGSTOP) shorter or longer than three heartbeats, a rank that is slow for a while, a loss that is not finite, and
newcomers. Nobody mends anything by hand. A run is kept in results/chaos/ and skipped the next time.

Reported: hangs, processes left, samples of survivors read twice in an epoch, seconds from a SIGKILL to the survivors'
next common model, accuracy beside the same run without a fault.

`--overhead` compares a run with ranks that may go with one of a fixed process group. Time it on a quiet machine.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing as mp
import os
import random
import signal
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance

RESULTS = Path("benchmarks/results/chaos")
SAMPLES, PER_RUN_S = 24_000, 90.0  # less than an epoch, though what the lost had trained is trained again
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"wire_format": "int8"},
    "outer": {"outer": "slowmo"},
    "delayed": {"delay_steps": 3},
    "fragments": {"fragments": 2, "delay_steps": 2},
}
PLANS: dict[str, tuple[tuple[int, int], ...]] = {
    "period 8": ((16, 8),),
    "period 1": ((16, 1),),
    "period 8, then 1": ((16, 8), (32, 1)),
}
context = mp.get_context("forkserver")
context.set_forkserver_preload(["torch.distributed", "torchvision", "trainer.train", "benchmarks.provenance"])


@dataclass(frozen=True)
class Fault:
    """What happens to one rank."""

    kind: str
    """kill, freeze, slow or nan."""
    at: int
    """The collective at which it happens, counted from 0; of nan, the local step."""
    within: bool = False
    """Once that collective is under way."""
    seconds: float = 0.0
    """How long it lasts."""


@dataclass(frozen=True)
class Loop:
    """What a member does."""

    ranks: int
    plans: tuple[tuple[int, int], ...]
    settings: dict[str, Any]
    seed: int
    fault: Fault | None = None
    samples: int = SAMPLES
    elastic: bool = True


@dataclass
class Run:
    """A run's members, as its seed draws them."""

    plan: str
    settings: str
    ranks: int
    faults: dict[int, Fault] = field(default_factory=dict)
    newcomer_after_s: float | None = None

    @classmethod
    def drawn(cls, seed: int) -> Run:
        """The run of a seed."""
        draw = random.Random(seed)
        run = cls(draw.choice(sorted(PLANS)), draw.choice(sorted(SETTINGS)), draw.choice([2, 3, 4]))
        if run.plan == "period 1":  # there no parameters are averaged
            run.settings = "plain"
        victims = draw.sample(range(run.ranks), 1 if run.ranks == 2 else 2)
        for victim in victims:
            kind = draw.choice(["kill", "kill", "kill", "freeze", "freeze", "slow", "nan"])
            seconds = {"freeze": draw.choice([0.5, 1.5, 5.0]), "slow": 2.0}.get(kind, 0.0)
            run.faults[victim] = Fault(kind, draw.randrange(6, 160), draw.random() < 0.5, seconds)
        run.newcomer_after_s = draw.uniform(0.5, 2.5) if draw.random() < 0.4 else None
        return run


def main() -> None:
    """Make the runs that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=200, help="at least so many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="ten faults, not kept")
    parser.add_argument("--overhead", action="store_true", help="elastic beside a fixed group, without a fault")
    asked = parser.parse_args()
    if asked.overhead:
        overhead()
        return
    seed, wanted = asked.first_seed, 10 if asked.quick else asked.faults
    found: list[dict[str, Any]] = []
    while sum(each["faults"] for each in found) < wanted:
        found.append(outcome(seed, keep=not asked.quick))
        print(line(found[-1]), flush=True)
        seed += 1
    table(found, keep=not asked.quick)


def outcome(seed: int, *, keep: bool) -> dict[str, Any]:
    """What came of a seed's run: made now, or kept."""
    kept = RESULTS / f"run-{seed:04d}.json"
    if keep and kept.exists():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    found = play(Run.drawn(seed), seed)
    if keep:
        RESULTS.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found | provenance(), indent=1) + "\n")
    return found


def play(run: Run, seed: int) -> dict[str, Any]:
    """A run with its faults, and the same without."""
    loop = Loop(run.ranks, PLANS[run.plan], SETTINGS[run.settings], seed)
    loops = [replace(loop, fault=run.faults.get(rank)) for rank in range(run.ranks)]
    told, codes = together(loops, run.newcomer_after_s)
    undisturbed, _ = together([loop] * run.ranks, None)
    killed = [rank for rank, fault in run.faults.items() if fault.kind == "kill" and codes[rank] == -signal.SIGKILL]
    ended = [each for rank, each in enumerate(told) if rank not in killed and each and not each["too_late"]]
    counts = collections.Counter(number for each in told if each for number in each["read"])
    kills = sorted(each["struck_at"] for rank, each in enumerate(told) if rank in killed and each)
    models = [at for each in ended for at in each["regrouped_at"]]
    recoveries = [min((at - struck for at in models if at > struck), default=None) for struck in kills]
    return {
        "seed": seed,
        **{name: getattr(run, name) for name in ("plan", "settings", "ranks")},
        "newcomer": run.newcomer_after_s is not None,
        "struck": [asdict(fault) for fault in run.faults.values()],
        "faults": len(run.faults),
        "hangs": sum(code is None for code in codes),
        "errors": sorted({each["error"] for each in ended if each["error"]}),
        "models": len({json.dumps(each["weights"]) for each in ended}),
        "read_twice": sum(count > 1 for count in counts.values()),
        "recovery_s": [each for each in recoveries if each is not None],
        "accuracy": ended[0]["accuracy"] if ended else None,
        "undisturbed_accuracy": undisturbed[0]["accuracy"] if undisturbed[0] else None,
        "samples": ended[0].get("samples") if ended else None,
    }


def together(loops: Sequence[Loop], newcomer_after_s: float | None) -> tuple[list[dict[str, Any]], list[int | None]]:
    """Run these members; what each told (the killed, what it knew when it was struck), and their exit codes."""
    with tempfile.TemporaryDirectory() as folder, store() as address:
        starts = [(loop, 0.0) for loop in loops]
        if newcomer_after_s is not None:
            starts.append((replace(loops[0], fault=None), newcomer_after_s))
        members: list[Any] = []
        began = time.monotonic()
        for number, (loop, after_s) in enumerate(starts):
            time.sleep(max(0.0, began + after_s - time.monotonic()))
            members.append(context.Process(target=member, args=(address, f"{folder}/{number}.json", asdict(loop))))
            members[-1].start()
        for each in members:
            each.join(max(0.1, began + PER_RUN_S - time.monotonic()))
        codes = [each.exitcode for each in members]
        for each in members:
            each.kill()
            each.join()
        paths = [Path(folder) / f"{number}.json" for number in range(len(members))]
        return [json.loads(path.read_text()) if path.exists() else {} for path in paths], codes


@contextmanager
def store() -> Iterator[str]:
    """The address of a store of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = context.Process(target=serve, args=(port,))
    process.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.join(10)


def serve(port: int) -> None:
    """A store, until SIGTERM."""
    from trainer.store import main as serve_store

    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    raise SystemExit(serve_store(["--port", str(port)]))


def strike(fault: Fault, struck: Callable[[], None]) -> None:
    """Have the fault happen at its collective."""
    import torch.distributed as dist

    count = -1

    def happen() -> None:
        struck()
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "freeze":
            waker = os.fork()  # a stopped process cannot wake itself
            if waker == 0:
                time.sleep(fault.seconds)
                os.kill(os.getppid(), signal.SIGCONT)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGSTOP)

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == fault.at and not fault.within:
                happen()
            found = collective(*args, **kwargs)
            if count == fault.at and fault.within:
                time.sleep(0.002)
                happen()
            return found

        return run

    for name in ("all_reduce", "all_gather", "broadcast", "all_to_all_single"):
        setattr(dist, name, counted(getattr(dist, name)))


def member(address: str, out: str, about: dict[str, Any]) -> None:
    """One rank's loop."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from torch import nn

    from trainer import Alternating, Constant, LocalSGD, Members, Plan, World
    from trainer.config.config import DataConfig
    from trainer.data import open_part
    from trainer.errors import TooFewError

    torch.set_num_threads(1)
    loop = Loop(**{**about, "fault": Fault(**about["fault"]) if about["fault"] else None})
    told: dict[str, Any] = {"read": [], "regrouped_at": [], "error": None, "too_late": False, "struck_at": None}

    def write() -> None:
        partial = Path(out).with_suffix(".partial")
        partial.write_text(json.dumps(told))
        partial.rename(out)

    def struck() -> None:
        told["struck_at"] = time.time()
        write()

    fault = loop.fault
    if fault is not None and fault.kind in ("kill", "freeze"):
        strike(fault, struck)
    pictures = {train: open_part(DataConfig(), train=train, seed=0).items.tensors for train in (True, False)}
    inputs, labels = pictures[True][0].flatten(1).float() / 255, pictures[True][1]
    dataset = torch.utils.data.TensorDataset(inputs, labels, torch.arange(len(labels)))
    torch.manual_seed(loop.seed)
    model = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    small, *more = (Plan(batch, sync_period_steps=period) for batch, period in loop.plans)
    policy: Any = Alternating(small=small, large=more[0], samples_per_phase=6_000) if more else Constant(small)
    members, world = None, None
    if loop.elastic:
        members = Members(address, ranks=loop.ranks, timeout_s=60)
        world = World.elastic(members)
    try:
        with LocalSGD(model, optimizer, policy, settings=loop.settings, world=world) as sync:
            began = time.perf_counter()
            for steps, (x, y, numbers) in enumerate(sync.batches(dataset, loop.samples, seed=loop.seed)):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(sync.model(x), y)
                if fault is not None and fault.kind == "nan" and steps == fault.at:
                    loss = loss * float("nan")
                loss.backward()  # type: ignore[no-untyped-call]  # no annotations in torch
                finite = sync.all_finite(loss.detach())()
                if finite:
                    optimizer.step()
                told["read"] += numbers.tolist()
                sync.step(loss.detach(), skipped=not finite)
                changes = sync.regroupings()
                told["regrouped_at"] += [time.time()] * bool(changes)
                if fault is not None and fault.kind == "slow" and fault.at <= steps < fault.at + 40:
                    time.sleep(fault.seconds / 40)
            told["seconds"] = time.perf_counter() - began
            told["samples"] = sync.samples
    except TooFewError as error:
        told["too_late"], told["error"] = "has ended" in str(error) or "let this one in" in str(error), str(error)
    except Exception as error:
        told["error"] = f"{type(error).__name__}: {error}"
    if members is not None:
        members.close()
    tests, answers = pictures[False][0].flatten(1).float() / 255, pictures[False][1]
    with torch.no_grad():
        told["accuracy"] = float((model(tests).argmax(1) == answers).float().mean())
    flat = np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])
    told["weights"] = [float(flat.sum()), float(np.abs(flat).sum())]
    write()
    threading.Timer(10, lambda: os._exit(1)).start()  # who cannot end is told apart by its exit code
    if dist.is_initialized():
        dist.destroy_process_group()
    os._exit(0)


def line(found: dict[str, Any]) -> str:
    """A run in words."""
    struck = ", ".join(f"{each['kind']} at {each['at']}" for each in found["struck"])
    bad = found["hangs"] or found["errors"] or found["models"] != 1 or found["read_twice"]
    rest = {name: found[name] for name in ("hangs", "errors", "models", "read_twice")} if bad else ""
    recovery = ", ".join(f"{each:.2f} s" for each in found["recovery_s"])
    return (
        f"seed {found['seed']}: {found['ranks']} ranks, {found['plan']}, {found['settings']}; {struck}; "
        f"accuracy {found['accuracy']}, undisturbed {found['undisturbed_accuracy']}; {recovery} {rest}"
    )


def table(found: Sequence[dict[str, Any]], *, keep: bool) -> None:
    """Sum up."""
    recoveries = [each for one in found for each in one["recovery_s"]]
    changes = [100 * (one["accuracy"] - one["undisturbed_accuracy"]) for one in found if one["accuracy"]]
    rows = [
        ("runs", len(found)),
        ("faults", sum(one["faults"] for one in found)),
        ("hangs", sum(one["hangs"] for one in found)),
        ("runs with an error on a survivor", sum(bool(one["errors"]) for one in found)),
        ("runs that ended with more than one model", sum(one["models"] != 1 for one in found)),
        ("samples read twice in an epoch", sum(one["read_twice"] for one in found)),
        ("SIGKILL to the survivors' common model, median s", f"{statistics.median(recoveries or [0]):.2f}"),
        ("the longest, s", f"{max(recoveries or [0]):.2f}"),
        ("accuracy, points beside the undisturbed run: mean", f"{statistics.mean(changes or [0]):+.2f}"),
        ("the worst run", f"{min(changes or [0]):+.2f}"),
    ]
    text = "# Faults at random places\n\n| what | figure |\n| --- | --- |\n"
    text += "".join(f"| {name} | {figure} |\n" for name, figure in rows)
    if keep:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / "faults.md").write_text(text)
    print(text)


def overhead() -> None:
    """Samples/s of ranks that may go beside a fixed group's, in turn, five times each."""
    rates: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(10):
        elastic = turn % 2 == 0
        loop = Loop(2, PLANS["period 8"], {}, seed=0, samples=120_000, elastic=elastic)
        told = together([loop] * 2, None)[0] if elastic else fixed(loop)
        rates[elastic].append(told[0]["samples"] / told[0]["seconds"])
    median = {name: statistics.median(rates[name]) for name in rates}
    found = {"elastic": rates[True], "fixed": rates[False], "ratio": median[True] / median[False], **provenance()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "overhead.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"elastic {median[True]:,.0f} samples/s, fixed {median[False]:,.0f}: {median[True] / median[False]:.3f}")


def fixed(loop: Loop) -> list[dict[str, Any]]:
    """The same loop in a fixed process group."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        paths = [Path(folder) / f"{rank}.json" for rank in range(loop.ranks)]
        ranks = [
            context.Process(target=fixed_member, args=(meeting, rank, str(path), asdict(loop)))
            for rank, path in enumerate(paths)
        ]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(PER_RUN_S)
        return [json.loads(path.read_text()) for path in paths]


def fixed_member(meeting: str, rank: int, out: str, about: dict[str, Any]) -> None:
    """One rank of a fixed group."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=about["ranks"])
    member("", out, about)


if __name__ == "__main__":
    main()
