"""The consensus model: what replicas are evaluated as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.config.sync import BatchNormPolicy
from trainer.sync.layout import movable
from trainer.sync.replica import Replica
from trainer.sync.timetable import Timetable


@contextmanager
def consensus_model(
    replica: Replica, timetable: Timetable, batch_norm: BatchNormPolicy, calibration: Iterable[Any]
) -> Iterator[nn.Module]:
    """The model in evaluation mode, one on every rank inside the block; replicas that are apart are so again after it.

    Every module has its own mode again after the block, whatever was raised.

    Args:
        replica: this rank's, between two rounds.
        timetable: which knows whether replicas are one, and makes them so.
        batch_norm: what becomes of floating-point buffers; with `keep`, each rank has its own again after the block.
        calibration: inputs of this rank for `recalibrate`.
    """
    model, apart = replica.model, not timetable.are_one
    modes = [(module, module.training) for module in model.modules()]
    with torch.inference_mode(mode=False), torch.no_grad():
        flats = replica.flat_parameters.adopt() if apart else []
        own = _copies([*flats, *(tensor.data for tensor in replica.frozen() if apart)])
        buffers = _copies([buffer for buffer in model.buffers() if movable(buffer)])
    whole = False
    try:
        with torch.inference_mode(mode=False):
            timetable.make_one()
            if batch_norm == "recalibrate":
                recalibrate(model, calibration)
            replica.unite(buffers=True)
        whole = True
        model.eval()
        yield model
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.inference_mode(mode=False), torch.no_grad():
            _put_back([*own, *(buffers if batch_norm == "keep" or not whole else ())])
        if apart:
            timetable.part_again()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode; every module has its own mode again after the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield model
    finally:
        for module, mode in modes:
            module.training = mode


Copies = list[tuple[torch.Tensor, torch.Tensor]]


def _copies(tensors: Sequence[torch.Tensor]) -> Copies:
    return [(tensor, tensor.clone()) for tensor in tensors]


def _put_back(copies: Copies) -> None:
    for tensor, value in copies:
        tensor.copy_(value)


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Any]) -> int:
    """Recompute BatchNorm statistics as the mean over `batches` (inputs), as SWAP does after averaging.

    Frozen layers keep theirs: those in evaluation mode inside a model in training mode, and those whose weights require
    no gradient.

    Returns:
        The samples seen; the statistics of a model without BatchNorm, and a call without batches, change nothing.
    """
    norms: list[Any] = [module for module in model.modules() if _follows(module, model)]
    if not norms:
        return 0
    momenta, seen = [norm.momentum for norm in norms], 0
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for norm in norms:
            norm.training = True
        for inputs in batches:
            if seen == 0:
                for norm in norms:
                    norm.reset_running_stats()
                    norm.momentum = None  # a plain mean over the batches
            model(inputs)
            seen += len(inputs)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    return seen


def _follows(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module has BatchNorm statistics that training moves."""
    if not isinstance(module, _BatchNorm) or not module.track_running_stats:
        return False
    weights = list(module.parameters(recurse=False))
    frozen = bool(weights) and not any(weight.requires_grad for weight in weights)
    return not frozen and (module.training or not model.training)
