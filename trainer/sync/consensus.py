"""The consensus model: what replicas are evaluated as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.config.sync import BatchNormPolicy
from trainer.sync.replica import Replica
from trainer.sync.timetable import Timetable


@contextmanager
def consensus_model(
    replica: Replica, timetable: Timetable, batch_norm: BatchNormPolicy, calibration: Iterable[torch.Tensor]
) -> Iterator[nn.Module]:
    """The model in evaluation mode, one on every rank inside the block; replicas that are apart are so again after it.

    Args:
        replica: this rank's, between two rounds.
        timetable: which knows whether replicas are one, and makes them so.
        batch_norm: what becomes of floating-point buffers; with `keep`, each rank has its own again after the block.
        calibration: inputs of this rank for `recalibrate`.
    """
    apart = [] if timetable.are_one else replica.flat_parameters.adopt()
    own = [flat.clone() for flat in apart]
    timetable.make_one()
    kept = replica.flat_buffers.adopt() if batch_norm == "keep" else []
    own += [flat.clone() for flat in kept]
    model = replica.model
    if batch_norm == "recalibrate":
        recalibrate(model, calibration)
    replica.average_buffers()
    training = model.training
    model.eval()
    try:
        yield model
    finally:
        model.train(training)
        for live, value in zip([*apart, *kept], own, strict=True):
            live.copy_(value)
        timetable.are_one = not apart


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[torch.Tensor]) -> int:
    """Recompute BatchNorm statistics as the mean over `batches` (inputs), as SWAP does after averaging.

    Returns:
        The samples seen; the statistics of a model without BatchNorm, and a call without batches, change nothing.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return 0
    momenta, training, seen = [norm.momentum for norm in norms], model.training, 0
    model.eval()
    for norm in norms:
        norm.train()
    for inputs in batches:
        if seen == 0:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over the batches
        model(inputs)
        seen += len(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)
    return seen
