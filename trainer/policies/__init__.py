"""Rules that choose the next round's Plan; one file a family, registered by name."""

from trainer.policies.autopilot import Autopilot
from trainer.policies.base import POLICIES, LrScaling, Policy, policy_class, policy_name, policy_of, register
from trainer.policies.batches import BatchGrowth, NoiseScale, NormTest
from trainer.policies.compose import Compose
from trainer.policies.periods import FDA, QSR, AdaptivePeriod, SelSync
from trainer.policies.phased import SWAP, Alternating, Constant, Cycle, PostLocal
from trainer.policies.scaled import ScaledGradients, SmallBatchNoise

__all__ = [
    "FDA",
    "POLICIES",
    "QSR",
    "SWAP",
    "AdaptivePeriod",
    "Alternating",
    "Autopilot",
    "BatchGrowth",
    "Compose",
    "Constant",
    "Cycle",
    "LrScaling",
    "NoiseScale",
    "NormTest",
    "Policy",
    "PostLocal",
    "ScaledGradients",
    "SelSync",
    "SmallBatchNoise",
    "policy_class",
    "policy_name",
    "policy_of",
    "register",
]
