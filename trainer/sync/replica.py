"""One rank's replica: its parameters, optimizer state and other tensors, and how each becomes one on all ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from trainer.distributed.collectives import Collectives
from trainer.sync.layout import Layout, fingerprint, movable
from trainer.wire.flat import FlatTensors, real_view

Place = tuple[int, str]
"""A parameter's number in the optimizer, and the name of its state."""


class Replica:
    """A model and its optimizer on this rank, what is averaged of them in flat buffers.

    Members are the parameters that require a gradient, or required one when the ranks last agreed: they are averaged
    whether or not they have one. Everything else (frozen parameters, buffers) is averaged once it has moved.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, collectives: Collectives, *, keeps_state: bool) -> None:
        self.model = model
        self.optimizer = optimizer
        self.collectives = collectives
        self._asks_state = not keeps_state
        self._rests: dict[str, int] = {}
        """Fingerprints of what is no member, as they were when the ranks were last one."""
        self._state_layout = (-1, 0)
        self._take_members()

    def _take_members(self, trained: Sequence[str] | None = None) -> None:
        self.layout = Layout.of(self.model, self.optimizer, trained)
        needs = {row[0] for row in self.layout.parameters if row[4]}
        self.parameters = [parameter for name, parameter in self.model.named_parameters() if name in needs]
        embeddings = (module for module in self.model.modules() if getattr(module, "sparse", False) is True)
        self.sparse = {id(p) for module in embeddings for p in module.parameters(recurse=False)}
        """Ids of parameters whose gradients are sparse."""
        self.flat_parameters = FlatTensors(lambda: self.parameters)

    # ---- one model

    def make_one(self) -> None:
        """Give every rank rank 0's model.

        Raises:
            MismatchError: models that differ in more than values.
        """
        Layout.compare(self.layout, self.collectives)
        self.collectives.broadcast_(self.flat_parameters.adopt())
        self.give_rests()

    def give_rests(self) -> None:
        """Give every rank rank 0's values of all that is no member."""
        rests = self.rests()
        self._give([rests[name].data for name in self._differing()])
        self.remember_rests()

    def release(self) -> None:
        """Give every tensor memory of its own again."""
        self.flat_parameters.release()

    def changed(self) -> bool:
        """Whether the model has other parameters, or others that require a gradient, than the ranks agreed on."""
        return self.layout.differs()

    def new_parameters(self) -> list[torch.Tensor]:
        """Parameters that require a gradient by now and are no members."""
        if not self.layout.differs():
            return []
        members = {id(parameter) for parameter in self.parameters}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in members]

    def relayout(self) -> None:
        """Take layers that were unfrozen, frozen, added or replaced for what they are now; every rank calls it.

        Raises:
            MismatchError: models that differ in more than values.
        """
        self._take_members()
        Layout.compare(self.layout, self.collectives)

    def trained(self) -> tuple[list[str], list[str]]:
        """Names of the members, and of the parameters that require a gradient now."""
        needs = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        return [row[0] for row in self.layout.parameters if row[4]], needs

    def follow(self, trained: tuple[Sequence[str], Sequence[str]], *, is_new: bool) -> bool:
        """Have the members of another rank's `trained`; whether they were others before.

        Args:
            trained: the other rank's.
            is_new: this rank comes to those who may have frozen or unfrozen layers before: it does the same.
        """
        members, needs = trained
        if is_new:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad != (name in needs):
                    parameter.requires_grad_(name in needs)
        differs = self.trained()[0] != members
        if differs or self.layout.differs():
            self._take_members(members)
        return differs

    # ---- what is no member: frozen parameters and buffers

    def rests(self) -> dict[str, torch.Tensor]:
        """Every tensor of the model that is no member, by name."""
        return self._frozen() | {name: buffer for name, buffer in self.model.named_buffers() if movable(buffer)}

    def remember_rests(self) -> None:
        """The ranks are one in these: what differs from now on has moved."""
        self._rests = {name: fingerprint(tensor) for name, tensor in self.rests().items()}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint: which parameters are members, and what the rest was when the ranks were last one."""
        return {"trained": [row[0] for row in self.layout.parameters if row[4]], "rests": dict(self._rests)}

    def load_state_dict(self, state: Mapping[str, Any]) -> bool:
        """Go on from a checkpoint, once the model is loaded; whether there are other members now."""
        self._rests = dict(state["rests"])
        if state["trained"] == [row[0] for row in self.layout.parameters if row[4]]:
            return False
        self._take_members(state["trained"])
        return True

    def sample(self, number: int) -> tuple[float, float]:
        """A signed sum and the norm of every 61st value of the parameters; `number` says from which on.

        Replicas that are one have the same, but for their last digits where their processors differ.
        """
        total = norm = 0.0
        for flat in self.flat_parameters.adopt():
            some = flat[number % SAMPLED :: SAMPLED].double()
            signs = torch.ones_like(some)
            signs[::3] = -1
            total, norm = total + float(torch.dot(some, signs)), norm + float(torch.dot(some, some))
        return total, norm**0.5

    def are_equal(self) -> bool:
        """Whether all ranks have the same parameters, bit for bit; every rank calls it."""
        mine = [float(fingerprint(flat)) for flat in self.flat_parameters.adopt()]
        most = self.collectives.most_numbers([*mine, *(-value for value in mine)])
        return most[: len(mine)] == [-value for value in most[len(mine) :]]

    def moved(self, *, buffers: bool) -> list[str]:
        """Names of frozen parameters, and of buffers, that have moved since the ranks were last one."""
        rests = self.rests() if buffers else self._frozen()
        return sorted(name for name, tensor in rests.items() if fingerprint(tensor) != self._rests.get(name))

    def moved_layout(self, *, buffers: bool) -> int:
        """Fingerprint of which have moved, with their shapes and types."""
        moved, rests = self.moved(buffers=buffers), self.rests()
        return zlib.crc32(repr([(name, rests[name].shape, rests[name].dtype) for name in moved]).encode())

    def average_moved(self, weight: float, *, buffers: bool) -> None:
        """Average what has moved, weighted by this rank's share; the same tensors on every rank.

        Means of floating-point tensors, the largest of counters, rank 0's bytes of anything else.
        """
        names = self.moved(buffers=buffers)
        self._mean_rests(names, weight)
        rests = self.rests()
        self._rests |= {name: fingerprint(rests[name]) for name in names}

    def unite(self, *, buffers: bool) -> None:
        """Average whatever differs between ranks of frozen parameters and buffers, with equal weights.

        Every rank calls it. Tensors whose shapes or types differ are left alone.
        """
        self._mean_rests(self._differing(buffers=buffers), 1 / self.collectives.size)
        self.remember_rests()

    def frozen(self) -> list[torch.Tensor]:
        """Parameters that are no members."""
        return list(self._frozen().values())

    def _frozen(self) -> dict[str, torch.Tensor]:
        """Parameters that are no members, by name."""
        if len(self.parameters) == len(self.layout.parameters) and not self.layout.differs():
            return {}
        members = {id(parameter) for parameter in self.parameters}
        return {name: p for name, p in self.model.named_parameters() if id(p) not in members and movable(p)}

    def _mean_rests(self, names: Sequence[str], weight: float) -> None:
        rests = self.rests()
        chosen = [rests[name].data for name in names]
        mean_values(self.collectives, [tensor for tensor in chosen if _is_float(tensor)], weight)
        self.collectives.max_([tensor for tensor in chosen if _counts(tensor)])
        self._give([tensor for tensor in chosen if not _is_float(tensor) and not _counts(tensor)])

    def _give(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every rank rank 0's values of these, as bytes."""
        packed = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
        self.collectives.broadcast_(packed)
        for tensor, got in zip(tensors, packed, strict=True):
            tensor.copy_(got.view(tensor.dtype).view(tensor.shape))

    def _differing(self, *, buffers: bool = True) -> list[str]:
        """Names of what is no member and not the same on all ranks, though of one shape and type."""
        rests = self.rests() if buffers else self._frozen()
        mine = {name: (tuple(t.shape), str(t.dtype), fingerprint(t)) for name, t in rests.items()}
        everyone = self.collectives.gather_objects(mine) if self.collectives.size > 1 else [mine]
        return [
            name
            for name, (shape, kind, _) in everyone[0].items()
            if all(theirs.get(name, ())[:2] == (shape, kind) for theirs in everyone)
            and len({theirs[name][2] for theirs in everyone}) > 1
        ]

    # ---- optimizer state

    def average_state(self) -> None:
        """Make the optimizer state the same on every rank: means of float tensors, the largest of numbers.

        State that holds anything else (codes of eight-bit optimizers, lists of tensors) is rank 0's on every rank.
        """
        everyone = self.collectives.gather_objects(_numbers(self.optimizer))
        if any(numbers is None for numbers in everyone):
            self._give_state()
            return
        mean_values(self.collectives, [*self.shared_state().values()], 1 / self.collectives.size)
        parameters = dict(self._stepped())
        for place in {place for numbers in everyone for place in numbers}:
            index, key = place
            most, state = max(n[place] for n in everyone if place in n), self.optimizer.state[parameters[index]]
            if torch.is_tensor(state.get(key)):
                state[key].fill_(most)
            else:
                state[key] = most

    def _give_state(self) -> None:
        """Give every rank rank 0's optimizer state."""
        via = self.collectives
        self.take_whole_state(via.gather_objects(self.whole_state() if via.rank == 0 else None)[0])

    def whole_state(self) -> dict[int, Any]:
        """The optimizer's state in memory of the host, by the parameter's number."""
        return {i: _to(self.optimizer.state.get(p, {}), "cpu") for i, p in self._stepped()}

    def take_whole_state(self, theirs: Mapping[int, Any]) -> None:
        """Go on with another rank's `whole_state`."""
        self._state_layout = (-1, 0)
        for index, parameter in self._stepped():
            devices = {
                key: value.device.type
                for key, value in self.optimizer.state.get(parameter, {}).items()
                if torch.is_tensor(value)
            }
            self.optimizer.state[parameter] = {
                key: _to(value, "cpu" if devices.get(key) == "cpu" else parameter.device)
                for key, value in theirs[index].items()
            }

    def whole_optimizer(self) -> tuple[dict[int, Any], list[dict[str, Any]]]:
        """The optimizer's state, and the settings of its groups."""
        groups = self.optimizer.param_groups
        return self.whole_state(), [{n: _to(each, "cpu") for n, each in g.items() if n != "params"} for g in groups]

    def take_whole_optimizer(
        self, state: Mapping[int, Any], settings: Sequence[Mapping[str, Any]], *, settings_too: bool
    ) -> None:
        """Go on with another rank's `whole_optimizer`, or with its state alone."""
        self.take_whole_state(state)
        if settings_too:
            for group, theirs in zip(self.optimizer.param_groups, settings, strict=True):
                group.update(theirs)

    def state_layout(self) -> int:
        """Fingerprint of which optimizer state this rank has; 0 where its state is not averaged."""
        if not self._asks_state:
            return 0
        count = sum(len(values) for values in self.optimizer.state.values())
        if count != self._state_layout[0]:
            self._state_layout = count, zlib.crc32(repr(self._described(self._state())).encode())
        return self._state_layout[1]

    def state(self) -> dict[Place, torch.Tensor]:
        """The optimizer's float tensors, in an order that ranks of one `state_layout` share."""
        return dict(sorted(self._state().items()))

    def correct_state(
        self, means: Mapping[Place, torch.Tensor], snapshots: Mapping[Place, torch.Tensor], steps: int
    ) -> None:
        """Take the average of the optimizer's states as they were `steps` local steps ago, and keep what each has
        learned since: what the average differs by from this rank's snapshot has decayed as that has."""
        state, groups = self._state(), self.optimizer.param_groups
        group_of = [group for group in groups for _ in group["params"]]
        for (index, key), mean in means.items():
            if (index, key) not in state:
                continue  # the state was dropped since
            live = state[index, key]
            if steps == 0:
                live.copy_(mean)  # bit for bit the same on every rank
            else:
                differs = (mean - snapshots[index, key]).to(live.device)
                live.add_(differs, alpha=_kept(group_of[index], key) ** steps)

    def reset_state(self) -> None:
        """Drop the optimizer's state: it begins anew with its next step."""
        self.optimizer.state.clear()
        self._state_layout = (-1, 0)

    def _state(self) -> dict[Place, torch.Tensor]:
        return {
            (index, key): value
            for index, parameter in self._stepped()
            if not _is_coded(self.optimizer.state.get(parameter, {}))
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items())
            if isinstance(value, torch.Tensor) and _is_float(value)
        }

    def _described(self, state: dict[Place, torch.Tensor]) -> dict[Place, Any]:
        return {place: (tuple(value.shape), str(value.dtype), value.device.type) for place, value in state.items()}

    def shared_state(self) -> dict[Place, torch.Tensor]:
        """The optimizer's float tensors, made the same places in the same order on every rank.

        A rank that skipped its steps or whose data left a parameter unused may lack what another has; it then joins
        in with zeros, which is what the optimizer would have begun with.
        """
        mine = self._state()
        parameters = dict(self._stepped())
        for theirs in self.collectives.gather_objects(self._described(mine)):
            for (index, key), (shape, dtype, device) in theirs.items():
                if (index, key) not in mine:
                    where = "cpu" if device == "cpu" else self.collectives.world.device
                    zeros = torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=where)
                    self.optimizer.state[parameters[index]][key] = mine[index, key] = zeros
        return dict(sorted(mine.items()))

    def _stepped(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Parameters with their number in the optimizer's groups."""
        return enumerate(parameter for group in self.optimizer.param_groups for parameter in group["params"])


def mean_values(via: Collectives, tensors: Sequence[torch.Tensor], weight: float) -> None:
    """Replace tensors of any floating type by their means over the ranks; `weight` is this rank's share.

    A rank's tensor that is not finite takes no part; where no rank's is, each keeps its own. Halves are summed in
    float32, since a backend's own sum would round at every hop.
    """
    if via.size == 1 or not tensors:
        return
    flat = [real_view(tensor) for tensor in tensors]
    finite = [bool(torch.isfinite(part).all()) for part in flat]
    shares = via.sum_numbers([*(weight * fits for fits in finite), *map(float, finite)])
    wide = [part.float() if part.dtype in HALVES else part.clone() for part in flat]
    for part, fits in zip(wide, finite, strict=True):
        if not fits:
            part.zero_()
    via.mean_(wide, weight)
    for part, mean, share, count in zip(flat, wide, shares, shares[len(flat) :], strict=False):
        if share > 0:
            part.copy_(mean if count == via.size else mean / share)


HALVES = (torch.float16, torch.bfloat16)
SAMPLED = 61
"""Of so many values one is compared, another at each observation."""


def _numbers(optimizer: Optimizer) -> dict[Place, float] | None:
    """The numbers in an optimizer's state, by place; None where it holds more than numbers and float tensors."""
    found: dict[Place, float] = {}
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for index, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        if _is_coded(state):
            return None
        found |= {
            (index, key): float(value) if torch.is_tensor(value) else value
            for key, value in state.items()
            if _is_number(value)
        }
    return found


def _is_coded(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state holds more than numbers and float tensors, so that its parts have no mean."""
    return any(
        value is not None and not _is_number(value) and not (isinstance(value, torch.Tensor) and _is_float(value))
        for value in state.values()
    )


def _is_number(value: Any) -> bool:
    """A Python number, or a whole one in a tensor: a count of steps."""
    return isinstance(value, int | float) or (torch.is_tensor(value) and _counts(value) and value.numel() == 1)


def _to(state: Any, device: Any) -> Any:
    """Optimizer state moved to a device."""
    return tree_map(lambda leaf: leaf.detach().to(device) if torch.is_tensor(leaf) else leaf, state)


def _kept(group: Mapping[str, Any], name: str) -> float:
    """The share that one step of torch's optimizers keeps of a value of this name; 1 of one that only grows, and of
    another optimizer's."""
    first, second = group.get("betas", (1.0, 1.0))[:2]
    decay = group.get("alpha", group.get("rho", 1.0))  # of RMSprop; of Adadelta
    kept = {
        "momentum_buffer": group.get("momentum", 1.0),
        "exp_avg": first,
        "exp_avg_sq": second,
        "exp_inf": second,
        "square_avg": decay,
        "grad_avg": decay,
        "acc_delta": decay,
    }
    return float(kept.get(name, 1.0))


def _is_float(tensor: torch.Tensor) -> bool:
    """Of a type whose mean can be taken."""
    return tensor.is_complex() or tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _counts(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
