"""Passes over a data set: every sample once, resumed exactly, and ended by all ranks together."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ranks import fork_readers, run
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from trainer import Alternating, Constant, LocalSGD, Plan, SyncConfig
from trainer.distributed.world import World


class Noisy(Dataset[Any]):
    """Items that draw from every global random state."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        drawn = [float(torch.rand(())), float(np.random.rand()), random.random()]
        return torch.tensor(drawn), index


class Stream(IterableDataset[Any]):
    """So many numbers, in order."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        return ((torch.full((3,), float(index)), index) for index in range(self.size))


def numbered(size: int) -> TensorDataset:
    return TensorDataset(torch.arange(3.0 * size).view(size, 3), torch.arange(size))


def began(policy: Any, world: World, **settings: Any) -> LocalSGD:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return LocalSGD(
        model, torch.optim.SGD(model.parameters(), 1e-4), policy, world=world, settings=SyncConfig(**settings)
    )


def trained(sync: LocalSGD, batch: Any) -> list[int]:
    """Train one batch; the numbers of its samples."""
    x, y = batch
    sync.optimizer.zero_grad()
    loss = sync.model(x).square().mean()
    loss.backward()
    sync.optimizer.step()
    sync.step(loss)
    return [int(number) for number in y]


def flat(sync: LocalSGD) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in sync.replica.parameters])


# ---- passes


POLICIES = {
    "period 4": Constant(Plan(8, 4)),
    "period 1": Constant(Plan(7, 1)),
    "period 0": Constant(Plan(5, 0)),
    "alternating": Alternating(small=Plan(3, 2), large=Plan(11, 1), samples_per_phase=20),
}


def passes(world: World, size: int, workers: int) -> dict[str, list[list[list[int]]]]:
    read = {}
    fork_readers()
    for name, policy in POLICIES.items() if not workers else [*POLICIES.items()][-1:]:
        with began(policy, world) as sync:
            data = sync.batches(Noisy(size), workers=workers, seed=5)
            read[name] = [[trained(sync, batch) for batch in data] for _ in range(3)]
    return read


@pytest.mark.parametrize(("size", "workers"), [(64, 0), (65, 0), (65, 2)])
def test_each_pass_reads_every_sample_once_in_a_new_order_and_ends_on_all_ranks(size: int, workers: int) -> None:
    both = run(2, passes, size, workers)
    for name in both[0]:
        policy: Any = POLICIES[name]
        first, second = (rank[name] for rank in both)
        orders = [list(itertools.chain(*number)) for number in first]
        others = [list(itertools.chain(*number)) for number in second]
        for number in range(3):
            assert sorted(orders[number] + others[number]) == list(range(size))
            assert len(first[number]) == len(second[number])
            sizes = {len(batch) for batch in first[number][:-2]}
            assert sizes <= {each.batch_per_rank for each in policy.plans()}
        assert set(orders[0]) == set(orders[1]) == set(orders[2])
        assert orders[0] != orders[1]
        assert orders[1] != orders[2]


def breaks(world: World) -> list[Any]:
    dataset = numbered(40)
    with began(Constant(Plan(4, 2)), world) as sync:
        halves = [list(itertools.islice((trained(sync, b) for b in sync.batches(dataset)), 2)) for _ in range(2)]
        counted = sync.passes(dataset)
        whole = [trained(sync, batch) for batch in sync.batches(dataset)]
        kept = sync.batches(dataset)
        twice = [[trained(sync, batch) for batch in kept] for _ in range(2)]
        until = [trained(sync, batch) for batch in sync.batches(dataset, samples=sync.samples + 50)]
        return [halves, counted, whole, twice, until, len(kept), sync.passes(dataset)]


def test_a_loop_that_was_left_is_followed_by_the_next_pass_and_samples_goes_on_over_passes() -> None:
    for halves, counted, whole, twice, until, count, ended in run(2, breaks):
        assert halves[0] != halves[1]
        assert counted == 1  # the second is not over until another begins
        assert len(set(itertools.chain(*whole))) == 20
        assert twice[0] != twice[1]
        assert [len(batch) for batch in until] == [4, 4, 4, 4, 4, 4, 1]  # 25 samples a rank, 20 in the first pass
        assert count == 5
        assert ended == 6


# ---- checkpoints


def make(kind: str) -> Any:
    if kind == "stream":
        return Stream(43)
    return Noisy(43) if kind.startswith("items") else DataLoader(Noisy(43), batch_size=6)


def run_on(sync: LocalSGD, kind: str, steps: int) -> list[Any]:
    """Train on in an endless loop of passes; what was read in so many steps."""
    read: list[Any] = []
    options: dict[str, Any] = {"workers": 2 if kind == "items, workers" else 0}
    while True:
        data = sync.batch_sampler(43) if kind == "sampler" else None
        loader = DataLoader(Noisy(43), batch_sampler=data) if data is not None else make(kind)
        for x, y in sync.batches(loader, uneven="go_on" if kind == "items" else "stop", **options):
            trained(sync, (x, y))
            read.append((y.tolist(), x.tolist() if kind.startswith("items") else None))
            if len(read) == steps:
                return read


def resumed(world: World, kind: str, cut: int) -> list[bool]:
    policy = Constant(Plan(4, 3))
    with began(policy, world) as sync:
        first = run_on(sync, kind, cut)
        state = sync.state_dict()
        model = [parameter.detach().clone() for parameter in sync.replica.parameters]
    with began(policy, world) as sync:
        with torch.no_grad():
            for parameter, value in zip(sync.replica.parameters, model, strict=True):
                parameter.copy_(value)
        sync.load_state_dict(state)
        torch.manual_seed(99)  # what training drew does not matter to the data
        rest = run_on(sync, kind, 13 - cut)
    with began(policy, world) as sync:
        torch.manual_seed(world.rank)
        whole = run_on(sync, kind, 13)
    return [a[0] == b[0] and a[1] == b[1] for a, b in zip(first + rest, whole, strict=True)]


def resumed_of_each_kind(world: World, cut: int) -> dict[str, list[bool]]:
    fork_readers()
    return {kind: resumed(world, kind, cut) for kind in ("items", "items, workers", "stream", "loader", "sampler")}


@pytest.mark.parametrize("cut", [3, 6])
def test_a_resumed_run_reads_the_rest_of_its_pass_and_then_the_same_passes(cut: int) -> None:
    for same in run(2, resumed_of_each_kind, cut):
        assert all(map(all, same.values())), same


# ---- unequal ranks


def private(kind: str, size: int) -> Any:
    makers: dict[str, Any] = {
        "items": lambda: numbered(size),
        "stream": lambda: Stream(size),
        "generator": lambda: iter(Stream(size)),
        "function": lambda: lambda: iter(Stream(size)),
        "loader": lambda: DataLoader(numbered(size), batch_size=4),
    }
    return makers[kind]()


def unequal(world: World, kind: str, period: int, uneven: str) -> tuple[Any, ...]:
    sizes = (18, 41)
    with began(Constant(Plan(4, period)), world) as sync, warnings.catch_warnings():
        warnings.simplefilter("error")
        steps = [
            trained(sync, batch)
            for batch in sync.batches(private(kind, sizes[world.rank]), uneven=uneven, shard=False)  # type: ignore[arg-type]
        ]
        sync.finish()
        return steps, sync.samples, flat(sync)


CASES = list(itertools.product(("items", "stream", "generator", "function", "loader"), (0, 1, 3)))


def unequal_cases(world: World, uneven: str) -> list[tuple[Any, ...]]:
    return [unequal(world, kind, period, uneven) for kind, period in CASES]


@pytest.mark.parametrize("uneven", ["stop", "go_on"])
def test_ranks_with_unequal_data_end_a_pass_together(uneven: str) -> None:
    for (short, samples, first), (long, again, second) in zip(*run(2, unequal_cases, uneven), strict=True):
        assert len(short) == len(long) == (5 if uneven == "stop" else 11)
        assert sum(map(len, short[:5])) == 18
        assert sum(map(len, long)) == (20 if uneven == "stop" else 41)
        assert samples == again == (38 if uneven == "stop" else 59)
        assert torch.equal(first, second)
        if uneven == "go_on":
            assert all(batch == short[4] for batch in short[5:])


def weighted(world: World, gradient_format: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    inputs = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    mine = TensorDataset(inputs[:9] if world.rank == 0 else inputs[9:])
    policy = Constant(Plan(4, 1))
    settings = SyncConfig(gradient_format=gradient_format)  # type: ignore[arg-type]
    with LocalSGD(model, torch.optim.SGD(model.parameters(), 0.1), policy, settings=settings, world=world) as sync:
        for step, (x,) in enumerate(sync.batches(mine, uneven="go_on", shard=False)):
            sync.optimizer.zero_grad()
            loss = sync.model(x).square().mean()
            if world.rank == 0 and step >= 3:
                loss = loss * float("nan")  # of a repeated batch: it must not spread
            loss.backward()
            sync.optimizer.step()
            sync.step(loss)
        return flat(sync)


def by_hand() -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    inputs = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    orders = [
        torch.from_numpy(first + np.random.default_rng([0, 3, rank, 0]).permutation(size))
        for rank, (first, size) in enumerate(((0, 9), (9, 21)))
    ]
    while any(map(len, orders)):
        chosen = torch.cat([order[:4] for order in orders])
        orders = [order[4:] for order in orders]
        optimizer.zero_grad()
        model(inputs[chosen]).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@pytest.mark.parametrize(("gradient_format", "within"), [("float32", 1e-6), ("bf16", 0.02), ("powersgd", 0.05)])
def test_period_1_with_unequal_batches_is_one_large_batch(gradient_format: str, within: float) -> None:
    for result in run(2, weighted, gradient_format):
        torch.testing.assert_close(result, by_hand(), rtol=within, atol=within)


def idle(world: World) -> list[bool]:
    """In a local phase a repeated batch changes nothing, momentum and weight decay included."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    data = numbered(4 if world.rank == 0 else 24)
    stays = []
    with LocalSGD(model, optimizer, Constant(Plan(4, 16)), world=world) as sync:
        for batch in sync.batches(data, uneven="go_on", shard=False):
            before = flat(sync)
            trained(sync, batch)
            stays.append(torch.equal(before, flat(sync)))
    return stays


def test_a_rank_without_data_stays_where_it_is_in_a_local_phase() -> None:
    first, second = run(2, idle)
    assert first == [False, True, True, True, True, True]
    assert second == [False] * 6
