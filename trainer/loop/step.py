"""The forward passes: a local step, and an evaluation (BatchNorm recalibration apart, which trains nothing)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from trainer.config.config import OptimConfig, StepConfig
from trainer.distributed.collectives import Collectives
from trainer.errors import PeerError
from trainer.sync.local_sgd import LocalSGD

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def _peer_errors() -> Iterator[None]:
    """A lost peer comes out of the backward pass as autograd's error, with ours as its text."""
    try:
        yield
    except RuntimeError as error:
        _, ours, said = str(error).partition("PeerError: ")
        if not ours:
            raise
        raise PeerError(said.splitlines()[0]) from error


@dataclass(frozen=True)
class Evaluation:
    """The consensus model on the whole test set."""

    loss: float
    accuracy: float
    samples: int


class Trained(NamedTuple):
    """The result of a local step."""

    loss: torch.Tensor
    """Mean over the batch (0-dim, detached)."""
    skipped: bool
    """No update was made, because a loss or a gradient was not finite."""
    correct: torch.Tensor | None
    """Samples classified correctly before the update (0-dim); None where outputs are not classes."""


class LocalStep:
    """One local step: forward, backward and update, by micro-batches where a batch is too large for one pass."""

    def __init__(self, config: StepConfig, optim: OptimConfig, loss: nn.Module, device: torch.device) -> None:
        self.config = config
        self.loss = loss
        self.device = device
        self.clip_norm = optim.clip_norm
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")

    def __call__(self, sync: LocalSGD, inputs: Any, labels: Any) -> Trained:
        """Train one batch on this rank."""
        sync.optimizer.zero_grad(set_to_none=True)
        count = len(labels)
        micro = min(self.config.max_micro_batch or count, count)
        mean: torch.Tensor | None = None
        right: torch.Tensor | None = None
        for start in range(0, count, micro):
            last = start + micro >= count
            with nullcontext() if last else sync.no_sync():
                part = labels if micro == count else labels[start : start + micro]
                with self.autocast():
                    outputs = sync.model(self.layout(inputs if micro == count else inputs[start : start + micro]))
                    loss = self.loss(outputs, part)
                if outputs.dim() == 2 and part.dim() == 1:
                    found = (outputs.detach().argmax(dim=1) == part).sum()
                    right = found if right is None else right + found
                loss = loss * (len(part) / count) if len(part) < count else loss
                mean = loss.detach().float() if mean is None else mean + loss.detach()
                finite = sync.all_finite(mean) if last else None
                with _peer_errors():
                    self.scaler.scale(loss).backward()
        assert mean is not None
        assert finite is not None
        if not finite() or not self._has_finite_gradients(sync):
            return Trained(mean, True, right)
        self._update(sync)
        return Trained(mean, False, right)

    def autocast(self) -> AbstractContextManager[None]:
        """The forward pass's number format."""
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.config.precision])

    def layout(self, inputs: Any) -> Any:
        """Inputs in the memory layout that the model has."""
        if self.config.channels_last and inputs.dim() == 4:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs

    def _has_finite_gradients(self, sync: LocalSGD) -> bool:
        """Whether an update would leave the parameters finite; at period 1 the same on every rank, as the gradients."""
        if self.scaler.is_enabled():
            return True  # it looks at them itself
        found = (parameter.grad for parameter in sync.replica.parameters if parameter.grad is not None)
        dense = [each if each.layout == torch.strided else each._values() for each in found]
        norms = torch._foreach_norm(dense) if dense else []
        return not norms or bool(torch.stack([each.double() for each in norms]).isfinite().all())

    def _update(self, sync: LocalSGD) -> None:
        if self.clip_norm is not None:
            self.scaler.unscale_(sync.optimizer)
            nn.utils.clip_grad_norm_(sync.replica.parameters, self.clip_norm)
        self.scaler.step(sync.optimizer)
        self.scaler.update()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Any, Any]], collectives: Collectives) -> Evaluation:
        """Loss and accuracy over every rank's batches: each sample counts once."""
        loss_sum, right, seen = 0.0, 0.0, 0
        for inputs, labels in batches:
            with self.autocast():
                outputs = model(self.layout(inputs))
                loss = self.loss(outputs, labels)
            loss_sum += loss.item() * len(labels)
            right += (outputs.argmax(dim=1) == labels).double().reshape(len(labels), -1).mean(dim=1).sum().item()
            seen += len(labels)
        loss_sum, right, total = collectives.sum_numbers([loss_sum, right, seen])
        return Evaluation(loss_sum / total, right / total, int(total))
