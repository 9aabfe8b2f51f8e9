"""Loops that do what no example does: right, or told in one line, and never a wait for the time-out."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import time
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run, run_each
from strangers import batch_of, spread, train, values
from torch import nn

from trainer import Alternating, Constant, LocalSGD, Plan, SyncConfig
from trainer.distributed.world import World
from trainer.errors import ConfigError, MismatchError


def sgd(model: nn.Module, lr: float = 0.01, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr, momentum)


# ---- ranks that do not do the same


def skipping(world: World, period: int) -> tuple[float, int]:
    """Rank 1 leaves out two of its updates."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with LocalSGD(model, optimizer, Constant(8, period), settings={"observe_steps": 4}) as sync:
            for step in range(16):
                x, y = batch_of(world.rank, step)
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(sync.model(x), y)
                left_out = world.rank == 1 and step in (2, 9)
                if not left_out:
                    loss.backward()
                    optimizer.step()
                sync.step(loss, samples=len(x), skipped=left_out)
            with sync.consensus() as consensus:
                apart = spread(*consensus.parameters())
    return max(apart, spread(*model.parameters())), len([w for w in said if "replicas differ" in str(w.message)])


@pytest.mark.parametrize("period", [1, 4])
def test_updates_left_out_on_one_rank_leave_one_model(period: int) -> None:
    for apart, warned in run(2, skipping, period):
        assert apart < 1e-6
        assert (warned > 0) == (period == 1)


def meddling(world: World) -> float:
    """Rank 1 loads other weights in mid-training."""
    model = nn.Linear(4, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with LocalSGD(model, sgd(model), Constant(8, 1), settings={"observe_steps": 4}) as sync:
            train(sync, 6)
            if world.rank == 1:
                nn.init.ones_(model.weight)
            train(sync, 6, start=6)
    return spread(*model.parameters())


def test_weights_loaded_on_one_rank_at_period_1_are_averaged_in() -> None:
    assert run(2, meddling) == [0.0, 0.0]


def other_settings(world: World, what: str) -> str:
    model = nn.Linear(4, 1)
    lr, decay = (0.1, 0.0) if what == "rate" and world.rank else (0.01, 0.1 if what == "decay" and world.rank else 0.0)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr, weight_decay=decay)
    if what == "class" and world.rank:
        optimizer = torch.optim.Adam(model.parameters(), lr)
    settings = (
        {"observe_steps": 2, "wire_format": "int8"} if what == "settings" and world.rank else {"observe_steps": 2}
    )
    policy = Constant(8, 3) if what == "settings" else Constant(8, 1)
    try:
        with LocalSGD(model, optimizer, policy, settings=settings) as sync:
            train(sync, 6)
    except MismatchError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("rate", "the learning rate of group 0 is 0.01 on rank 0, 0.1 on rank 1"),
        ("decay", "the optimizer setting 'weight_decay' of group 0 is 0.0 on rank 0, 0.1 on rank 1"),
        ("class", "optimizers differ: SGD on rank 0 but Adam on rank 1"),
        ("settings", "the settings of LocalSGD is"),
    ],
)
def test_ranks_that_are_set_up_differently_are_told(what: str, told: str) -> None:
    for said in run(2, other_settings, what):
        assert told in said


def ending_early(world: World, period: int) -> None:
    model = nn.Linear(4, 1)
    with LocalSGD(model, sgd(model), Constant(8, period)) as sync:
        train(sync, 5 + 7 * world.rank)


@pytest.mark.parametrize(
    ("period", "told"),
    [
        (1, ["rank 1 of 2: rank 0 ended its loop after local step 5", "rank 0 of 2: rank 1 left with PeerError"]),
        (4, ["ranks disagree about their step: rank 0 is at round 2, local step 5"]),
    ],
)
def test_a_rank_that_ends_its_loop_early_is_named_at_once(period: int, told: list[str]) -> None:
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        run(2, ending_early, period)
    assert time.monotonic() - began < 20
    for text in told:
        assert text in str(caught.value)


def more_passes(world: World) -> str:
    """Rank 1 runs a backward pass too many."""
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    try:
        with LocalSGD(model, optimizer, Constant(8, 1)) as sync:
            for step in range(6):
                x, y = batch_of(world.rank, step)
                optimizer.zero_grad()
                for _ in range(1 + (world.rank == 1 and step == 2)):
                    loss = nn.functional.mse_loss(sync.model(x), y)
                    loss.backward()
                optimizer.step()
                sync.step(loss, samples=8)
    except MismatchError as error:
        return str(error)
    return ""


def test_unequal_backward_passes_are_told_at_once() -> None:
    for said in run(2, more_passes):
        assert "rank 0 is at pass 1 of step 4 of this phase; rank 1 is at pass 2 of step 3" in said
        assert "sync.no_sync()" in said


def looking(world: World) -> float:
    """Rank 1 looks at gradients of its inputs between the steps, which is nobody else's matter."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    with LocalSGD(model, optimizer, Constant(8, 1)) as sync:
        for step in range(4):
            train(sync, 1, start=step)
            if world.rank == 1:
                x = torch.randn(2, 4, requires_grad=True)
                torch.autograd.grad(sync.model(x).sum(), x)
                sync.model(x).sum().backward(inputs=[x])
    return spread(*model.parameters())


def test_gradients_of_inputs_are_a_ranks_own_matter() -> None:
    assert run(2, looking) == [0.0, 0.0]


def by_hand_gradients(world: World) -> float:
    """Gradients from autograd.grad, written into .grad: averaged before the update all the same."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    with LocalSGD(model, optimizer, Constant(8, 1)) as sync:
        for step in range(4):
            x, y = batch_of(world.rank, step)
            loss = nn.functional.mse_loss(sync.model(x), y)
            for parameter, gradient in zip(
                model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
            ):
                parameter.grad = gradient
            optimizer.step()
            sync.step(loss, samples=8)
    return spread(*model.parameters())


def test_gradients_made_by_hand_are_averaged_too() -> None:
    assert run(2, by_hand_gradients) == [0.0, 0.0]


# ---- values that are not finite


def poisoned(world: World, what: str, settings: dict[str, Any]) -> tuple[bool, bool, list[tuple[int, ...]], float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    heard = []
    with LocalSGD(model, optimizer, Constant(8, 4), settings=settings) as sync:
        for step in range(24):
            if world.rank == 1 and step == 6:
                with torch.no_grad():
                    target: Any = {"weights": model[0].weight, "statistics": model[1].running_mean}[what]
                    target.view(-1)[0] = torch.nan if what == "statistics" else torch.inf
            heard += train(sync, 1, start=step)
        with sync.consensus() as consensus:
            tensors = [*consensus.parameters(), *consensus.buffers()]
            clean = all(bool(torch.isfinite(each).all()) for each in tensors)
            apart = spread(*tensors)
    finite = all(bool(torch.isfinite(each).all()) for each in model.parameters())
    return clean, finite, [round_.left_out for round_ in heard if round_.left_out], apart


WAYS: list[dict[str, Any]] = [
    {},
    {"wire_format": "int8"},
    {"wire_format": "int4", "delay_steps": 1, "outer": "fedavgm"},
    {"delay_steps": 2},
    {"state": "average"},
    {"fragments": 2},
    {"mixing": 0.5},
]


def test_what_is_not_finite_never_reaches_another_rank() -> None:
    cases = list(itertools.product(("weights", "statistics"), WAYS))
    for case, ranks in zip(cases, run_each(2, poisoned, cases), strict=True):
        for clean, finite, left_out, apart in ranks:
            assert clean, case
            assert finite, case
            assert apart < 1e-6, case
            if case[0] == "weights" and "fragments" not in case[1]:
                assert left_out == [(1,)], case


def no_samples(world: World, settings: dict[str, Any]) -> tuple[list[float], float, float]:
    """Rank 1 has empty batches in one round; that round's average is rank 0's alone."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    with LocalSGD(model, optimizer, Constant(8, 2), settings=settings) as sync:
        for step in range(6):
            x, y = batch_of(world.rank, step, 0 if world.rank and step in (2, 3) else 8)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(sync.model(x), y)
            loss.backward()
            optimizer.step()
            losses += [round_.seen.train_loss for round_ in sync.step(loss, samples=len(x))]
    return losses, spread(*model.parameters()), float(values(model).abs().max())


def test_an_empty_batch_counts_for_nothing() -> None:
    cases: list[tuple[Any]] = [({},), ({"wire_format": "int8"},), ({"delay_steps": 1},), ({"outer": "slowmo"},)]
    for case, ranks in zip(cases, run_each(2, no_samples, cases), strict=True):
        for losses, apart, largest in ranks:
            assert all(loss == loss for loss in losses), case
            assert apart < 1e-6, case
            assert largest < 10, case


# ---- types


def of_type(world: World, kind: torch.dtype, period: int, settings: dict[str, Any]) -> tuple[torch.Tensor, float]:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if kind == torch.float64 else torch.float32)
    try:
        model = nn.Linear(4, 1).to(kind)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        with LocalSGD(model, optimizer, Constant(8, period), settings=settings) as sync:
            for step in range(4):
                x, y = (each.to(kind) for each in batch_of(world.rank, step))
                optimizer.zero_grad()
                loss = (sync.model(x) - y).abs().square().mean()
                loss.backward()
                optimizer.step()
                sync.step(loss, samples=8)
    finally:
        torch.set_default_dtype(before)
    return values(model), spread(*model.parameters())


def test_replicas_of_any_type_become_one() -> None:
    kinds = torch.float64, torch.complex64, torch.complex128, torch.bfloat16, torch.float16
    ways: list[dict[str, Any]] = [{}, {"wire_format": "int8"}, {"delay_steps": 1}, {"outer": "diloco"}]
    cases = [(kind, 2, settings) for kind in kinds for settings in ways]
    for case, ranks in zip(cases, run_each(2, of_type, cases), strict=True):
        for weights, apart in ranks:
            assert apart < 1e-6, case
            assert torch.isfinite(weights).all(), case


def test_period_1_in_any_type() -> None:
    cases = [(kind, 1, {}) for kind in (torch.float64, torch.complex64, torch.bfloat16)]
    results = run_each(2, of_type, cases)
    for case, ranks in zip(cases, results, strict=True):
        assert all(apart == 0 for _, apart in ranks), case
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model = nn.Linear(4, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(4):
        optimizer.zero_grad()
        for rank in range(2):
            x, y = (each.double() for each in batch_of(rank, step))
            ((model(x) - y).square().mean() / 2).backward()
        optimizer.step()
    torch.testing.assert_close(results[0][0][0], values(model), rtol=1e-12, atol=1e-12)


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(40, 4, sparse=True), nn.Linear(4, 1)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(words).mean(1))


def sparse(world: World, period: int, unused: bool) -> tuple[float, bool]:
    torch.manual_seed(0)
    model = Bag()
    dense = torch.optim.SGD(model.parameters(), 0.1)
    laid_out = True
    with LocalSGD(model, dense, Constant(8, period)) as sync:
        for step in range(4):
            words = torch.randint(0, 40, (8, 3), generator=torch.Generator().manual_seed(10 * step + world.rank))
            dense.zero_grad()
            outputs = model.head(torch.ones(8, 4)) if unused and world.rank else sync.model(words)
            loss = outputs.square().mean()
            loss.backward()
            if period == 1:
                laid_out &= model.words.weight.grad is not None and model.words.weight.grad.is_sparse
            dense.step()
            sync.step(loss, samples=8)
    return spread(*model.parameters()), laid_out


def test_sparse_gradients() -> None:
    cases = list(itertools.product((1, 2), (False, True)))
    for case, ranks in zip(cases, run_each(2, sparse, cases), strict=True):
        for apart, laid_out in ranks:
            assert apart < 1e-6, case
            assert laid_out, case


class Coded(torch.optim.SGD):
    """Keeps codes, a list and a count in its state, as eight-bit optimizers do."""

    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["codes"] = (parameter.detach() * 100).to(torch.int8)
                state["list"] = [parameter.detach().clone()]
                state["count"] = state.get("count", 0) + 1 + dist.get_rank()
        return found


def coded(world: World) -> bool:
    model = nn.Linear(4, 1)
    optimizer = Coded(model.parameters(), 0.01, 0.9)
    policy = Alternating(Plan(8, 4), Plan(8, 1), steps_per_phase=8)
    with LocalSGD(model, optimizer, policy, settings={"observe_steps": 4}) as sync:
        train(sync, 8)
        assert sync.plan.sync_period_steps == 1
        state = optimizer.state[model.weight]
        told = [None] * world.size
        dist.all_gather_object(told, repr(state))
    return len(set(told)) == 1


def test_state_that_has_no_mean_is_one_at_period_1() -> None:
    assert run(2, coded) == [True, True]


# ---- life cycle


def outside(world: World) -> list[str]:
    model = nn.Linear(4, 1)
    sync = LocalSGD(model, sgd(model), "constant")
    said = []
    for work in (lambda: sync.step(torch.tensor(1.0), samples=1), sync.settle, sync.finish):
        with pytest.raises(RuntimeError, match="outside its block") as caught:
            work()
        said.append(str(caught.value))
    with sync, pytest.raises(RuntimeError, match="is entered already"):
        sync.__enter__()
    for loss, samples, mend in (
        (torch.ones(3), 3, "shape (3,)"),
        ("loss", 3, "mean loss"),
        (1.0, -1, "samples = -1"),
        (1.0, None, "samples = None"),
    ):
        with sync, pytest.raises(ConfigError) as refused:
            sync.step(loss, samples=samples)  # type: ignore[arg-type]
        assert mend in str(refused.value)
    return said


def test_calls_out_of_place_are_refused_in_one_line() -> None:
    for said in run(2, outside):
        assert len(said) == 3


def again_and_again(world: World, settings: dict[str, Any]) -> float:
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    sync = LocalSGD(model, optimizer, Constant(8, 2), settings=settings)
    for epoch in range(3):
        with sync:
            train(sync, 5, start=5 * epoch)
    with LocalSGD(model, optimizer, Constant(8, 1)) as other:
        train(other, 3, start=20)
    return spread(*model.parameters())


def test_a_block_an_epoch() -> None:
    cases: list[tuple[Any]] = [({},), ({"delay_steps": 1},), ({"wire_format": "int4", "fragments": 2},)]
    for case, ranks in zip(cases, run_each(2, again_and_again, cases), strict=True):
        assert all(apart < 1e-6 for apart in ranks), case


class Failing(torch.optim.SGD):
    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise ArithmeticError("as asked")
        return super().step(closure)


def caught_errors(world: World) -> tuple[list[float], list[bool], float, list[bool]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[2].eval()
    optimizer = Failing(model.parameters(), 0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
    policy = Alternating(Plan(8, 2), Plan(16, 2), steps_per_phase=4, lr_scaling="linear", lr_ramp_samples=0)
    rates, modes = [], []
    with LocalSGD(model, optimizer, policy, settings=SyncConfig(batch_norm="recalibrate")) as sync:
        train(sync, 6)
        optimizer.fails = True
        assert sync.lr_scale == 2
        with pytest.raises(ArithmeticError):
            optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.fails = False
        statistics = copy.deepcopy(model[1].running_mean)
        with pytest.raises(ZeroDivisionError), sync.consensus([torch.randn(8, 4)]):
            raise ZeroDivisionError
        modes += [model.training, model[1].training, model[2].training]
        with pytest.raises(RuntimeError), sync.consensus([torch.randn(8, 4), torch.randn(8, 5)]):
            pass
        modes += [model.training, model[1].training, model[2].training]
        kept = [torch.equal(model[1].running_mean, statistics)]  # type: ignore[arg-type]
        train(sync, 4, start=6)
        scheduler.step()
    return rates, modes, spread(*model.parameters()), kept


def test_errors_that_a_loop_catches_leave_rates_modes_and_replicas_as_they_were() -> None:
    for rates, modes, apart, _ in run(2, caught_errors):
        assert rates == [0.01]
        assert modes == [True, True, False] * 2
        assert apart < 1e-6


def without_gradients(world: World, period: int) -> float:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    policy = Constant(8, period)
    with LocalSGD(model, sgd(model), policy, settings={"delay_steps": 1} if period > 1 else None) as sync:
        for turn in range(3):
            train(sync, 3, start=3 * turn)
            with torch.inference_mode(), sync.consensus() as consensus:
                consensus(batch_of(0, 0)[0])
    return spread(*model.parameters())


def test_an_evaluation_inside_inference_mode() -> None:
    for period, ranks in enumerate(run_each(2, without_gradients, [(0,), (1,), (2,)])):
        assert all(apart < 1e-6 for apart in ranks), period


# ---- groups, launchers, logs


def in_groups(world: World, period: int) -> tuple[float, float]:
    mine = [0, 2] if world.rank in (0, 2) else [1, 3]
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in ([0, 2], [1, 3])}
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    settings = {"delay_steps": 1} if period > 1 else None
    with LocalSGD(model, sgd(model), Constant(8, period), settings=settings, group=groups[tuple(mine)]) as sync:
        assert (sync.world.rank, sync.world.size) == (mine.index(world.rank), 2)
        train(sync, 6)
    weights = [torch.empty_like(values(model)) for _ in range(4)]
    dist.all_gather(weights, values(model))
    here, there = weights[mine[0]], weights[1 - mine[0]]
    return float((weights[mine[1]] - here).abs().max()), float((there - here).abs().max())


def test_two_groups_train_two_models_side_by_side() -> None:
    for ranks in run_each(4, in_groups, [(1,), (3,)]):
        for within, between in ranks:
            assert within < 1e-6
            assert between > 1e-3


def dealt_out(world: World) -> tuple[float, float, torch.Tensor]:
    """Ranks 0 and 2 are on one node: inside a round they are one, and the nodes are apart."""
    os.environ["GROUP_RANK"] = str(world.rank % 2)
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    settings = SyncConfig(node_period_steps=2)
    with LocalSGD(model, torch.optim.SGD(model.parameters(), 0.01), Constant(8, 4), settings=settings) as sync:
        train(sync, 2)
        weights = [torch.empty_like(values(model)) for _ in range(4)]
        dist.all_gather(weights, values(model))
        inside = float((weights[world.rank] - weights[(world.rank + 2) % 4]).abs().max())
        between = float((weights[0] - weights[1]).abs().max())
        train(sync, 2, start=2)
    return inside, between, values(model)


def test_levels_are_those_that_ranks_tell_of_their_nodes() -> None:
    results = run(4, dealt_out)
    for inside, between, weights in results:
        assert inside < 1e-6
        assert between > 1e-3
        torch.testing.assert_close(weights, results[0][2])


def bare_launch(world: World) -> tuple[int, int]:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"):
        os.environ.pop(name, None)
    model = nn.Linear(4, 1)
    with LocalSGD(model, sgd(model), Constant(8, 2)) as sync:
        train(sync, 4)
        return sync.world.rank, sync.world.size


def test_rank_and_world_size_are_enough_of_a_launcher() -> None:
    assert run(2, bare_launch) == [(0, 2), (1, 2)]


def quiet(world: World) -> list[str]:
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ebbtide")
    logger.addHandler(handler)
    model = nn.Linear(4, 1)
    policy = Alternating(Plan(8, 2), Plan(8, 1), steps_per_phase=4)
    for level in (logging.WARNING, logging.DEBUG):
        logger.setLevel(level)
        with LocalSGD(model, sgd(model), policy, settings={"observe_steps": 2}) as sync:
            train(sync, 6)
        heard.append(f"end of {level}")
    logger.removeHandler(handler)
    return heard


def test_the_log_is_quiet_until_it_is_asked() -> None:
    for heard in run(2, quiet):
        assert heard[0] == "end of 30"
        assert any("large" in line for line in heard[1:])


def failing(world: World) -> None:
    model = nn.Linear(4, 1)
    with LocalSGD(model, sgd(model), Constant(8, 2)) as sync:
        train(sync, 3)
        if world.rank == 1:
            raise KeyError("a sample is missing")
        train(sync, 3, start=3)


def test_who_fails_tells_the_others_why() -> None:
    with pytest.raises(RankError) as caught:
        run(2, failing)
    told = "comparing rounds failed on rank 0 of 2: rank 1 left with KeyError: 'a sample is missing'"
    assert told in str(caught.value)


def alone(world: World, what: str) -> None:
    """Rank 0 does by itself what all ranks must do."""
    model = nn.Linear(4, 1)
    data = [(x, y) for x, y in zip(*batch_of(world.rank, 0, 64), strict=True)]
    with LocalSGD(model, sgd(model), Constant(8, 1)) as sync:
        for step in range(9):
            if world.rank == 0 and step == 5 and what == "evaluation":
                with sync.consensus():
                    pass
            if world.rank == 0 and step == 5 and what == "pass":
                next(iter(sync.batches(data)))
            if world.rank == 0 and step == 5 and what == "left out":
                continue
            train(sync, 1, start=step)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("evaluation", "rank 0 evaluates or ends after local step 5"),
        ("pass", "rank 0 begins another pass over its data after local step 5"),
        ("left out", "rank 0 "),
    ],
)
def test_what_one_rank_does_by_itself_is_told_at_once(what: str, told: str) -> None:
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        run(2, alone, what)
    assert time.monotonic() - began < 25
    assert told in str(caught.value)


def keeping(world: World) -> float:
    """The loop keeps every step's gradient, and goes on by their mean."""
    torch.manual_seed(0)
    model, other = nn.Linear(4, 1), nn.Linear(4, 1)
    other.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    kept, wanted = [], []
    with LocalSGD(model, optimizer, Constant(8, 1)) as sync:
        for step in range(4):
            train(sync, 1, start=step)
            assert model.weight.grad is not None
            kept.append(model.weight.grad)
            wanted.append(model.weight.grad.clone())
    return max(float((one - clone).abs().max()) for one, clone in zip(kept, wanted, strict=True))


def test_gradients_that_a_loop_keeps_stay_what_they_were() -> None:
    assert run(2, keeping) == [0.0, 0.0]


def late_for_the_next_block(world: World) -> int:
    """Rank 0 comes to the second block when the other has waited for longer than it takes to look at the board."""
    model = nn.Linear(4, 1)
    optimizer = sgd(model)
    steps = 0
    for _ in range(2):
        with LocalSGD(model, optimizer, Constant(8, 2), world=world) as sync:
            train(sync, 4)
            steps += sync.local_step
        time.sleep(2.5 if world.rank == 0 else 0.0)
    return steps


def test_a_block_begins_anew_whatever_was_said_at_the_end_of_another() -> None:
    assert run(2, late_for_the_next_block) == [8, 8]


def test_a_mistake_in_a_test_of_ranks_is_seen() -> None:
    with pytest.raises(RankError, match="assert 1 == 2"):
        run(2, wrong)


def wrong(world: World) -> None:
    assert 1 == 2
