"""What corrects drift: terms in a device's gradient, the weight of its displacement, and the control variates that it
keeps between rounds."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from trainer.config.federated import FederatedConfig
from trainer.distributed.collectives import Collectives

Flats = list[torch.Tensor]


def spread(value: float | Flats, buffers: int) -> list[Any]:
    """A number for every flat buffer, where it is one for all."""
    return [value] * buffers if isinstance(value, float) else value


class Reach:
    """How far a device's optimizer would have moved under a constant gradient of one, by parameter group.

    For SGD this is the rate times ‖a‖₁ of FedNova (Wang et al. 2020): a local step's gradient counts once in every
    later step through momentum, and less under a pull towards the beginning. For other optimizers it is the sum of
    their rates.
    """

    def __init__(self, optimizer: Optimizer, pull: float) -> None:
        self._optimizer, self._pull = optimizer, pull
        self.begin()

    def begin(self) -> None:
        """A device begins."""
        groups = len(self._optimizer.param_groups)
        self.begun = False
        self.moved = [0.0] * groups
        self.steps = [0.0] * groups
        """The same in steps, whatever the rate is."""
        self._momentum: list[float | None] = [None] * groups

    def step(self, factor: float) -> None:
        """The optimizer is about to step, with its rates times `factor`."""
        self.begun = True
        for number, group in enumerate(self._optimizer.param_groups):
            step = 1.0 - self._pull * self.moved[number]
            momentum = float(group.get("momentum", 0.0)) if isinstance(self._optimizer, torch.optim.SGD) else 0.0
            if momentum:
                before = self._momentum[number]
                fresh = step if before is None else momentum * before + (1 - float(group["dampening"])) * step
                self._momentum[number] = fresh
                step = step + momentum * fresh if group["nesterov"] else fresh
            self.moved[number] += float(group["lr"]) * factor * step
            self.steps[number] += step

    def state(self) -> list[Any]:
        """For a checkpoint."""
        return [list(self.moved), list(self.steps), list(self._momentum), self.begun]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on from a checkpoint."""
        self.moved, self.steps, self._momentum = (list(each) for each in state[:3])
        self.begun = bool(state[3])


class DeviceStore:
    """Tensors that devices of this rank keep between rounds; zeros at first.

    What a round puts counts once it is kept; until then the tensors before it are there too. Beyond `memory_bytes` all
    lie in a temporary file, which the system reads and writes as it is used.
    """

    def __init__(self, like: Flats, devices: Sequence[int], memory_bytes: int) -> None:
        self._like, self._rows = like, {device: 2 * place for place, device in enumerate(devices)}
        self._held: dict[int, Flats] = {}
        """By row, where there are no files. A device has two rows."""
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: list[Any] = []
        if sum(flat.nbytes for flat in like) * len(devices) > memory_bytes:
            self._folder = tempfile.TemporaryDirectory(prefix="ebbtide-devices-")
            self._files = [
                np.memmap(
                    Path(self._folder.name) / str(number),
                    dtype=np.float64 if flat.dtype == torch.float64 else np.float32,
                    mode="w+",
                    shape=(2 * len(devices), len(flat)),
                )
                for number, flat in enumerate(like)
            ]
        self._kept: dict[int, int] = {}
        """Row of what counts, by device."""
        self._fresh: dict[int, int] = {}
        """Row of what the open round has put."""

    def get(self, device: int) -> Flats:
        """A device's tensors, as they count."""
        row = self._kept.get(device)
        return [torch.zeros_like(flat) for flat in self._like] if row is None else self._read(row)

    def _read(self, row: int) -> Flats:
        if not self._files:
            return self._held[row]
        return [
            torch.from_numpy(np.array(file[row])).to(flat) for file, flat in zip(self._files, self._like, strict=True)
        ]

    def put(self, device: int, flats: Flats) -> None:
        """What a device is to have from the round's end on."""
        first = self._rows[device]
        row = first + 1 if self._kept.get(device) == first else first
        self._fresh[device] = row
        if self._files:
            for file, flat in zip(self._files, flats, strict=True):
                file[row] = flat.cpu().numpy()
        else:
            self._held[row] = flats

    def keep(self) -> None:
        """What the round has put counts from now on."""
        for device, row in self._fresh.items():
            self._held.pop(self._kept.get(device, -1), None)
            self._kept[device] = row
        self._fresh = {}

    def drop(self) -> None:
        """Forget what the round has put."""
        for row in self._fresh.values():
            self._held.pop(row, None)
        self._fresh = {}

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            name: {str(device): self._read(row) for device, row in sorted(rows.items())}
            for name, rows in (("kept", self._kept), ("fresh", self._fresh))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._kept, self._fresh, self._held = {}, {}, {}
        for name in ("kept", "fresh"):
            for device, flats in state[name].items():
                self.put(int(device), [saved.to(flat) for saved, flat in zip(flats, self._like, strict=True)])
            if name == "kept":
                self.keep()


class Drift:
    """The rule of a run on one rank. This one is FedAvg's, which corrects nothing.

    Args:
        config: the rule's constants.
        like: flat buffers of the model's size, in the type that displacements have.
        devices: this rank's.
    """

    pull = 0.0
    """Strength of the pull towards the round's first model."""
    keeps = False
    """Devices keep tensors of the model's size between rounds."""
    normalises = False
    """Displacements are divided by how far a device's optimizer reached, and multiplied by the cohort's mean of it."""

    def __init__(self, config: FederatedConfig, like: Flats, devices: Sequence[int]) -> None:
        self.config = config

    def begin(self, device: int) -> None:
        """A device begins."""

    def terms(self) -> Flats | None:
        """What is added to the device's gradient beside the pull, flat; None: nothing."""
        return None

    def end(self, device: int, share: float, displacement: Flats, reach: Flats | float) -> None:
        """A device ended, this far from the round's first model; `share` is its own in the objective."""

    def gain(self, share: float) -> float:
        """Factor on the mean displacement; the devices that are heard have this share of the objective."""
        return 1.0

    def offset(self) -> Flats | None:
        """What is subtracted from every rank's model before the average, flat; None: nothing."""
        return None

    def end_round(self, mean: Flats, share: float, via: Collectives) -> None:
        """The ranks have one model again, this far from the round's first; every rank calls it."""

    def drop_round(self) -> None:
        """The open round is dropped, with all that its devices did."""

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""


class FedProx(Drift):
    """Gradient + mu (y − x) (Li et al. 2020)."""

    @property
    def pull(self) -> float:  # type: ignore[override]  # a constant of the base
        return self.config.pull


class FedNova(Drift):
    """x − (Σ p_k ‖a_k‖₁) Σ p_k Δ_k / ‖a_k‖₁ (Wang et al. 2020): devices with more local steps pull no harder."""

    normalises = True


class Scaffold(Drift):
    """Gradient + c − c_k; c_k becomes c_k − c + Δ_k / (η ‖a_k‖₁), and c the mean of all c_k (Karimireddy et al. 2020,
    option II, with ‖a_k‖₁ in place of the number of steps so that momentum does not break it)."""

    keeps = True

    def __init__(self, config: FederatedConfig, like: Flats, devices: Sequence[int]) -> None:
        self._common = [torch.zeros_like(flat) for flat in like]
        self._change = [torch.zeros_like(flat) for flat in like]
        self._own = DeviceStore(like, devices, config.state_memory_bytes)
        self._terms: Flats = []

    def begin(self, device: int) -> None:
        self._terms = [c - own for c, own in zip(self._common, self._own.get(device), strict=True)]

    def terms(self) -> Flats:
        return self._terms

    def end(self, device: int, share: float, displacement: Flats, reach: Flats | float) -> None:
        reaches = spread(reach, len(displacement))
        before, fresh = self._own.get(device), []
        for moved, far, term, own, change in zip(displacement, reaches, self._terms, before, self._change, strict=True):
            # the mean gradient: displacements count from x to y, against it
            reached = torch.as_tensor(far, dtype=moved.dtype, device=moved.device)
            own_mean = torch.where(reached != 0, -moved / reached - term, own)  # a rate of zero tells nothing
            change.add_(own_mean - own, alpha=share)
            fresh.append(own_mean)
        self._own.put(device, fresh)

    def end_round(self, mean: Flats, share: float, via: Collectives) -> None:
        via.mean_(self._change, 1.0)  # a sum: shares are of all devices
        for common, change in zip(self._common, self._change, strict=True):
            common.add_(change)
            change.zero_()
        self._own.keep()

    def drop_round(self) -> None:
        for change in self._change:
            change.zero_()
        self._own.drop()

    def state_dict(self) -> dict[str, Any]:
        return {"common": self._common, "change": self._change, "own": self._own.state_dict(), "terms": self._terms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, mine in (("common", self._common), ("change", self._change)):
            for flat, saved in zip(mine, state[name], strict=True):
                flat.copy_(saved)
        self._own.load_state_dict(state["own"])
        self._terms = [saved.to(flat) for saved, flat in zip(state["terms"], self._common, strict=False)]


class FedDyn(Drift):
    """Loss − ⟨h_k, y⟩ + (alpha/2) ‖y − x‖²; h_k becomes h_k − alpha (y_k − x), and x the mean of y_k less h / alpha,
    where h is the mean of all h_k (Acar et al. 2021)."""

    keeps = True

    def __init__(self, config: FederatedConfig, like: Flats, devices: Sequence[int]) -> None:
        self._alpha = config.pull
        self._mean_h = [torch.zeros_like(flat) for flat in like]
        self._own = DeviceStore(like, devices, config.state_memory_bytes)
        self._terms: Flats = []

    @property
    def pull(self) -> float:  # type: ignore[override]  # a constant of the base
        return self._alpha

    def begin(self, device: int) -> None:
        self._terms = [-h for h in self._own.get(device)]

    def terms(self) -> Flats:
        return self._terms

    def end(self, device: int, share: float, displacement: Flats, reach: Flats | float) -> None:
        self._own.put(
            device,
            [torch.sub(-term, moved, alpha=self._alpha) for term, moved in zip(self._terms, displacement, strict=True)],
        )

    def gain(self, share: float) -> float:
        # h falls by alpha share times the mean displacement d before it is subtracted: x + d − h / alpha + share d
        return 1.0 + share

    def offset(self) -> Flats:
        return [h / self._alpha for h in self._mean_h]

    def end_round(self, mean: Flats, share: float, via: Collectives) -> None:
        for h, moved in zip(self._mean_h, mean, strict=True):
            displacement = (moved + h / self._alpha) / (1.0 + share)
            h.sub_(displacement, alpha=self._alpha * share)
        self._own.keep()

    def drop_round(self) -> None:
        self._own.drop()

    def state_dict(self) -> dict[str, Any]:
        return {"mean_h": self._mean_h, "own": self._own.state_dict(), "terms": self._terms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for flat, saved in zip(self._mean_h, state["mean_h"], strict=True):
            flat.copy_(saved)
        self._own.load_state_dict(state["own"])
        self._terms = [saved.to(flat) for saved, flat in zip(state["terms"], self._mean_h, strict=False)]


RULES: dict[str, type[Drift]] = {
    "fedavg": Drift,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fednova": FedNova,
    "feddyn": FedDyn,
    "fedbuff": Drift,
    "fedasync": Drift,
}
