"""Ebbtide: multi-node data-parallel training for slow or uneven networks.

Names are imported when they are first used, so that `import trainer` costs nothing of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from trainer.config import Config, SyncConfig
    from trainer.plan import Decision, Observation, Plan
    from trainer.policies import Alternating, Constant, Policy, PostLocal, register
    from trainer.sync import LocalSGD
    from trainer.train import train

_HOMES = {
    "Alternating": "policies",
    "Config": "config",
    "Constant": "policies",
    "Decision": "plan",
    "LocalSGD": "sync",
    "Observation": "plan",
    "Plan": "plan",
    "Policy": "policies",
    "PostLocal": "policies",
    "SyncConfig": "config",
    "register": "policies",
    "train": "train",
}

__all__ = [
    "Alternating",
    "Config",
    "Constant",
    "Decision",
    "LocalSGD",
    "Observation",
    "Plan",
    "Policy",
    "PostLocal",
    "SyncConfig",
    "__version__",
    "register",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trainer.{_HOMES[name]}"), name)
