"""One rank's replica: its parameters, optimizer state and buffers, and how each becomes one on all ranks."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.distributed.collectives import Collectives
from trainer.errors import ConfigError
from trainer.wire.flat import FlatTensors

Place = tuple[int, str]  # a parameter's number in the optimizer, and the name of its state


class Replica:
    """A model and its optimizer on this rank, its parameters and statistics in flat buffers.

    Trained parameters are averaged whether or not they have a gradient; frozen ones are the same from the start.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, collectives: Collectives) -> None:
        self.model = model
        self.optimizer = optimizer
        self.collectives = collectives
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ConfigError("model has no trainable parameter: set requires_grad before it is wrapped")
        self.flat_parameters = FlatTensors(lambda: self.parameters)
        self.flat_buffers = FlatTensors(lambda: (b for b in model.buffers() if b.is_floating_point()))

    def make_one(self) -> None:
        """Give every rank rank 0's model."""
        others = [parameter.data for parameter in self.model.parameters() if not parameter.requires_grad]
        others += [buffer for buffer in self.model.buffers() if not buffer.is_floating_point()]
        flat = self.flat_parameters.adopt() + self.flat_buffers.adopt()
        self.collectives.broadcast_([*flat, *(tensor for tensor in others if tensor.numel())])

    def average_state(self) -> None:
        """Make the optimizer state the same on every rank."""
        self.collectives.mean_([*self.shared_state().values()], 1 / self.collectives.size)

    def layout_digest(self) -> int:
        """Fingerprint of which optimizer state this rank has."""
        return zlib.crc32(repr(self._layout(self._state())).encode())

    def average_buffers(self) -> None:
        """Make the buffers the same on every rank: means of statistics, the largest of counters."""
        self.collectives.mean_(self.flat_buffers.adopt(), 1 / self.collectives.size)
        self.collectives.max_([buffer for buffer in self.model.buffers() if _counts(buffer)])

    def without_gradient(self) -> bool:
        """Whether the last backward pass left a trained parameter out."""
        return any(parameter.grad is None for parameter in self.parameters)

    def state(self) -> dict[Place, torch.Tensor]:
        """The optimizer's float tensors, in an order that ranks of one `layout_digest` share."""
        return dict(sorted(self._state().items()))

    def correct_state(
        self, means: Mapping[Place, torch.Tensor], snapshots: Mapping[Place, torch.Tensor], steps: int
    ) -> None:
        """Take the average of the optimizer's states as they were `steps` local steps ago, and keep what each has
        learned since: what the average differs by from this rank's snapshot has decayed as that has."""
        state, groups = self._state(), self.optimizer.param_groups
        group_of = [group for group in groups for _ in group["params"]]
        for (index, key), mean in means.items():
            live = state[index, key]
            if steps == 0:
                live.copy_(mean)  # bit for bit the same on every rank
            else:
                differs = (mean - snapshots[index, key]).to(live.device)
                live.add_(differs, alpha=_kept(group_of[index], key) ** steps)

    def _state(self) -> dict[Place, torch.Tensor]:
        return {
            (index, key): value
            for index, parameter in self._stepped()
            for key, value in sorted(self.optimizer.state.get(parameter, {}).items())
            if isinstance(value, torch.Tensor) and value.is_floating_point()
        }

    def _layout(self, state: dict[Place, torch.Tensor]) -> dict[Place, Any]:
        return {place: (tuple(value.shape), str(value.dtype), value.device.type) for place, value in state.items()}

    def shared_state(self) -> dict[Place, torch.Tensor]:
        """The optimizer's float tensors, made the same places in the same order on every rank.

        A rank that skipped its steps or whose data left a parameter unused may lack what another has; it then joins
        in with zeros, which is what the optimizer would have begun with.
        """
        mine = self._state()
        parameters = dict(self._stepped())
        for theirs in self.collectives.gather_objects(self._layout(mine)):
            for (index, key), (shape, dtype, device) in theirs.items():
                if (index, key) not in mine:
                    where = "cpu" if device == "cpu" else self.collectives.world.device
                    zeros = torch.zeros(shape, dtype=getattr(torch, dtype.removeprefix("torch.")), device=where)
                    self.optimizer.state[parameters[index]][key] = mine[index, key] = zeros
        return dict(sorted(mine.items()))

    def _stepped(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Parameters with their number in the optimizer's groups."""
        return enumerate(parameter for group in self.optimizer.param_groups for parameter in group["params"])


def _kept(group: Mapping[str, Any], name: str) -> float:
    """What one step of torch's optimizers keeps of a value of this name; of one that only grows, or of another
    optimizer's, all."""
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


def _counts(buffer: torch.Tensor) -> bool:
    return not buffer.is_floating_point() and buffer.dtype != torch.bool
