"""Defines a policy, and the registry that recipes name policies by."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from trainer.errors import ConfigError, import_object, require, require_at_least
from trainer.fields import nearest, require_types
from trainer.plan import Decision, Memory, Observation, Plan

LrScaling = Literal["none", "linear", "sqrt", "gain", "norm"]
Length = int | float
"""Samples over all ranks: a whole number, or a share of the run's samples above 0 and below 1."""


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """A rule from Observation to Plan: a frozen record of settings and one pure method.

    A subclass decorated with `register("name")` is chosen by `policy.name`, and its fields are the recipe's fields.
    It touches no tensor, rank, clock or process group, and keeps nothing: what it wants to remember goes into the
    Decision's `memory` and comes back with the next call.
    """

    lr_scaling: LrScaling = "none"
    """How the learning rate follows the per-rank batch: none, linear (Goyal et al. 2017), sqrt, the gain that the noise
    scale allows (AdaScale, Johnson et al. 2020), or norm, its square root."""
    lr_ramp_samples: int = 5_000
    """Samples (over all ranks) over which the learning rate ramps up after every rise of its scale."""

    @abstractmethod
    def decide(self, seen: Observation, memory: Memory) -> Decision:
        """The Plan of the next round; called first with `Observation()`, then at round boundaries."""

    @abstractmethod
    def plans(self) -> tuple[Plan, ...]:
        """Plans that the policy starts from; `lr_scaling` counts from the one with the smallest batch."""

    def base_plan(self) -> Plan:
        """The small-batch Plan: the learning rate is meant at it, and one rank alone is timed at it."""
        return min(self.plans(), key=lambda plan: plan.batch_per_rank)

    def second_phase_at(self, ranks: int) -> Length | None:
        """Samples after which the second phase begins, at the earliest, where the settings say it."""
        return None

    def __post_init__(self) -> None:
        require_types(self)
        require_at_least(self, 0, "lr_ramp_samples")


def held(seen: Observation, memory: Memory, *missing: str) -> Decision:
    """The Decision that changes nothing, because these figures were not measured."""
    return Decision(seen.plan, seen.phase_name, {"held": f"not measured: {', '.join(missing)}"}, memory)


def require_length(section: object, *names: str) -> None:
    """Refuse lengths that are neither whole samples nor a share of the run; None stands for not given."""
    for name in names:
        value = getattr(section, name)
        usable = value is None or 0 < value < 1 or (value >= 1 and float(value).is_integer())
        require(name, value, usable, "must be at least 1 sample, or a share of the run above 0 and below 1")


def samples_of(length: Length, seen: Observation) -> Length:
    """A length in samples; NaN for a share where the run's end is not known."""
    if length >= 1:
        return length
    return round(length * round(seen.samples / seen.progress)) if seen.progress > 0 else math.nan


P = TypeVar("P", bound=type[Policy])
POLICIES: dict[str, type[Policy]] = {}


def register(name: str) -> Callable[[P], P]:
    """Class decorator: make a policy known to recipes under `name`."""

    def add(policy: P) -> P:
        assert name not in POLICIES, f"two policies are named {name}"
        POLICIES[name] = policy
        return policy

    return add


def policy_class(name: str) -> type[Policy]:
    """The class of a registered policy, or of a user's own by `module:Class`.

    Raises:
        ConfigError: no such policy.
    """
    if ":" in name:
        found = import_object("policy.name", name)
        if not (isinstance(found, type) and issubclass(found, Policy)):
            raise ConfigError(f"policy.name = {name!r}: must name a subclass of trainer.Policy")
        return found
    if name not in POLICIES:
        known = sorted(POLICIES)
        mend = f"choose one of {', '.join(known)}, or module:Class{nearest(name, known)}"
        raise ConfigError(f"policy.name = {name!r}: {mend}")
    return POLICIES[name]


def policy_of(given: Any, field: str = "policy") -> Policy:
    """The policy that a user means: an instance as it is; a name, `module:Class` or a class with its defaults.

    Raises:
        ConfigError: no policy; its text is one line that begins with `field`.
    """
    if isinstance(given, Policy):
        return given
    kind = policy_class(given) if isinstance(given, str) else given
    if not (isinstance(kind, type) and issubclass(kind, Policy)):
        mend = "must be a policy: Constant(16, 4), a name such as 'autopilot', or a class"
        if isinstance(given, Plan):
            mend = "is a Plan: write Constant(plan) for one Plan all the time"
        raise ConfigError(f"{field} = {given!r}: {mend}")
    try:
        return kind()
    except TypeError as error:  # abstract, or with fields that have no default
        raise ConfigError(f"{field} = {given!r}: cannot be built with defaults ({error}); give an instance") from None


def policy_name(policy: Policy) -> str:
    """The name that `policy_class` finds this policy's class by."""
    names = {found: name for name, found in POLICIES.items()}
    return names.get(type(policy), f"{type(policy).__module__}:{type(policy).__qualname__}")
