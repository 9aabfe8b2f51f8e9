"""Members of an elastic world in processes of their own: a loop with LocalSGD, which may end at a given place."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ranks import context, free_port

from trainer.distributed.store_client import key

SAMPLES = 4_000


@dataclass(frozen=True)
class Loop:
    """What a member does."""

    plans: tuple[tuple[int, int], ...] = ((8, 4),)
    """Batch and period: of one constant Plan, or of two in turn."""
    settings: dict[str, Any] = field(default_factory=dict)
    ranks: int = 3
    samples: int = 2_400
    """To train, over all ranks."""
    data: str = "indexed"
    """indexed, loader (a DataLoader of its own), or batch_sampler."""
    ends_at_call: int | None = None
    """At this collective, counted from 0, it ends."""
    once_begun: bool = False
    """Once that collective is under way."""
    by: int = signal.SIGKILL
    pause_s: float = 0.0
    """After each step."""
    min_ranks: int = 1
    evaluates: bool = False
    """Sum something over all ranks after every 50 local steps."""
    hidden: int = 16
    """Of the model."""
    unfreezes_at: int | None = None
    """The first layer is frozen until this local step."""
    runs: int = 1
    """So many, one after another."""


class Member:
    """A process, and what it told at its end."""

    def __init__(self, address: str, out: Path, loop: Loop) -> None:
        self._out = out
        self.process = context.Process(target=_member, args=(address, str(out), asdict(loop)))
        self.process.start()

    def end(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """What it told, once it has ended; a member that does not end is an error."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"{self._out.name} did not end in {timeout_s} s")
        told: dict[str, Any] = json.loads(self._out.read_text()) if self._out.exists() else {}
        return told | {"exitcode": self.process.exitcode}


class Sums:
    """How many sums the members have made."""

    count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


@contextmanager
def store() -> Iterator[str]:
    """The address of a store of its own."""
    port = free_port()
    process = context.Process(target=_store, args=(port,))
    process.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.join(10)
        assert process.exitcode == 0


def wait_until_begun(address: str) -> None:
    """Until a run's members have met."""
    import torch.distributed as dist

    host, port = address.split(":")
    there = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)  # type: ignore[attr-defined]
    there.wait([key("run-0", 0, "entered")])


def _store(port: int) -> None:
    from trainer.store import main

    raise SystemExit(main(["--port", str(port)]))


def _end_at(call: int, by: int, *, once_begun: bool) -> None:
    """Have this process end at its collective number `call`."""
    import torch.distributed as dist

    count = -1

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == call and not once_begun:
                os.kill(os.getpid(), by)
            found = collective(*args, **kwargs)
            if count == call and once_begun:
                time.sleep(0.002)
                os.kill(os.getpid(), by)
            return found

        return run

    for name in ("all_reduce", "all_gather", "broadcast", "all_to_all_single"):
        setattr(dist, name, counted(getattr(dist, name)))


def _member(address: str, out: str, about: dict[str, Any]) -> None:
    import numpy as np
    import torch
    from torch import nn

    from trainer import Alternating, Constant, LocalSGD, Members, Plan, World

    torch.set_num_threads(1)
    warnings.filterwarnings("error", "replicas differ")
    loop = Loop(**about)
    if loop.ends_at_call is not None:
        _end_at(loop.ends_at_call, loop.by, once_begun=loop.once_begun)
    torch.manual_seed(0)
    inputs, numbers = torch.randn(SAMPLES, 6), torch.arange(SAMPLES)
    targets = inputs.sum(1, keepdim=True).tanh()
    dataset = torch.utils.data.TensorDataset(inputs, targets, numbers)
    model = nn.Sequential(nn.Linear(6, loop.hidden), nn.BatchNorm1d(loop.hidden), nn.ReLU(), nn.Linear(loop.hidden, 1))
    model[0].requires_grad_(loop.unfreezes_at is None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10, 0.9)
    small, *more = (Plan(batch, sync_period_steps=period) for batch, period in loop.plans)
    policy: Any = Alternating(small=small, large=more[0], samples_per_phase=400) if more else Constant(small)
    members = Members(address, ranks=loop.ranks, min_ranks=loop.min_ranks, timeout_s=30)
    seen: list[int] = []
    heard: list[dict[str, Any]] = []
    told_sums: list[float | None] = []
    error = None

    def run() -> dict[str, Any]:
        with LocalSGD(model, optimizer, policy, settings=loop.settings, world=World.elastic(members)) as sync:
            data: Any = dataset
            if loop.data == "loader":
                data = torch.utils.data.DataLoader(dataset, 8, shuffle=True)
            elif loop.data == "batch_sampler":
                data = torch.utils.data.DataLoader(dataset, batch_sampler=sync.batch_sampler(dataset))

            sums = Sums()
            sync.carry("sums", sums)
            sync.carry("schedule", schedule)

            def evaluate_if_due() -> None:
                if loop.evaluates and sync.between_rounds and sync.local_step // 50 > sums.count:
                    found = sync.together(lambda: sync.collectives.sum_numbers([1.0])[0])
                    sums.count = sync.local_step // 50
                    told_sums.append(found)

            for x, y, number in sync.batches(data, loop.samples):
                if sync.local_step == loop.unfreezes_at:
                    model[0].requires_grad_()
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(sync.model(x), y)
                loss.backward()
                optimizer.step()
                seen.extend([] if sync._feed.idle else number.tolist())
                sync.step(loss)
                schedule.step()
                heard.extend(asdict(each) | {"left": dict(each.left)} for each in sync.regroupings())
                evaluate_if_due()
                time.sleep(loop.pause_s)
            heard.extend(asdict(each) | {"left": dict(each.left)} for each in sync.regroupings())
        about = {"lr": optimizer.param_groups[0]["lr"], "sums": told_sums}
        return {"samples": sync.samples, "local_step": sync.local_step, "ranks": sync.world.size, **about}

    try:
        for _ in range(loop.runs):
            told = run()
    except Exception as raised:
        told, error = {}, f"{type(raised).__name__}: {raised}"
    members.close()
    weights = np.concatenate([p.detach().double().numpy().ravel() for p in model.state_dict().values()])
    told |= {"seen": seen, "heard": heard, "error": error, "weights": [weights.sum(), float(np.abs(weights).sum())]}
    partial = Path(out).with_suffix(".partial")
    partial.write_text(json.dumps(told))
    partial.rename(out)
