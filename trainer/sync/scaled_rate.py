"""The learning rate that follows the batch: a factor on an optimizer's rates, there only while it steps."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


class ScaledRate:
    """Multiplies every group's learning rate during `optimizer.step()`, so any scheduler may set it.

    Args:
        optimizer: whose rates are scaled.
        before: called before each update, with whether a closure computes the gradients; returns the factor.
        skips: whether this update is to be left out.
    """

    def __init__(
        self, optimizer: Optimizer, before: Callable[[bool], float], skips: Callable[[], bool] = lambda: False
    ) -> None:
        self._optimizer, self._before, self._skips = optimizer, before, skips
        self._hooks: list[Any] = []
        self._rates: list[Any] = []
        self._depth = 0
        self._guard: Any = None
        self._inner: Any = None

    def open(self) -> None:
        """Scale from the next step on."""
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._scale),
            self._optimizer.register_step_post_hook(self._ended),
        ]
        self._put_guard()

    def close(self) -> None:
        """Scale no longer."""
        self._restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._guard is not None and self._optimizer.__dict__.get("step") is self._guard:
            del self._optimizer.__dict__["step"]  # else a scheduler has put itself round it
            if self._inner is not None:
                self._optimizer.__dict__["step"] = self._inner
        self._guard = self._inner = None

    def _put_guard(self) -> None:
        """A step that raises runs no post-hook: put the rates back all the same."""
        self._inner = self._optimizer.__dict__.get("step")  # a scheduler's
        inner: Callable[..., Any] = self._optimizer.step

        @functools.wraps(inner)
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if self._skips():
                return None
            try:
                return inner(*args, **kwargs)
            finally:
                self._restore()

        self._guard = types.MethodType(step, self._optimizer)  # schedulers look for a method's function
        self._optimizer.__dict__["step"] = self._guard

    def _scale(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth > 1:  # a subclass's step calls the one above it, which has hooks too
            return
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        factor = self._before(closure is not None)
        if factor == 1.0:
            return
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _ended(self, *_: Any) -> None:
        self._depth = max(0, self._depth - 1)
        if not self._depth:
            self._restore()

    def _restore(self) -> None:
        self._depth = 0
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []
