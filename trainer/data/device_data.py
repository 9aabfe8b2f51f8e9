"""Reading devices' samples: batches of chosen places, one a local step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainer.config.config import DataConfig
from trainer.data.nested import put
from trainer.data.partition import Indices
from trainer.data.reading import Collate, Failed, as_it_is, dead_worker, mixed_seed, read_batch
from trainer.data.sets import DataPart
from trainer.data.transform import Transform


class Request(NamedTuple):
    """A batch to be read."""

    places: Indices
    """Of its samples in the data set."""
    seed: tuple[int, ...]
    """By which the data set's own transforms draw."""


class DeviceData(Protocol):
    """Reads batches on request."""

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        """A batch for each request, on the model's device."""


class DeviceItems:
    """A map-style data set of a user's own. Reading processes stay from round to round.

    Args:
        items: the data set.
        device: the model's.
        collate: makes a batch of a list of items; None: torch's own.
        workers: reading processes; 0 reads in this one.
    """

    def __init__(self, items: Any, device: torch.device, collate: Collate | None = None, workers: int = 0) -> None:
        self.items, self._device, self._collate = items, device, collate
        plain = collate is None and type(items) is TensorDataset
        self._workers = 0 if plain else workers  # tensors are picked sooner than they are passed on
        self._loader: DataLoader[Any] | None = None
        self._asked = _Asked()

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        """A batch for each request; what cannot be read raises DataError."""
        if not self._workers:
            for request in requests:
                yield self._taken(_read(self.items, request, self._collate))
            return
        self._asked.requests = [*requests]
        if self._loader is None:
            self._loader = self._open()
        batches = iter(self._loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise dead_worker(error) from error
            yield self._taken(batch)

    def _open(self) -> DataLoader[Any]:
        return DataLoader(
            _Requested(self.items, self._collate),  # type: ignore[arg-type]  # map-style by __getitem__
            batch_size=None,
            sampler=self._asked,
            num_workers=self._workers,
            persistent_workers=True,
            collate_fn=as_it_is,
            generator=torch.Generator(),
        )

    def _taken(self, batch: Any) -> Any:
        if isinstance(batch, Failed):
            raise batch.error()
        return put(batch, self._device)

    def close(self) -> None:
        """End reading processes."""
        self._loader = None


class _Asked(torch.utils.data.Sampler[Request]):
    """What is to be read in the present round."""

    def __init__(self) -> None:
        self.requests: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


@dataclass
class _Requested:
    items: Any
    collate: Collate | None

    def __getitem__(self, request: Request) -> Any:
        return _read(self.items, request, self.collate)


def _read(items: Any, request: Request, collate: Collate | None) -> Any:
    return read_batch(items, request.places, mixed_seed(11, *request.seed), collate)


class DevicePictures:
    """The trainer's own data: held on the device as it is stored where that is asked for, and transformed there."""

    def __init__(self, part: DataPart, config: DataConfig, device: torch.device) -> None:
        self.transform = Transform.of(part, config, device, train=True)
        self._tensors: list[torch.Tensor] = []
        self._items = DeviceItems(part.items, device, None, config.workers)
        if isinstance(part.items, TensorDataset):
            where = device if config.on_device else torch.device("cpu")
            self._tensors = [tensor.to(where) for tensor in part.items.tensors]
        self._device = device

    def read(self, requests: Iterable[Request]) -> Iterator[Any]:
        """Inputs [count, ...] ready for the model, labels [count]."""
        asked = list(requests)
        if not self._tensors:
            for request, (inputs, labels) in zip(asked, self._items.read(asked), strict=True):
                yield self.transform(inputs, seed=request.seed), labels
            return
        for request in asked:
            inputs, labels = self.at(request.places)
            yield self.transform(inputs, seed=request.seed), labels

    def at(self, places: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels at these places, as they are stored."""
        if not self._tensors:
            inputs, labels = next(self._items.read([Request(places, (0,))]))
            return inputs, labels
        chosen = torch.from_numpy(places).to(self._tensors[0].device)
        inputs, labels = (tensor[chosen].to(self._device) for tensor in self._tensors[:2])
        return inputs, labels

    consumed = 0
    """Nothing to remember: what a device reads follows from the round."""

    def seek(self, consumed: int) -> None:
        """Nothing to go to."""

    def close(self) -> None:
        """End reading processes."""
        self._items.close()

    def sample_inputs(self, count: int, batch: int) -> Iterator[torch.Tensor]:
        """The first `count` inputs, without augmentation, for calibration."""
        length = len(self._tensors[0]) if self._tensors else len(self._items.items)
        for start in range(0, min(count, length), batch):
            yield self.transform(self.at(np.arange(start, min(start + batch, count, length)))[0])
