"""The one object that a loop calls as its model, in all phases."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from trainer.sync.gradient_average import BUCKET_BYTES, GradientAverage


class SyncedModel(nn.Module):
    """A user's model under LocalSGD: calls it, and reaches its attributes, methods, items and names.

    Parameters, buffers and state have the names that they have in the model itself.
    """

    find_unused_parameters = False
    """As DistributedDataParallel has it: parameters that a forward pass leaves out are no special case here."""
    bucket_bytes_cap = BUCKET_BYTES
    """Read by torch.compile as an active DistributedDataParallel, so that a compiled graph ends where a bucket ends."""

    def __init__(self, module: nn.Module, average: GradientAverage, *, splits_graphs: bool) -> None:
        super().__init__()
        self.module = module
        own = self.__dict__
        own["_average"] = average
        own["_splits_graphs"] = splits_graphs

    @property
    def training(self) -> bool:
        """The model's own mode."""
        return bool(self.module.training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "module" in self.__dict__.get("_modules", {}):  # not in the constructor
            self.module.training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.module(*args, **kwargs)
        average: GradientAverage = self.__dict__["_average"]
        average.recover()
        with self._as_active():
            outputs = self.module(*args, **kwargs)
        if average.on and torch.is_grad_enabled():
            for each in tree_leaves(outputs):
                if torch.is_tensor(each) and each.requires_grad:
                    watch: Any = each.register_hook
                    watch(lambda _: average.outermost_begins())
        return outputs

    @contextmanager
    def _as_active(self) -> Iterator[None]:
        """Where gradients are to be averaged some time, have torch.compile split its graphs as under
        DistributedDataParallel from the first: a graph compiled whole would be used again, and hide no communication.
        """
        if not self.__dict__["_splits_graphs"] or not hasattr(DistributedDataParallel, "_active_ddp_module"):
            yield
            return
        before = DistributedDataParallel._active_ddp_module
        DistributedDataParallel._active_ddp_module = self  # type: ignore[assignment]  # it is asked for its cap only
        try:
            yield
        finally:
            DistributedDataParallel._active_ddp_module = before

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name == "module" and "module" in modules:
            return modules["module"]
        return getattr(modules["module"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "module" and "module" not in self.__dict__.get("_modules", {}):
            super().__setattr__(name, value)
        else:
            setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.module, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.module)})

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(self._container)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._container)

    def __getitem__(self, place: Any) -> Any:
        return self._container[place]

    def __setitem__(self, place: Any, value: Any) -> None:
        self._container[place] = value

    def __delitem__(self, place: Any) -> None:
        del self._container[place]

    def __contains__(self, thing: Any) -> bool:
        return thing in self._container

    @property
    def _container(self) -> Any:
        """The model, where it has items."""
        return self.module

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """A copy of the model itself, which takes no part in any averaging."""
        return copy.deepcopy(self.module, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        """The model itself is what is pickled."""
        return _itself, (self.module,)


def _reaching(name: str) -> Any:
    """A method that calls the model's own of this name; where that returns the model, this object."""

    def method(self: SyncedModel, *args: Any, **kwargs: Any) -> Any:
        found = getattr(self.module, name)(*args, **kwargs)
        return self if found is self.module else found

    method.__name__, method.__doc__ = name, "The model's own."
    return method


for _name in (
    *("state_dict", "load_state_dict", "named_parameters", "named_buffers", "named_modules", "named_children"),
    *("add_module", "register_module", "register_buffer", "register_parameter", "get_parameter", "get_buffer"),
    *("get_submodule", "set_submodule", "get_extra_state", "set_extra_state", "apply", "_apply", "compile", "train"),
    *("requires_grad_", "zero_grad", "share_memory", "to", "to_empty", "register_state_dict_post_hook"),
    *("register_state_dict_pre_hook", "register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"),
):
    setattr(SyncedModel, _name, _reaching(_name))


def _itself(module: nn.Module) -> nn.Module:
    return module
