"""What devices change beside trained parameters: statistics, counters, flags, and layers unfrozen just now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainer.distributed.collectives import Collectives
from trainer.errors import ConfigError
from trainer.sync.layout import movable
from trainer.sync.replica import Replica
from trainer.wire.flat import real_view

Named = dict[str, torch.Tensor]


class Rests:
    """Gives each device of a round the same buffers to begin from, and takes what the devices make of them.

    Numbers with fractions move as parameters do. Of whole numbers the largest is kept, and a flag is set once a device
    has set it.

    Args:
        replica: what is trained.
        via: collectives of all ranks.
        recalibrates: buffers are recalibrated, so that devices' own are dropped.
        mixes: devices send their values, not what they moved by (fedasync).
    """

    def __init__(self, replica: Replica, via: Collectives, *, recalibrates: bool, mixes: bool) -> None:
        self._replica, self._via, self._recalibrates, self._mixes = replica, via, recalibrates, mixes
        self._start: Named = {}
        self._sums: Named = {}
        self._weights: dict[str, tuple[float, float]] = {}
        """Of each: the weights of the devices that are in its sum, and the same times their scales."""

    def begin_round(self) -> None:
        """Devices begin from what there is now."""
        self._start = {name: tensor.clone() for name, tensor in self._live().items()}
        taken = {} if self._recalibrates else dict(self._start)
        taken |= {name: self._start[name] for name in self.unfrozen() if name in self._start}
        self._sums = {name: _nothing(tensor) for name, tensor in taken.items()}
        self._weights = dict.fromkeys(taken, (0.0, 0.0))

    def restore(self) -> None:
        """Begin anew."""
        for name, tensor in self._known().items():
            if tensor.shape == self._start[name].shape:
                tensor.copy_(self._start[name])

    def taken(self) -> Named:
        """What the device that ends now has made of them.

        Raises:
            ConfigError: a buffer that has another shape or type by now.
        """
        found = {}
        self._require_shapes()
        for name, tensor in self._known().items():
            if name in self._sums:
                kind, moved = self._sums[name].dtype, _is_float(tensor) and not self._mixes
                found[name] = tensor.to(kind) - self._start[name] if moved else tensor.to(kind, copy=True)
        return found

    def add(self, taken: Named, weight: float, scale: float) -> None:
        """Hear a device. Of what is not finite nothing is added."""
        for name, tensor in taken.items():
            summed = self._sums.get(name)
            if summed is None or summed.shape != tensor.shape:
                continue
            if not _is_float(tensor):
                torch.maximum(summed, tensor, out=summed)
            elif bool(torch.isfinite(real_view(tensor)).all()):
                summed.add_(tensor, alpha=weight * scale)
                weights, scaled = self._weights[name]
                self._weights[name] = weights + weight, scaled + weight * scale

    def mean(self, weight: float) -> None:
        """Take the devices' mean on every rank, where devices were heard; every rank calls it, with the sum of its
        devices' weights."""
        names = sorted(self._sums)
        if not names:
            return
        numbers = [number for name in names for number in self._weights[name]]
        total, *shared = self._via.sum_numbers([weight, *numbers])
        if not total:
            return
        floats = [name for name in names if _is_float(self._sums[name])]
        flags = {name: self._sums[name].byte() for name in names if self._sums[name].dtype == torch.bool}
        counts = [flags.get(name, self._sums[name]) for name in names if name not in floats]
        self._via.mean_([real_view(self._sums[name]) for name in floats], 1.0)  # a sum
        self._via.max_(counts)
        live = self._known()
        for name, weights, scaled in zip(names, shared[::2], shared[1::2], strict=True):
            if name not in live:
                continue
            if name not in floats:
                live[name].copy_(flags.get(name, self._sums[name]))
            elif weights:
                kept = 1 - scaled / weights if self._mixes else 1.0
                live[name].copy_(self._start[name] * kept + self._sums[name] / weights)

    def _live(self) -> Named:
        buffers = {name: buffer.data for name, buffer in self._replica.model.named_buffers() if movable(buffer)}
        return buffers | self.unfrozen()

    def unfrozen(self) -> Named:
        """Parameters that require a gradient by now, of which the ranks have not agreed yet that they are trained."""
        new = {id(parameter) for parameter in self._replica.new_parameters()}
        if not new:
            return {}
        return {name: p.data for name, p in self._replica.model.named_parameters() if id(p) in new and movable(p)}

    def _known(self) -> Named:
        """Those that were there when the round began, as they are now."""
        return {name: tensor for name, tensor in self._live().items() if name in self._start}

    def _require_shapes(self) -> None:
        for name, tensor in self._known().items():
            before = self._start[name]
            if tensor.shape != before.shape or tensor.dtype != before.dtype:
                raise ConfigError(
                    f"buffer {name!r} was {_said(before)} and is {_said(tensor)}: every device begins from the buffers "
                    "of the round's first model; keep their shapes and types"
                )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint in the middle of a round."""
        return {"start": self._start, "sums": self._sums, "weights": {k: list(v) for k, v in self._weights.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, once the model is loaded."""
        live = self._live()
        self._start = {name: saved.to(live[name]) for name, saved in state["start"].items()}
        self._sums = {name: saved.to(live[name].device) for name, saved in state["sums"].items()}
        self._weights = {name: (weights, scaled) for name, (weights, scaled) in state["weights"].items()}


def _is_float(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _nothing(tensor: torch.Tensor) -> torch.Tensor:
    """What a sum, or a largest value, begins from."""
    if _is_float(tensor):
        return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
    if tensor.dtype == torch.bool:
        return torch.zeros_like(tensor)
    return torch.full_like(tensor, torch.iinfo(tensor.dtype).min)


def _said(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
