"""Ebbtide: multi-node data-parallel training for slow or uneven networks.

Names are imported when they are first used, so that `import trainer` costs nothing of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from trainer.version import __version__

if TYPE_CHECKING:
    from trainer.config.config import Config
    from trainer.config.federated import FederatedConfig
    from trainer.config.sync import SyncConfig
    from trainer.data.partition import Sharing, share_out
    from trainer.distributed.members import Members
    from trainer.distributed.world import World
    from trainer.federated.devices import Devices
    from trainer.plan import Decision, Observation, Plan
    from trainer.policies import (
        FDA,
        QSR,
        SWAP,
        AdaptivePeriod,
        Alternating,
        Autopilot,
        BatchGrowth,
        Compose,
        Constant,
        Cycle,
        NoiseScale,
        NormTest,
        Policy,
        PostLocal,
        ScaledGradients,
        SelSync,
        SmallBatchNoise,
        register,
    )
    from trainer.sync.local_sgd import LocalSGD
    from trainer.train import train

_HOMES = {
    "AdaptivePeriod": "policies",
    "Alternating": "policies",
    "Autopilot": "policies",
    "BatchGrowth": "policies",
    "Compose": "policies",
    "Config": "config.config",
    "Constant": "policies",
    "Cycle": "policies",
    "Decision": "plan",
    "Devices": "federated.devices",
    "FDA": "policies",
    "FederatedConfig": "config.federated",
    "LocalSGD": "sync.local_sgd",
    "Members": "distributed.members",
    "NoiseScale": "policies",
    "NormTest": "policies",
    "Observation": "plan",
    "Plan": "plan",
    "Policy": "policies",
    "PostLocal": "policies",
    "QSR": "policies",
    "register": "policies",
    "ScaledGradients": "policies",
    "SelSync": "policies",
    "SmallBatchNoise": "policies",
    "SWAP": "policies",
    "share_out": "data.partition",
    "Sharing": "data.partition",
    "SyncConfig": "config.sync",
    "train": "train",
    "World": "distributed.world",
}

__all__ = [
    "FDA",
    "QSR",
    "SWAP",
    "AdaptivePeriod",
    "Alternating",
    "Autopilot",
    "BatchGrowth",
    "Compose",
    "Config",
    "Constant",
    "Cycle",
    "Decision",
    "Devices",
    "FederatedConfig",
    "LocalSGD",
    "Members",
    "NoiseScale",
    "NormTest",
    "Observation",
    "Plan",
    "Policy",
    "PostLocal",
    "ScaledGradients",
    "SelSync",
    "Sharing",
    "SmallBatchNoise",
    "SyncConfig",
    "World",
    "__version__",
    "register",
    "share_out",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trainer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
