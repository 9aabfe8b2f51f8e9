"""Federated devices: who takes part in a round, what becomes of the slow, and what corrects drift. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from trainer.config.sync import SyncConfig
from trainer.errors import ConfigError, require, require_at_least
from trainer.fields import require_types
from trainer.plan import DevicePlan, Plan

Rule = Literal["fedavg", "fedprox", "scaffold", "fednova", "feddyn", "fedbuff", "fedasync"]
ASYNCHRONOUS = ("fedbuff", "fedasync")
CORRECTING = ("fedprox", "scaffold", "feddyn")
"""Rules that change a local step's gradient."""
PULL = {"fedprox": 0.01, "feddyn": 0.1}
"""`mu` where none is given: the smallest that Li et al. (2020) tried, and Acar et al. (2021)'s for 100 devices."""


@dataclass(frozen=True)
class FederatedConfig:
    """Devices, each with private data, a speed and a link of its own, hosted by the ranks."""

    devices: int | None = None
    """Devices; device k is hosted by rank k modulo the ranks. None: every rank is a device, with one replica."""
    cohort: int | None = None
    """Devices drawn for a round; with fedbuff and fedasync those that train at any time. None: all."""
    min_reports: int = 1
    """Fewest devices that must report; a round with fewer keeps the model, and says so in an event."""
    local_steps: int | None = None
    """Local steps of a device and round; None: the Plan's period."""
    local_epochs: int | None = None
    """Passes of a device over its samples in a round, in place of local steps."""
    weights: Literal["samples", "uniform"] = "samples"
    """What a device weighs in the average: the samples of its shard, or as much as any other."""
    rule: Rule = "fedavg"
    """What corrects drift (fedprox, scaffold, fednova, feddyn), or averages without waiting (fedbuff, fedasync)."""
    mu: float | None = None
    """Pull towards the round's first model: mu of fedprox (0.01), alpha of feddyn (0.1)."""
    batch: Literal["plan", "speed"] = "plan"
    """A device's batch: the Plan's, or as many times it as the device is faster than the cohort's mean."""
    deadline_s: float | None = None
    """Virtual seconds after which a round ends."""
    late: Literal["drop", "partial"] = "drop"
    """Devices that would miss the deadline: left out, or heard with the local steps that they made by then."""
    over_select: float = 1.0
    """So many times the cohort are drawn, and the first `cohort` to finish are heard (Bonawitz et al. 2019)."""
    buffer: int = 10
    """Arrivals that one update of fedbuff takes."""
    async_lr: float = 0.6
    """Share of a fresh arrival's model that fedasync mixes in."""
    staleness: float = 0.5
    """Power a of an arrival's weight (1 + staleness)^-a, in updates since its model."""
    profile: str = "equal"
    """Speeds and links: equal, lognormal, or a CSV file, a line a device, with columns samples_per_s, down_bits_per_s,
    up_bits_per_s and availability."""
    finetune_steps: int = 0
    """Local steps on a device's own data before its held-out samples are judged a second time; 0: not at all."""
    state_memory_bytes: int = 2 * 2**30
    """Devices' own state (control variates) beyond so many bytes a rank is kept in a temporary file."""

    def __post_init__(self) -> None:
        require_types(self)
        require_at_least(self, 1, "devices", "cohort", "min_reports", "local_steps", "local_epochs", "buffer")
        require_at_least(self, 0, "finetune_steps", "state_memory_bytes")
        require("staleness", self.staleness, self.staleness >= 0, "must be 0 or more")
        require("async_lr", self.async_lr, 0 < self.async_lr <= 1, "must be above 0, at most 1")
        require("over_select", self.over_select, self.over_select >= 1, "must be at least 1")
        require("mu", self.mu, self.mu is None or self.mu >= 0, "must be 0 or more")
        require(
            "deadline_s", self.deadline_s, self.deadline_s is None or self.deadline_s > 0, "must be above 0 seconds"
        )
        if self.devices is not None:
            self._require_together(self.devices)

    def _require_together(self, devices: int) -> None:
        both = self.local_steps is not None and self.local_epochs is not None
        require("local_epochs", self.local_epochs, not both, "give local_steps or local_epochs, not both")
        if self.cohort is not None:
            require("cohort", self.cohort, self.cohort <= devices, f"there are {devices} devices")
        heard = self.cohort or devices
        require("min_reports", self.min_reports, self.min_reports <= heard, f"the cohort has {heard} devices")
        if self.mu is not None:
            require("mu", self.mu, self.rule in PULL, f"goes with rule = {' or '.join(PULL)}")
        if self.rule == "feddyn":
            require("mu", self.pull, self.pull > 0, "feddyn divides by it: must be above 0")
        require("late", self.late, self.late == "drop" or self.deadline_s is not None, "goes with deadline_s")
        if self.is_async:
            needs_none = self.deadline_s is None
            require("deadline_s", self.deadline_s, needs_none, f"{self.rule} waits for nobody; leave it out")
            require(
                "over_select", self.over_select, self.over_select == 1, f"{self.rule} waits for nobody; leave it out"
            )
            fits = self.rule != "fedbuff" or self.buffer <= heard
            require("buffer", self.buffer, fits, f"only {heard} devices train at any time; lower it or raise cohort")

    @property
    def is_on(self) -> bool:
        """Whether there are devices."""
        return self.devices is not None

    @property
    def is_async(self) -> bool:
        """Whether updates wait for no round."""
        return self.rule in ASYNCHRONOUS

    @property
    def pull(self) -> float:
        """`mu`, or the rule's published one."""
        return PULL.get(self.rule, 0.0) if self.mu is None else self.mu

    @property
    def drawn(self) -> int:
        """Devices drawn for a round."""
        heard = self.cohort or self.devices or 1
        return min(self.devices or 1, math.ceil(heard * self.over_select - 1e-9))


@lru_cache(maxsize=64)  # asked at every step
def device_plan(plan: Plan, federated: FederatedConfig, sync: SyncConfig) -> DevicePlan:
    """A policy's Plan for devices: without delays, fragments and rounds that end early."""
    return DevicePlan(
        batch_per_rank=plan.batch_per_rank,
        sync_period_steps=federated.local_steps or plan.sync_period_steps,
        lr_scale=plan.lr_scale,
        delay_steps=0,
        wire_format=plan.wire_format or sync.wire_format,
        fragments=1,
    )


def check_federated(federated: FederatedConfig, sync: SyncConfig, plans: Sequence[Plan]) -> None:
    """Refuse settings of averaging, and Plans, that devices cannot have.

    Raises:
        ConfigError: names the setting and the mend.
    """
    if not federated.is_on:
        return
    refused = {
        "delay_steps": (sync.delay_steps != 0, "devices average at a round's end; set 0"),
        "fragments": (sync.fragments != 1, "devices average at a round's end; set 1"),
        "node_period_steps": (sync.node_period_steps is not None, "devices are averaged over all ranks; leave it out"),
        "mixing": (sync.mixing != 1, "every device begins from the consensus model; set 1"),
        "leave_out_above": (sync.leave_out_above is not None, "not for devices; leave it out"),
        "batch_norm": (sync.batch_norm == "keep", "a device keeps no buffers; choose average or recalibrate"),
        "state": (sync.state == "average", "a device's optimizer begins anew in every round; choose keep or reset"),
        "outer": (federated.rule == "feddyn" and sync.outer != "none", "feddyn moves the model itself; set none"),
    }
    for name, (is_refused, mend) in refused.items():
        if is_refused:
            raise ConfigError(f"{name} = {getattr(sync, name)!r}: {mend}")
    noisy = [plan.noise_batch for plan in plans if plan.noise_batch is not None]
    if noisy:
        raise ConfigError(f"noise_batch = {noisy[0]}: a device has no gradient of a step before; leave it out")
    if any(plan.sync_period_steps == 0 for plan in plans):
        raise ConfigError("sync_period_steps = 0: devices are averaged in every round; plan 1 local step or more")


def check_local_optimizer(federated: FederatedConfig, name: str) -> None:
    """Refuse an optimizer whose steps a rule cannot account for.

    Raises:
        ConfigError: names the rule and the mend.
    """
    plain = name == "sgd"
    needs = federated.is_on and federated.rule in ("scaffold", "feddyn")
    require("rule", federated.rule, plain or not needs, f"needs plain SGD on the devices, not {name}; choose fedavg")
