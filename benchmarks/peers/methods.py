"""Every method as a loop needs it: a model to call, a step to count, and one model at the end."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.utils import average_parameters
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from benchmarks.work import PERIOD
from trainer import Constant, LocalSGD, Plan, Policy, PostLocal, SyncConfig
from trainer.distributed.world import World

LIGHTHOUSE_PORT = 29510
Count = Callable[[torch.Tensor], object]


@dataclass
class Method:
    """What the loop calls."""

    model: nn.Module
    optimizer: Any
    step: Count = field(default=lambda loss: None)
    finish: Callable[[], object] = field(default=lambda: None)


@contextmanager
def alone(model: nn.Module, optimizer: Optimizer, world: World, batch: int, period: int) -> Iterator[Method]:
    """Compute alone: nothing is ever sent."""
    yield Method(model, optimizer)


@contextmanager
def ddp(model: nn.Module, optimizer: Optimizer, world: World, batch: int, period: int) -> Iterator[Method]:
    """torch's DistributedDataParallel."""
    yield Method(DistributedDataParallel(model), optimizer)


@contextmanager
def post_local_sgd(model: nn.Module, optimizer: Optimizer, world: World, batch: int, period: int) -> Iterator[Method]:
    """torch's PostLocalSGDOptimizer, local from the first step."""
    averager = PeriodicModelAverager(period=period, warmup_steps=0)
    group = dist.group.WORLD
    yield Method(
        model,
        PostLocalSGDOptimizer(optimizer, averager),
        finish=lambda: average_parameters(model.parameters(), group),  # type: ignore[arg-type]  # there is a group
    )


@contextmanager
def accelerate(model: nn.Module, optimizer: Optimizer, world: World, batch: int, period: int) -> Iterator[Method]:
    """accelerate's LocalSGD."""
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD as TheirLocalSGD

    accelerator = Accelerator(cpu=True)
    wrapped, stepper = accelerator.prepare(model, optimizer)
    with ExitStack() as stack:
        theirs = stack.enter_context(TheirLocalSGD(accelerator, wrapped, local_sgd_steps=period))
        yield Method(wrapped, stepper, lambda loss: theirs.step(), stack.close)


@contextmanager
def torchft_manager(model: nn.Module, optimizer: Optimizer, world: World) -> Iterator[Any]:
    """torchft's Manager, a replica group a rank, with the lighthouse on the first host."""
    from torchft import Manager, ProcessGroupGloo
    from torchft.coordination import LighthouseServer

    here = f"10.99.0.{world.rank + 1}"
    with ExitStack() as stack:
        if world.rank == 0:
            lighthouse = LighthouseServer(bind=f"{here}:{LIGHTHOUSE_PORT}", min_replicas=world.size)
            stack.callback(lighthouse.shutdown)
        dist.barrier()
        store = dist.TCPStore(  # type: ignore[attr-defined]  # compiled, and not listed
            here, 0, 1, is_master=True, wait_for_workers=False
        )
        manager = Manager(
            pg=ProcessGroupGloo(),
            min_replica_size=world.size,
            load_state_dict=lambda state: None,
            state_dict=dict,
            use_async_quorum=False,
            timeout=datetime.timedelta(seconds=120),
            rank=0,
            world_size=1,
            replica_id=f"rank{world.rank}",
            store_addr=here,
            store_port=store.port,
            lighthouse_addr=f"http://10.99.0.1:{LIGHTHOUSE_PORT}",
            hostname=here,
            init_sync=False,
        )
        stack.callback(lambda: manager.shutdown(wait=False))
        yield manager


@contextmanager
def torchft_local_sgd(
    model: nn.Module, optimizer: Optimizer, world: World, batch: int, period: int
) -> Iterator[Method]:
    """torchft's LocalSGD."""
    from torchft.local_sgd import LocalSGD as TheirLocalSGD

    with torchft_manager(model, optimizer, world) as manager, TheirLocalSGD(manager, model, optimizer, period):
        yield Method(model, optimizer)


@contextmanager
def torchft_diloco(model: nn.Module, optimizer: Optimizer, world: World, batch: int, period: int) -> Iterator[Method]:
    """torchft's DiLoCo with the paper's outer optimizer."""
    from torchft.local_sgd import DiLoCo

    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    with (
        torchft_manager(model, optimizer, world) as manager,
        DiLoCo(manager, [model], optimizer, outer, period),
    ):
        yield Method(model, optimizer)


START_SAMPLES = 2048  # over all ranks


def ours(period: int = PERIOD, *, short_start: bool = False, **settings: Any) -> Any:
    """Ebbtide's LocalSGD with these settings; with a short start its first samples have rounds of two steps, waited
    for."""

    @contextmanager
    def method(model: nn.Module, optimizer: Optimizer, world: World, batch: int, _: int) -> Iterator[Method]:
        plan = Plan(batch, sync_period_steps=period)
        policy: Policy = Constant(plan)
        if short_start:
            policy = PostLocal(Plan(batch, sync_period_steps=2, delay_steps=0), plan, switch_samples=START_SAMPLES)
        with LocalSGD(model, optimizer, policy, settings=SyncConfig(**settings), world=world) as sync:
            yield Method(sync.model, optimizer, lambda loss: sync.step(loss, batch), sync.finish)

    return method


METHODS: dict[str, Any] = {
    "alone": alone,
    "ddp": ddp,
    "post_local_sgd": post_local_sgd,
    "accelerate": accelerate,
    "torchft_local_sgd": torchft_local_sgd,
    "torchft_diloco": torchft_diloco,
    "ebbtide": ours(wire_format="int8", delay_steps="auto", fragments=2),
    "ebbtide_outer_4": ours(wire_format="int8", delay_steps="auto", fragments=2, outer="fedavgm", outer_momentum=0.4),
    "ebbtide_int4": ours(wire_format="int4", delay_steps="auto", fragments=2),
    **{
        f"ebbtide_int4_outer_{momentum}": ours(
            wire_format="int4", delay_steps="auto", fragments=2, outer="fedavgm", outer_momentum=momentum / 10
        )
        for momentum in (2, 4, 6)
    },
    "ebbtide_int4_start": ours(wire_format="int4", delay_steps="auto", fragments=2, short_start=True),
    "ebbtide_int4_start_outer_4": ours(
        wire_format="int4", delay_steps="auto", fragments=2, outer="fedavgm", outer_momentum=0.4, short_start=True
    ),
    "ebbtide_int4_quarters": ours(wire_format="int4", delay_steps="auto", fragments=4),
    "ebbtide_whole": ours(wire_format="int8", delay_steps="auto"),
    "ebbtide_whole_int4": ours(wire_format="int4", delay_steps="auto"),
    "ebbtide_whole_int4_outer_4": ours(wire_format="int4", delay_steps="auto", outer="fedavgm", outer_momentum=0.4),
    "ebbtide_whole_bf16": ours(wire_format="bf16", delay_steps="auto"),
    "ebbtide_whole_float32": ours(delay_steps="auto"),
    "ebbtide_blocking": ours(),
    "ebbtide_blocking_int8": ours(wire_format="int8"),
    "ebbtide_blocking_int4": ours(wire_format="int4"),
    "ebbtide_overlap_float32": ours(delay_steps=16),
    "ebbtide_int4_period_32": ours(wire_format="int4", delay_steps="auto", max_delay_steps=32, period=32),
    "ebbtide_int4_period_32_halves": ours(
        wire_format="int4", delay_steps="auto", max_delay_steps=32, period=32, fragments=2
    ),
    **{
        f"ebbtide_int4_period_32_halves_outer_{momentum}": ours(
            wire_format="int4",
            delay_steps="auto",
            max_delay_steps=32,
            period=32,
            fragments=2,
            outer="fedavgm",
            outer_momentum=momentum / 10,
        )
        for momentum in (4, 6)
    },
    "ebbtide_int4_period_32_quarters": ours(
        wire_format="int4", delay_steps="auto", max_delay_steps=32, period=32, fragments=4
    ),
    "ebbtide_int4_period_32_eighths": ours(  # in messages that fit the queue of a slow link
        wire_format="int4", delay_steps="auto", max_delay_steps=32, period=32, fragments=8, bucket_bytes=2**18
    ),
    "ebbtide_int4_period_64": ours(wire_format="int4", delay_steps="auto", max_delay_steps=32, period=64),
    "ebbtide_int4_period_64_halves": ours(
        wire_format="int4", delay_steps="auto", max_delay_steps=32, period=64, fragments=2
    ),
    "ebbtide_int4_period_64_eighths": ours(
        wire_format="int4", delay_steps="auto", max_delay_steps=32, period=64, fragments=8, bucket_bytes=2**18
    ),
    "ebbtide_int4_period_4": ours(wire_format="int4", period=4),
    "ebbtide_powersgd": ours(period=1, gradient_format="powersgd"),
}
