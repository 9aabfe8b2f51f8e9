"""The learning rate that follows the batch: a factor on an optimizer's rates, there only while it steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class ScaledRate:
    """Multiplies every group's learning rate by `factor()` during `optimizer.step()`, so any scheduler may set it."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[], float]) -> None:
        self._optimizer, self._factor = optimizer, factor
        self._hooks: list[Any] = []
        self._rates: list[float] = []

    def open(self) -> None:
        """From now on."""
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._scale),
            self._optimizer.register_step_post_hook(self._restore),
        ]

    def close(self) -> None:
        """No more."""
        for hook in self._hooks:
            hook.remove()

    def _scale(self, optimizer: Optimizer, *_: Any) -> None:
        factor = self._factor()
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _restore(self, optimizer: Optimizer, *_: Any) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate
