"""Period 1: gradients averaged during the backward pass, by DDP with a communication hook."""

# Annotations are evaluated in this file: DDP checks those of its communication hook.

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # compiled, and not listed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from trainer.config.sync import GradientFormat
from trainer.distributed.collectives import Collectives
from trainer.sync.gradient_notes import GradientNotes

POWERSGD_RANK = 2
POWERSGD_FROM_STEP = 10  # DDP's buckets change after its first step, and early gradients compress badly


class GradientAverage:
    """DDP round a model, put on and taken off: its buckets are a gradient's worth of memory."""

    def __init__(self, model: nn.Module, gradient_format: GradientFormat) -> None:
        self.model = model
        self.gradient_format = gradient_format
        self._notes: GradientNotes | None = None
        self._via: Collectives | None = None
        self._parallel: DistributedDataParallel | None = None
        self._powersgd: PowerSGDState | None = None
        self._numbers = {id(parameter): number for number, parameter in enumerate(model.parameters())}
        self._owed: dict[int, torch.Tensor] = {}
        """What compression lost of gradients (flat, by the parameter's number) and no wrapper has made good yet."""
        self._buckets: dict[int, list[torch.Tensor]] = {}
        self._weight: float | None = None

    def set_weight(self, weight: float | None) -> None:
        """The weight of this rank's gradient in the mean over the ranks, whose weights sum to 1; None: 1 / ranks."""
        self._weight = weight

    @property
    def on(self) -> bool:
        """Whether gradients are averaged now."""
        return self._parallel is not None

    @property
    def module(self) -> nn.Module:
        """What to call in the forward pass."""
        return self._parallel or self.model

    @property
    def collectives(self) -> Collectives:
        """Of the ranks that gradients are averaged over."""
        assert self._via is not None
        return self._via

    def put_on(self, via: Collectives | None, notes: GradientNotes | None = None, *, find_unused: bool) -> None:
        """Wrap the model afresh, to average gradients over these ranks; None takes the wrapper off.

        `notes` is shown every bucket before and after its average.

        A fresh wrapper begins with the same buckets, and a compressor with nothing but what it owes, wherever it is
        made; so a run that rewraps at a checkpoint goes on bit for bit as one that is resumed from it.
        """
        owed = self._all_owed()
        self.take_off()
        self._owed = owed if via is not None else {}  # a local phase leaves old gradients behind
        if via is None or via.size == 1:
            return
        self._via, self._notes = via, notes
        with warnings.catch_warnings():
            # the name that every torch since 2.10 knows, and the only one that syncs no buffer here
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self._parallel = DistributedDataParallel(
                self.model,
                process_group=via.group,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=find_unused,
                init_sync=False,
            )
        if self.gradient_format == "powersgd":
            self._powersgd = PowerSGDState(
                via.group,
                matrix_approximation_rank=POWERSGD_RANK,
                start_powerSGD_iter=POWERSGD_FROM_STEP,
                orthogonalization_epsilon=1e-8,
            )
        self._parallel.register_comm_hook(None, self._hook)

    def forget(self) -> None:
        """A step was skipped, whose gradients were not finite on some rank: what is kept of them is of no use."""
        if self._powersgd is not None:
            for kept in (self._powersgd.error_dict, self._powersgd.p_memory_dict, self._powersgd.q_memory_dict):
                kept.clear()

    def take_off(self) -> None:
        """Unwrap the model."""
        self._parallel = self._powersgd = self._via = self._notes = None
        self._buckets = {}

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients stay on this rank."""
        return self._parallel.no_sync() if self._parallel is not None else nullcontext()

    def _hook(self, _: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The average of a bucket, with its bytes counted and the end of the compute noted."""
        via = self.collectives
        notes = self._notes
        own = notes.bucket(bucket.buffer()) if notes is not None and self._weight is None else None
        self._weigh(bucket.buffer(), via.size)
        if bucket.is_last():
            via.begin_overlap()
        with via.world.collective("averaging gradients"):
            if self.gradient_format == "bf16":
                via.count_ring(bucket.buffer().numel() * 2)
                future = bf16_compress_hook(via.group, bucket)  # type: ignore[arg-type]  # None is all ranks there too
            elif self._powersgd is not None:
                before = self._powersgd.total_numel_after_compression
                compressed = self._powersgd.iter >= POWERSGD_FROM_STEP
                if compressed:
                    own = None  # what the mean lost would pass for noise
                    self._hand_over(self._powersgd, bucket)
                future = powerSGD_hook(self._powersgd, bucket)
                # its later collectives begin when its earlier ones end, on Gloo's own threads: with two buckets under
                # way each rank would begin them in an order of its own
                future.wait()
                sent = self._powersgd.total_numel_after_compression - before if compressed else bucket.buffer().numel()
                via.count_ring(sent * bucket.buffer().element_size())
            else:
                via.count_ring(bucket.buffer().nbytes)
                buffer = bucket.buffer().div_(via.size)
                future = dist.all_reduce(buffer, group=via.group, async_op=True).get_future().then(_first)

        def checked(averaged: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
            with via.world.collective("averaging gradients"):
                mean = averaged.value()
            if notes is not None and own is not None:
                notes.averaged(own, mean)
            return mean

        return future.then(checked)

    def _weigh(self, gradient: torch.Tensor, ranks: int) -> None:
        """Make up for the division by `ranks` that follows, so that this rank has the weight that was set."""
        if self._weight == 0:
            gradient.zero_()  # 0 times NaN would be NaN
        elif self._weight is not None:
            gradient.mul_(self._weight * ranks)

    def _hand_over(self, powersgd: PowerSGDState, bucket: GradBucket) -> None:
        """Let the compressor make good what one before it owed of this bucket, as it first compresses it."""
        if bucket.index() in self._buckets:
            return
        parameters = self._buckets[bucket.index()] = bucket.parameters()
        owed = [self._owed.pop(self._numbers[id(parameter)], None) for parameter in parameters]
        if any(part is not None for part in owed):
            zeros = (parameter.new_zeros(parameter.numel()) for parameter in parameters)
            powersgd.error_dict[bucket.index()] = torch.cat(
                [zero if part is None else part for part, zero in zip(owed, zeros, strict=True)]
            )

    def _all_owed(self) -> dict[int, torch.Tensor]:
        """What compression lost of gradients so far, flat, by the parameter's number."""
        owed = dict(self._owed)
        for index, lost in self._powersgd.error_dict.items() if self._powersgd is not None else ():
            parameters = self._buckets[index]
            parts = torch.split(lost, [parameter.numel() for parameter in parameters])
            owed |= {self._numbers[id(each)]: part for each, part in zip(parameters, parts, strict=True)}
        return owed

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"owed": self._all_owed()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; the wrapper is put on afresh after it."""
        self.take_off()
        device = next(self.model.parameters()).device
        self._owed = {number: part.to(device) for number, part in state["owed"].items()}


def _first(reduced: torch.futures.Future[Any]) -> torch.Tensor:
    value: torch.Tensor = reduced.value()[0]
    return value
