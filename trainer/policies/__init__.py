"""Rules that choose the next round's Plan; one file a family, registered by name."""

from trainer.policies.base import POLICIES, LrScaling, Policy, policy_class, policy_name, register
from trainer.policies.phased import Alternating, Constant, PostLocal

__all__ = [
    "POLICIES",
    "Alternating",
    "Constant",
    "LrScaling",
    "Policy",
    "PostLocal",
    "policy_class",
    "policy_name",
    "register",
]
