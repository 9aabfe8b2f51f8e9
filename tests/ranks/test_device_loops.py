"""Loops of federated devices as strangers write them: what a device does reaches the average once, and nobody else."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from ranks import RankError, run
from test_devices import Net, a_round, task
from torch import nn

from trainer import Constant, LocalSGD, Plan
from trainer.distributed.world import World
from trainer.federated.devices import Devices


class Began(Net):
    """Takes its centre from the first batch that it sees, and remembers it in a flag; sums up in complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("began", torch.tensor(False))
        self.register_buffer("centre", torch.zeros(6))
        self.register_buffer("turns", torch.zeros(2, dtype=torch.complex64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            if not self.began:
                self.centre.copy_(x.mean(0).detach())
                self.began.fill_(True)
            self.turns += torch.view_as_complex(x.detach()[0, :4].reshape(2, 2).contiguous())
        return super().forward(x - self.centre)


def plain_sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def head_at_rest(model: Net) -> torch.optim.Optimizer:
    """The first group's rate is zero."""
    rest = [*model.norm.parameters(), *model.last.parameters(), model.scale]
    return torch.optim.SGD([{"params": [*model.first.parameters()], "lr": 0.0}, {"params": rest}], lr=0.05)


def kept(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def in_blocks(world: World, settings: dict[str, Any], model: Net, optimizer: Any, rounds: int = 4) -> LocalSGD:
    data, shards, _ = task(12)
    sync = LocalSGD(
        model, optimizer, Constant(Plan(8, 3)), world=world, devices=Devices(shards, seed=3, **{"cohort": 5} | settings)
    )
    with sync:
        for _ in range(rounds):
            a_round(sync, data)
    return sync


def strange_models(world: World) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    torch.manual_seed(1)
    flags = Began().double()
    in_blocks(world, {}, flags, plain_sgd(flags))
    found["flags"] = kept(flags)
    for rule in ("fednova", "scaffold"):
        model = task(12)[2]
        in_blocks(world, {"rule": rule}, model, head_at_rest(model))
        found[f"{rule} at rest"] = kept(model)
    stale: dict[str, Any] = {"rule": "fedbuff", "buffer": 3, "profile": "lognormal"}
    for rule, settings in {"fedbuff": stale, "fedasync": stale | {"rule": "fedasync"}}.items():
        model = task(12)[2]
        in_blocks(world, settings, model, plain_sgd(model), rounds=6)
        found[rule] = kept(model)
    model = task(12)[2]
    model.first.weight.requires_grad_(False)
    optimizer = plain_sgd(model)
    sync = in_blocks(world, {}, model, optimizer, rounds=1)
    with sync:
        for _ in range(3):
            before = kept(model)
            a_round(sync, task(12)[0])
            moved = not torch.allclose(before["first.weight"], model.first.weight, rtol=1e-12)
            assert moved == model.first.weight.requires_grad
            model.first.weight.requires_grad_(not model.first.weight.requires_grad)
            model.first.weight.grad = None
    found["unfrozen"] = kept(model)
    return found


def test_what_devices_change_beside_parameters_does_not_pass_from_one_to_the_next() -> None:
    alone = run(1, strange_models)[0]
    for rank in run(2, strange_models):
        for name, model in rank.items():
            for key, tensor in model.items():
                assert bool(torch.isfinite(tensor).all()), (name, key)
                torch.testing.assert_close(tensor, alone[name][key], rtol=1e-5, atol=1e-7, msg=f"{name}: {key}")
    assert alone["flags"]["began"]
    start = task(12)[2].state_dict()
    for name in ("fednova at rest", "scaffold at rest"):
        assert torch.equal(alone[name]["first.weight"], start["first.weight"])
        assert not torch.equal(alone[name]["last.weight"], start["last.weight"])


def by_hand(world: World, rule: str) -> tuple[list[float], list[float]]:
    """Mean and statistics of a buffered average, against the sum of what its devices sent."""
    data, shards, model = task(12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    devices = Devices(shards, cohort=4, rule=rule, buffer=2, profile="lognormal", weights="uniform")
    sent: dict[int, torch.Tensor] = {}
    found, expected = [], []
    with LocalSGD(model, optimizer, Constant(Plan(8, 2)), world=world, devices=devices) as sync:
        for _ in range(4):
            first = model.norm.running_mean.clone()
            last: dict[int, torch.Tensor] = {}

            def note(module: nn.Module, *_: Any, last: dict[int, torch.Tensor] = last, sync: LocalSGD = sync) -> None:
                last[sync.visiting] = module.running_mean.clone()  # type: ignore[index]

            hook = model.norm.register_forward_hook(note)
            ended = a_round(sync, data)[-1].devices
            hook.remove()
            by_device = {visit.device: visit.draw for visit in ended.visits}
            sent |= {by_device[k]: mean if rule == "fedasync" else mean - first for k, mean in last.items()}
            heard = [(sent[each.draw], each.scale) for each in ended.heard]
            if rule == "fedasync":
                ((value, scale),) = heard
                by_formula = first * (1 - scale) + value * scale
            else:
                by_formula = first + sum(value * scale for value, scale in heard) / len(heard)
            found.append(float(model.norm.running_mean.sum()))
            expected.append(float(by_formula.sum()))
    return found, expected


@pytest.mark.parametrize("rule", ["fedbuff", "fedasync"])
def test_statistics_of_devices_that_arrive_later_are_taken_as_their_weights_are(rule: str) -> None:
    ((found, expected),) = run(1, by_hand, rule)
    assert found == pytest.approx(expected, rel=1e-9)


def dropped(world: World) -> list[str]:
    """Rounds that end in a `break`, or in an error, against a run without them."""
    wrong = []
    stale: dict[str, Any] = {"rule": "fedbuff", "buffer": 2, "profile": "lognormal"}
    for settings in ({}, {"rule": "scaffold"}, {"rule": "feddyn"}, *([stale] if world.size == 1 else [])):
        ends: list[Any] = []
        for leaves in (None, "break", "error"):
            data, _, model = task(12)
            sync = in_blocks(world, settings, model, plain_sgd(model))
            before = kept(model), sync.local_step, sync.samples
            try:
                with sync:
                    for number, (x, y) in enumerate(sync.batches(data) if leaves else ()):
                        if leaves == "error" and number == 2:
                            raise KeyError("mine")
                        nn.functional.cross_entropy(sync.model(x), y).backward()
                        sync.optimizer.step()
                        sync.step(0.0)
                        if leaves == "break" and number == 1:
                            break
            except KeyError:
                pass
            same = all(map(torch.equal, before[0].values(), model.state_dict().values()))
            if not (same and sync.between_rounds and before[1:] == (sync.local_step, sync.samples)):
                wrong.append(f"{settings} {leaves}: not as it was")
            with sync:
                for _ in range(3):
                    a_round(sync, data)
            ends.append([*kept(model).values()])
        wrong += [f"{settings}" for end in ends[1:] if not all(map(torch.equal, ends[0], end))]
    return wrong


def test_a_round_that_is_left_is_as_if_it_had_not_begun() -> None:
    assert run(1, dropped) == [[]]
    assert run(2, dropped) == [[], []]


def spoiled(world: World) -> tuple[bool, list[str]]:
    """A device's sample is no number; its loop skips the batch, whose statistics are no numbers either. Another's
    model is none."""
    data, shards, model = task(4)
    data.tensors[0][shards[1][0]] = float("nan")
    optimizer = plain_sgd(model)
    sync = LocalSGD(model, optimizer, Constant(Plan(8)), world=world, devices=Devices(shards, local_epochs=1))
    with warnings.catch_warnings(record=True) as said, sync:
        warnings.simplefilter("always")
        for x, y in sync.batches(data):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(sync.model(x), y)
            if torch.isfinite(loss):
                loss.backward()
                if sync.visiting == 2:
                    model.last.bias.grad.fill_(float("inf"))  # type: ignore[union-attr]
                optimizer.step()
            sync.step(loss, skipped=not torch.isfinite(loss))
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values())
    return finite, [str(each.message) for each in said if "device" in str(each.message)]


def test_what_is_not_finite_reaches_nobody_and_is_said() -> None:
    for finite, said in run(2, spoiled):
        assert finite
        assert said == [
            "round 1: the model of device 2 held values that are not finite; it was left out of the average"
        ]


def refused(world: World, case: str) -> None:
    data, shards, model = task(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, maximize=case == "maximize")
    if case == "grows":
        model.register_buffer("memory", torch.zeros(8))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    settings: dict[str, Any] = {"rule": "fedprox"} if case == "maximize" else {}
    if case == "mu":
        settings = {"rule": "fedprox", "mu": 0.1 * (1 + world.rank)}
    if case == "shards" and world.rank:
        shards = shards[::-1]
    devices = Devices(shards, seed=world.rank if case == "seed" else 0, **settings)
    if case == "one each":
        devices = Devices(shards[:2], seed=0)
    if case == "state":
        before = LocalSGD(model, optimizer, Constant(Plan(8)), world=world, devices=Devices(shards[:3]))
        with before:
            a_round(before, data)
    with LocalSGD(model, optimizer, Constant(Plan(8)), world=world, devices=devices) as sync:
        if case == "state":
            sync.load_state_dict(before.state_dict())
        if case == "loader":
            sync.step(0.0, samples=8)
        source: Any = torch.utils.data.Subset(data, range(50)) if case == "data" else data
        for number in range(2):
            for x, y in sync.batches(source):
                loss = nn.functional.cross_entropy(sync.model(x), y)
                loss.backward()
                optimizer.step()
                if case == "schedule" or (case == "one each" and (world.rank or number)):
                    schedule.step()
                if case == "grows":
                    model.memory = torch.zeros(9)
                sync.step(loss)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("seed", "the seed of Devices is 0 on rank 0, 1 on rank 1; give all ranks the same"),
        ("mu", "the mu of Devices is 0.1 on rank 0, 0.2 on rank 1"),
        ("shards", "the shard of device 0 is '.*' on rank 0, '.*' on rank 1"),
        ("data", "has the index .*, and the data set has 50 samples"),
        ("loader", "sync.step: with devices each call is for one batch of sync.batches"),
        ("schedule", "the learning rate of group 0 is 0.04.* for device .*; call|.*where sync.between_rounds is true"),
        ("one each", "the learning rate of group 0 is .* on one rank and .* on another in round 2: a scheduler steps"),
        ("grows", r"buffer 'memory' was float32 \(8,\) and is float32 \(9,\)"),
        ("maximize", "rule = 'fedprox': adds to the gradient of a loss"),
        ("state", "devices = 4: the state is of 3; give the same devices"),
    ],
)
def test_what_would_go_wrong_without_a_word_is_said_in_one_line(case: str, said: str) -> None:
    with pytest.raises(RankError, match=said):
        run(2, refused, case)
