"""How replicas are averaged, and what goes together: settings with one another, and with the Plans of a policy.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainer.errors import ConfigError, require, require_at_least
from trainer.fields import build, require_types
from trainer.plan import Plan, WireFormat

GradientFormat = Literal["float32", "bf16", "powersgd"]
OuterRule = Literal["none", "slowmo", "diloco", "fedavgm", "fedadam"]
StatePolicy = Literal["keep", "average", "reset"]
BatchNormPolicy = Literal["average", "keep", "recalibrate"]


@dataclass(frozen=True)
class SyncConfig:
    """How replicas are averaged."""

    state: StatePolicy = "keep"
    """Optimizer state at an averaging: keep each rank's own, average it (a delayed average is a correction, of which
    as much is left as of the state that was sent), or reset it. `keep` averages it where period 1 begins, since there
    it must be the same on every rank."""
    batch_norm: BatchNormPolicy = "average"
    """Floating-point buffers: average them (behind a delay at evaluations only), keep each rank's own, or recalibrate
    them before an evaluation."""
    recalibrate_samples: int = 1_024
    """Samples of its shard that each rank recalibrates BatchNorm statistics with."""
    wire_format: WireFormat = "float32"
    """Number format of averaged parameters on the network: float32 (their own type), bf16, int8 or int4. What is lost
    is kept and sent the next time (error feedback)."""
    gradient_format: GradientFormat = "float32"
    """Number format of averaged gradients at period 1: float32 (their own type), bf16, or powersgd (rank 2)."""
    delay_steps: int | Literal["auto"] = 0
    """Local steps between sending a replica and taking its average; 0 waits for it. auto measures the transfer, and
    all ranks take the fewest steps that hide it."""
    max_delay_steps: int = 8
    """Most steps that auto chooses."""
    fragments: int = 1
    """Parts of the model, averaged in turn within a round."""
    mixing: float = 1.0
    """Share of the average that a replica takes; below 1 replicas stay apart between evaluations."""
    outer: OuterRule = "none"
    """Outer optimizer that is applied to the averaged displacement, or none. SGD in long hidden rounds: fedavgm with
    outer_momentum 0.4. Adam: none at a rate that was tuned, since momentum on top of it lost in what was tried; at a
    lower rate fedavgm with 0.4 gives back what local rounds lose."""
    outer_lr: float | None = None
    """Learning rate of the outer optimizer; without it, the published one."""
    outer_momentum: float | None = None
    """Momentum of the outer optimizer (of fedadam: its first decay); without it, the published one."""
    bucket_bytes: int = 4 * 2**20
    """Bytes of a flat bucket in float32: one collective each. What is sent at once should fit a slow link's queue."""
    node_period_steps: int | None = None
    """Local steps between averagings inside a node; 1 averages its gradients at every step. Without it a node's ranks
    are averaged with all others. With it a round's average goes between nodes, a share of it a rank."""
    node_wire_format: WireFormat = "float32"
    """Number format of averages inside a node."""
    ranks_per_node: int | None = None
    """Consecutive ranks that make up a node; without it, those that the launcher started on a host."""
    observe_steps: int = 8
    """At period 1 and 0, local steps between two observations, so that small messages do not slow every step; in
    shorter rounds than that, local steps between two looks at the gradient."""
    leave_out_above: float | None = None
    """Leave a replica out of an average that has moved more than so many times the median of all ranks since the last
    one; it takes the others' model. For three ranks or more; without it, only what is not finite is left out."""
    find_unused_parameters: bool = False
    """Without effect: parameters that a step leaves out need no setting."""

    def __post_init__(self) -> None:
        require_types(self)
        require_at_least(
            self, 1, "recalibrate_samples", "bucket_bytes", "observe_steps", "fragments", "max_delay_steps"
        )
        require_at_least(self, 1, "node_period_steps", "ranks_per_node")
        lossy = self.node_wire_format != "float32"
        levels, at_once = self.node_period_steps is not None, self.delay_steps == 0
        require("node_wire_format", self.node_wire_format, not lossy or levels, "needs sync.node_period_steps")
        mend = "needs sync.delay_steps = 0, and a policy that plans no delays"
        require("node_wire_format", self.node_wire_format, not lossy or at_once, mend)
        sends = self.node_period_steps != 1
        require("node_wire_format", self.node_wire_format, not lossy or sends, "averages no parameters at period 1")
        shaped = self.ranks_per_node is not None
        require("ranks_per_node", self.ranks_per_node, not shaped or levels, "needs sync.node_period_steps")
        steps = self.delay_steps
        whole = steps == "auto" or (isinstance(steps, int) and steps >= 0)
        require("delay_steps", steps, whole, "must be 0 or more local steps, or auto")
        most = self.leave_out_above
        require("leave_out_above", most, most is None or most > 1, "must be above 1, in medians of all ranks")
        require("leave_out_above", most, most is None or not levels, "not with sync.node_period_steps")
        require("mixing", self.mixing, 0 < self.mixing <= 1, "must be above 0 and at most 1")
        for name, low in (("outer_lr", 0), ("outer_momentum", -1)):
            value = getattr(self, name)
            require(name, value, value is None or self.outer != "none", "needs sync.outer")
            require(name, value, value is None or value > low, f"must be {'above 0' if low == 0 else '0 or more'}")
        momentum = self.outer_momentum
        require("outer_momentum", momentum, momentum is None or 0 <= momentum < 1, "must be in 0 .. 1")
        require("outer", self.outer, self.outer == "none" or self.mixing == 1, "needs sync.mixing = 1")

    def under(self, plan: Plan) -> SyncConfig:
        """These settings with what the Plan says itself."""
        delay = self.delay_steps if plan.delay_steps is None else plan.delay_steps
        wire, fragments = plan.wire_format or self.wire_format, plan.fragments or self.fragments
        return replace(self, delay_steps=delay, wire_format=wire, fragments=fragments)


def sync_config_of(given: Any) -> SyncConfig:
    """The settings that a user means: a SyncConfig as it is, a table of its fields, or None for the defaults.

    Raises:
        ConfigError: another kind of value, an unknown field, or a value that cannot be; its text is one line.
    """
    if given is None:
        return SyncConfig()
    if isinstance(given, SyncConfig):
        return given
    if not isinstance(given, Mapping):
        mend = "must be a SyncConfig, or a dict of its fields such as {'wire_format': 'int8'}"
        raise ConfigError(f"settings = {given!r}: {mend}")
    try:
        return build(SyncConfig, given)
    except ConfigError as error:
        raise ConfigError(f"sync.{error}") from None


def check_scaler(settings: SyncConfig, *, used: bool) -> None:
    """Refuse what a loss scaler makes impossible.

    Raises:
        ConfigError: names the field.
    """
    fits = not used or settings.gradient_format != "powersgd"
    mend = "keeps what it loses, which a loss scaler's infinite gradients spoil: choose bf16, or no fp16"
    require("gradient_format", settings.gradient_format, fits, mend)


def check_plans(settings: SyncConfig, plans: Sequence[Plan]) -> None:
    """Refuse what the rounds of these plans cannot hold.

    Raises:
        ConfigError: names the field and the shortest period above 1.
    """
    for plan in plans:
        settings.under(plan)  # refuses what the plan's own settings make impossible
        fits = plan.noise_batch is None or settings.gradient_format != "powersgd"
        mend = "keeps what it loses, given noise too: choose float32 or bf16, or plans without noise_batch"
        require("gradient_format", settings.gradient_format, fits, mend)
    long = [plan for plan in plans if plan.sync_period_steps > 1]
    if not long:
        _check_idle(settings)
        return
    _check_said_by_plans(settings, long)
    for plan in long:
        _check_early_end(settings, plan)
    _check_lengths(settings, sorted({plan.sync_period_steps for plan in long}))


def _check_idle(settings: SyncConfig) -> None:
    """Where no parameters are averaged, nothing may be set that says how."""
    said = "averages no parameters at period 1: leave it out, or choose a policy with a longer period"
    idles = {"wire_format": "float32", "outer": "none", "delay_steps": 0, "fragments": 1, "mixing": 1.0}
    idles |= {"node_period_steps": None, "leave_out_above": None}
    for name, idle in idles.items():
        value = getattr(settings, name)
        mend = f"{said}; gradients have sync.gradient_format" if name == "wire_format" else said
        require(name, value, value == idle, mend)


def _check_said_by_plans(settings: SyncConfig, long: Sequence[Plan]) -> None:
    """Refuse a setting that every plan sets itself."""
    for name, idle in (("delay_steps", 0), ("wire_format", "float32"), ("fragments", 1)):
        value = getattr(settings, name)
        used = any(getattr(plan, name) is None for plan in long)
        require(name, value, used or value == idle, "has no effect: the policy's plans say it; leave it out")


def _check_early_end(settings: SyncConfig, plan: Plan) -> None:
    """Refuse settings that rounds which a signal ends cannot have."""
    if plan.early_end == "never":
        return
    under = settings.under(plan)
    require("delay_steps", settings.delay_steps, under.delay_steps == 0, "must be 0 where rounds end early")
    require("fragments", settings.fragments, under.fragments == 1, "must be 1 where rounds end early")
    usable = plan.early_end != "gradient_change" or settings.node_period_steps != 1
    require("node_period_steps", settings.node_period_steps, usable, "must not be 1 where gradients end rounds")
    usable = plan.early_end != "divergence" or settings.mixing == 1
    require("mixing", settings.mixing, usable, "must be 1 where divergence ends rounds")


def _check_lengths(settings: SyncConfig, periods: Sequence[int]) -> None:
    """Refuse settings that do not fit into the shortest of these periods, or do not divide each."""
    inner = settings.node_period_steps
    whole = inner is None or all(period % inner == 0 for period in periods)
    longer = ", ".join(str(period) for period in periods)
    require("node_period_steps", inner, whole, f"must divide the policy's periods above 1 ({longer} steps)")
    for name in ("delay_steps", "fragments"):
        value = getattr(settings, name)
        fits = value == "auto" or value <= periods[0]
        require(name, value, fits, f"must be at most the policy's shortest period above 1 ({periods[0]} steps)")
