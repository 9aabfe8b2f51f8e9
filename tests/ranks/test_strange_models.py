"""Models that change, move or call in ways of their own: what is trained is what is averaged, or it is refused."""

from __future__ import annotations

import copy
import io
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run, run_each
from strangers import batch_of, spread, train, values
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from trainer import Alternating, Constant, LocalSGD, Plan, SyncConfig
from trainer.distributed.world import World
from trainer.errors import ConfigError, MismatchError

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "delayed": {"delay_steps": 1},
    "int8 in halves": {"wire_format": "int8", "fragments": 2},
    "outer": {"outer": "fedavgm", "delay_steps": 1},
    "mixing": {"mixing": 0.5},
}


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


# ---- layers that change in training


def freeze(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(False)


def unfreeze(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model[0].requires_grad_(True)


def replace(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model[2] = nn.Linear(4, 1)  # each rank's own values
    optimizer.add_param_group({"params": list(model[2].parameters())})


def add(model: Any, optimizer: torch.optim.Optimizer) -> None:
    model.append(nn.Linear(1, 1))
    optimizer.add_param_group({"params": list(model[-1].parameters())})


def changing(world: World, change: Any, period: int, way: dict[str, Any], adam: bool) -> tuple[float, float, int]:
    torch.manual_seed(world.rank)
    model = two_layers()
    if change is unfreeze:
        model[0].requires_grad_(False)
    kind = torch.optim.Adam if adam else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.01)
    settings = SyncConfig(observe_steps=3, **(way if period > 1 else {}))
    with LocalSGD(model, optimizer, Constant(Plan(8, period)), settings=settings) as sync:
        train(sync, 5)
        change(sync.model, optimizer)
        train(sync, 7, start=5)
        with sync.consensus() as consensus:
            inside = spread(*consensus.parameters())
        train(sync, 6, start=12)
        trained = len(sync.replica.parameters)
    return inside, spread(*model.parameters()), trained


@pytest.mark.parametrize(("change", "trained"), [(freeze, 2), (unfreeze, 4), (replace, 4), (add, 6)])
def test_layers_that_change_are_averaged_from_the_next_round_on(change: Any, trained: int) -> None:
    ways = [(1, "plain"), (0, "plain"), *((4, way) for way in WAYS)]
    cases = [(change, period, WAYS[way], adam) for period, way in ways for adam in (False, True)]
    for case, ranks in zip(cases, run_each(2, changing, cases), strict=True):
        for inside, after, members in ranks:
            assert inside < 1e-6, case
            assert after < 1e-6, case
            if case[1]:  # else they are taken in where the replicas are averaged
                assert members == trained, case


def changed_on_one(world: World) -> str:
    model = two_layers()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    try:
        with LocalSGD(model, optimizer, Constant(8, 2)) as sync:
            train(sync, 2)
            if world.rank == 1:
                model[0].requires_grad_(False)
            train(sync, 4, start=2)
    except MismatchError as error:
        return str(error)
    return ""


def test_a_layer_frozen_on_one_rank_is_told_on_all() -> None:
    for said in run(2, changed_on_one):
        assert "parameter '0.weight': requires_grad is True on rank 0 but False on rank 1" in said


# ---- tensors that move without a gradient


class WithTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Linear(4, 1)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("target", torch.zeros(3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x) + 0.1 * self.teacher(x)

    @torch.no_grad()
    def follow(self, how: str, rank: int) -> None:
        for mine, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            if how == "lerp":
                mine.lerp_(theirs, 0.1)
            elif how == "data":
                mine.data.mul_(0.9).add_(theirs.data, alpha=0.1)
            else:
                mine.data = 0.9 * mine.data + 0.1 * theirs.data
        self.target += rank + 1
        self.seen += 1 + rank


def with_teacher(world: World, how: str, policy: Any) -> tuple[float, list[float], bool]:
    torch.manual_seed(world.rank)
    model = WithTeacher()
    mask = model.mask.clone()
    optimizer = torch.optim.SGD(model.student.parameters(), 0.05)
    with LocalSGD(model, optimizer, policy) as sync:
        for step in range(12):
            train(sync, 1, start=step)
            model.follow(how, world.rank)
        with sync.consensus() as consensus:
            apart = spread(consensus(batch_of(0, 0)[0]), *consensus.teacher.parameters(), consensus.target)  # type: ignore[misc, union-attr]
            told = [float(consensus.target[0]), float(consensus.seen)]  # type: ignore[index, arg-type]
    return apart, told, torch.equal(model.mask, mask)


def test_a_teacher_inside_is_one_in_the_consensus_model() -> None:
    policies = Constant(8, 4), Alternating(Plan(8, 4), Plan(8, 1), steps_per_phase=8)
    cases = list(itertools.product(("lerp", "data", "assigned"), policies))
    for case, ranks in zip(cases, run_each(2, with_teacher, cases), strict=True):
        for apart, told, kept in ranks:
            assert apart < 1e-6, case
            assert told[1] == max(12, 24), case  # the largest of the counters
            assert kept, f"a mask of minus infinities stays as it is: {case}"


# ---- one module for life, called in any way


class Odd(nn.Module):
    """Computes its own loss, by a method; half of it in a second backward pass."""

    kind = "odd"

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.spare = nn.Linear(4, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.body(x)))

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(self(x), y)


def step_of(kind: str, model: Any, optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad(set_to_none=kind != "kept grads")
    loss = nn.functional.mse_loss
    if kind == "two passes":
        total = loss(model(x[:4]), y[:4]) / 2
        total.backward()
        second = loss(model(x[4:]), y[4:]) / 2
        second.backward()
        total = total + second
    elif kind == "checkpoint":
        body = checkpoint(lambda t: torch.tanh(model.body(t)), x.requires_grad_(), use_reentrant=True)
        total = loss(model.head(body), y)
        total.backward()
    elif kind == "all in a checkpoint":
        total = loss(checkpoint(model, x.requires_grad_(), use_reentrant=True), y)
        total.backward()
    else:
        total = model.loss(x, y) if kind == "method" else loss(model(x), y)
        total.backward()
    optimizer.step()
    return total.detach()


def as_large_batch(ranks: int, adam: bool) -> torch.Tensor:
    """The same training by hand: gradients of all ranks' batches, averaged."""
    torch.manual_seed(0)
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01) if adam else torch.optim.SGD(model.parameters(), 0.05, 0.9)
    for step in range(5):
        optimizer.zero_grad()
        for rank in range(ranks):
            x, y = batch_of(rank, step)
            (nn.functional.mse_loss(model(x), y) / ranks).backward()
        optimizer.step()
    return values(model)


def at_period_1(world: World, kind: str, called: str, adam: bool) -> torch.Tensor:
    torch.manual_seed(0)
    model = Odd()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01) if adam else torch.optim.SGD(model.parameters(), 0.05, 0.9)
    with LocalSGD(model, optimizer, Constant(8, 1)) as sync:
        one = sync.model
        for step in range(5):
            x, y = batch_of(world.rank, step)
            loss = step_of(kind, sync.model if called == "sync.model" else model, optimizer, x, y)
            sync.step(loss, samples=len(x))
            assert sync.model is one
    return values(model)


def test_period_1_is_large_batch_training_however_the_model_is_called() -> None:
    kinds = "usual", "kept grads", "method", "two passes", "checkpoint", "all in a checkpoint"
    cases = list(itertools.product(kinds, ("sync.model", "model"), (False, True)))
    wanted = {adam: as_large_batch(2, adam) for adam in (False, True)}
    for case, ranks in zip(cases, run_each(2, at_period_1, cases), strict=True):
        for found in ranks:
            torch.testing.assert_close(found, wanted[case[2]], rtol=1e-4, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}")


def front_door(world: World) -> list[Any]:
    torch.manual_seed(world.rank)
    model = Odd()
    policy = Alternating(Plan(8, 2), Plan(8, 1), steps_per_phase=2)
    with LocalSGD(model, torch.optim.SGD(model.parameters(), 0.01), policy, settings={"observe_steps": 2}) as sync:
        one = sync.model
        names = list(one.state_dict()) == list(model.state_dict()), one.kind, one.find_unused_parameters
        one.kind, one.head = "set", nn.Linear(4, 1)
        reached = model.kind, one.head is model.head
        one.eval()
        modes = model.training, one.body.training, one.training
        one.train()
        copies = copy.deepcopy(one), torch.load(_saved(one), weights_only=False)
        same = [isinstance(each, Odd) and torch.equal(values(each), values(model)) for each in copies]
        with LocalSGD(one, torch.optim.SGD(one.parameters(), 0.01), policy, world=World()) as inner:
            unwrapped = inner.replica.model is model
        train(sync, 6)
    return [names, reached, modes, same, unwrapped, sync.model is one, spread(*model.parameters())]


def _saved(thing: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return file


def test_sync_model_is_one_object_that_reaches_the_models_own() -> None:
    for names, reached, modes, same, unwrapped, one, apart in run(2, front_door):
        assert names == (True, "odd", False)
        assert reached == ("set", True)
        assert modes == (False, False, False)
        assert same == [True, True]
        assert unwrapped
        assert one
        assert apart < 1e-6


def compiled(world: World, period: int) -> tuple[float, int]:
    torch._dynamo.reset()
    torch.manual_seed(world.rank)
    model = nn.Sequential(*(nn.Linear(300, 300) for _ in range(6)), nn.Linear(300, 1))
    model.compile(backend="aot_eager")
    with LocalSGD(model, torch.optim.SGD(model.parameters(), 1e-4), Constant(8, period)) as sync:
        sync.model.bucket_bytes_cap = 300 * 300 * 4  # type: ignore[assignment]
        for step in range(3):
            x, y = batch_of(world.rank, step, features=300)
            sync.optimizer.zero_grad()
            loss = nn.functional.mse_loss(sync.model(x), y)
            loss.backward()
            sync.optimizer.step()
            sync.step(loss, samples=8)
    return spread(*model.parameters()), len(sync._gradients._buckets)


def test_compiled_models_are_averaged_too() -> None:
    for ranks in run_each(2, compiled, [(1,), (3,)]):
        assert all(apart < 1e-6 for apart, _ in ranks)


# ---- what is refused


def sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def tensor_parallel() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(nn.Linear(4, 4), mesh, ColwiseParallel())


REFUSED = {
    "ddp": (lambda: DistributedDataParallel(nn.Linear(4, 1)), "model is under DistributedDataParallel"),
    "ddp inside": (
        lambda: nn.Sequential(nn.Linear(4, 4), DistributedDataParallel(nn.Linear(4, 1))),
        "module '1' of the model is under DistributedDataParallel",
    ),
    "fully_shard": (sharded, "model is sharded"),
    "tensor parallel": (tensor_parallel, "is sharded"),
    "lazy": (lambda: nn.LazyLinear(1), "'weight' is lazy"),
    "meta": (lambda: nn.Linear(4, 1, device="meta"), "'weight' is on meta"),
    "nothing": (nn.ReLU, "no parameter that requires a gradient"),
    "frozen": (lambda: nn.Linear(4, 1).requires_grad_(False), "no parameter that requires a gradient"),
}


def refused(world: World, name: str) -> str:
    model = REFUSED[name][0]()
    own = [p for p in model.parameters() if not isinstance(p, nn.parameter.UninitializedParameter)]
    optimizer = torch.optim.SGD([*own, nn.Parameter(torch.zeros(1))], 0.1)
    try:
        LocalSGD(model, optimizer, Constant(8, 2))
    except ConfigError as error:
        return str(error)
    return ""


def test_a_model_that_cannot_be_averaged_is_refused_in_one_line() -> None:
    for name, ranks in zip(REFUSED, run_each(2, refused, [(name,) for name in REFUSED]), strict=True):
        for said in ranks:
            assert REFUSED[name][1] in said, name
            assert "\n" not in said, name


def other_optimizers(world: World) -> list[str]:
    model, head = nn.Linear(4, 4), nn.Linear(4, 1)
    said = []
    for parameters in (head.parameters(), itertools.chain(model.parameters(), head.parameters())):
        with pytest.raises(ConfigError) as caught:
            LocalSGD(model, torch.optim.SGD(parameters, 0.1), Constant(8, 2))
        said.append(str(caught.value))
    return said


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    for none, some in run(2, other_optimizers):
        assert "none of the model's parameters" in none
        assert "optimizer has 2 parameters that the model has not (first: group 0, place 2, shape (1, 4))" in some


def unlike(world: World, what: str) -> str:
    one = world.rank == 1
    model: nn.Module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    if one and what == "shape":
        model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1))
    elif one and what == "type":
        model = model.double()
    elif one and what == "missing":
        model = nn.Sequential(nn.Linear(4, 4))
    elif one and what == "strides":
        model[0].weight = nn.Parameter(torch.zeros(4, 4).t())  # type: ignore[index, union-attr]
    elif one and what == "requires_grad":
        model[0].bias.requires_grad_(False)  # type: ignore[index, union-attr]
    trained = list(model.parameters())[: -1 if one and what == "in the optimizer" else None]
    try:
        with LocalSGD(model, torch.optim.SGD(trained, 0.1), Constant(8, 2)):
            return ""
    except MismatchError as error:
        return str(error)


@pytest.mark.parametrize("what", ["shape", "type", "missing", "strides", "requires_grad", "in the optimizer"])
def test_models_that_differ_are_told_before_anything_is_sent(what: str) -> None:
    for said in run(2, unlike, what):
        assert f"{what} is" in said or "is missing on rank 1" in said
        assert "parameter '" in said
        assert "rank 1" in said


def small_files(world: World, way: dict[str, Any]) -> tuple[int, int]:
    model = nn.Sequential(nn.Linear(4, 4_000), nn.Linear(4_000, 1), nn.Linear(1, 1))
    before = len(_saved(model[2].state_dict()).getvalue())
    with LocalSGD(model, torch.optim.SGD(model.parameters(), 1e-6), Constant(8, 2), settings=way) as sync:
        train(sync, 4)
    return before, len(_saved(model[2].state_dict()).getvalue())


def test_a_part_of_the_model_is_as_large_a_file_as_before() -> None:
    ways = [(WAYS[way],) for way in ("plain", "delayed", "int8 in halves")]
    for way, ranks in zip(ways, run_each(2, small_files, ways), strict=True):
        for before, after in ranks:
            assert after == before, way


def memory_shared(world: World) -> str:
    weight = torch.zeros(4, 4)
    model = nn.Module()
    model.one, model.other = nn.Parameter(weight[:3]), nn.Parameter(weight[1:])
    LocalSGD(model, torch.optim.SGD(model.parameters(), 0.1), Constant(8, 2))
    return ""


def test_parameters_that_share_memory_are_refused() -> None:
    with pytest.raises(RankError, match="share memory"):
        run(2, memory_shared)
