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
    """

    def __init__(self, optimizer: Optimizer, before: Callable[[bool], float]) -> None:
        self._optimizer, self._before = optimizer, before
        self._hooks: list[Any] = []
        self._rates: list[Any] = []
        self._guard: Any = None

    def open(self) -> None:
        """Scale from the next step on."""
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._scale),
            self._optimizer.register_step_post_hook(lambda *_: self._restore()),
        ]
        self._put_guard()

    def close(self) -> None:
        """Scale no longer."""
        self._restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._optimizer.__dict__.get("step") is self._guard:  # else a scheduler has put itself round it
            del self._optimizer.__dict__["step"]
        self._guard = None

    def _put_guard(self) -> None:
        """A step that raises runs no post-hook: put the rates back all the same."""
        if "step" in self._optimizer.__dict__:  # a scheduler's, which must stay where it is
            inner: Callable[..., Any] = self._optimizer.step
        else:
            inner = functools.partial(type(self._optimizer).step, self._optimizer)

        @functools.wraps(self._optimizer.step)
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            try:
                return inner(*args, **kwargs)
            finally:
                self._restore()

        self._guard = types.MethodType(step, self._optimizer)  # schedulers look for a method's function
        if "step" not in self._optimizer.__dict__:
            self._optimizer.__dict__["step"] = self._guard

    def _scale(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        factor = self._before(closure is not None)
        if factor == 1.0:
            return
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factor

    def _restore(self) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
        self._rates = []
