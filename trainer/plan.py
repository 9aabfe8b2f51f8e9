"""The values that policies read and return: an Observation in, a Decision with its Plan out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from trainer.errors import require
from trainer.fields import require_types

WireFormat = Literal["float32", "bf16", "int8", "int4"]
EarlyEnd = Literal["never", "gradient_change", "divergence"]


@dataclass(frozen=True)
class Plan:
    """Describes the next round."""

    batch_per_rank: int = 32
    """Samples a rank trains in one local step."""
    sync_period_steps: int = 16
    """Local steps between two averagings; 1 averages the gradients of every step, 0 averages once, where the Plan
    changes or the run ends (evaluations see the average, and leave the replicas apart)."""
    lr_scale: float = 1.0
    """Factor on the scheduled learning rate, besides the policy's `lr_scaling`."""
    delay_steps: int | Literal["auto"] | None = None
    """Local steps between sending a replica and taking its average; None: as `sync.delay_steps` says."""
    wire_format: WireFormat | None = None
    """Number format of averaged parameters; None: as `sync.wire_format` says."""
    fragments: int | None = None
    """Parts of the model, averaged in turn within the round; None: as `sync.fragments` says."""
    early_end: EarlyEnd = "never"
    """Signal that ends a round before its period, asked of all ranks at every local step in one small message."""
    early_end_above: float = 0.0
    """Value that the signal must reach: a relative change, or a squared distance."""
    noise_batch: int | None = None
    """Samples a rank whose gradient noise the gradients of larger batches are given; None: they keep their own. On one
    rank, and where replicas are apart, it takes the memory of one more gradient."""

    def __post_init__(self) -> None:
        require_types(self)
        require("batch_per_rank", self.batch_per_rank, self.batch_per_rank >= 1, "must be at least 1 sample")
        period, delay = self.sync_period_steps, self.delay_steps
        require("sync_period_steps", period, period >= 0, "must be at least 1 step, or 0 for no averaging")
        require("lr_scale", self.lr_scale, self.lr_scale > 0, "must be a positive number")
        steps = delay in (None, "auto") or (isinstance(delay, int) and 0 <= delay <= period)
        require("delay_steps", delay, steps, f"must be in 0 .. sync_period_steps ({period}), or auto")
        parts = self.fragments
        usable = parts is None or 1 <= parts <= max(period, 1)
        require("fragments", parts, usable, f"must be in 1 .. sync_period_steps ({period})")
        noisy = self.noise_batch
        usable = noisy is None or 1 <= noisy <= self.batch_per_rank
        require("noise_batch", noisy, usable, f"must be in 1 .. batch_per_rank ({self.batch_per_rank})")
        usable = self.early_end == "never" or (period > 1 and delay in (None, 0) and parts in (None, 1))
        require("early_end", self.early_end, usable, "needs sync_period_steps above 1, no delay_steps and no fragments")
        above = self.early_end_above
        usable = above > 0 if self.early_end != "never" else above == 0
        require("early_end_above", above, usable, "goes with early_end, and is above 0 there")

    @property
    def averages(self) -> Literal["nothing", "gradients", "parameters"]:
        """The thing that ranks average: nothing at period 0, gradients at 1, parameters above."""
        return ("nothing", "gradients")[self.sync_period_steps] if self.sync_period_steps < 2 else "parameters"


@dataclass(frozen=True)
class DevicePlan(Plan):
    """A Plan as federated devices carry it out: each trains `sync_period_steps` local steps, and their models are
    averaged at once, however short the period is."""

    @property
    def averages(self) -> Literal["nothing", "gradients", "parameters"]:
        """Parameters, always."""
        return "parameters"


NO_PLAN = Plan()


@dataclass(frozen=True)
class Observation:
    """Figures that all ranks know at a round's end: each is reduced over the ranks, so it is the same on every one.

    Counts start at zero; a figure that was not measured is NaN.
    """

    round: int = 0
    """Rounds ended so far."""
    local_step: int = 0
    """Local steps so far (the same on every rank)."""
    samples: int = 0
    """Samples trained so far, over all ranks."""
    phase: int = -1
    """Number of the current phase, from 0; -1 before the first."""
    phase_name: str = ""
    """Its name."""
    phase_rounds: int = 0
    """Rounds of the current phase."""
    phase_steps: int = 0
    """Local steps of the current phase."""
    phase_samples: int = 0
    """Samples of the current phase, over all ranks."""
    plan: Plan = NO_PLAN
    """The current Plan, which goes on unless the policy changes it."""
    ran: Plan = NO_PLAN
    """The Plan that the observed steps ran by: with a delay the current one, or the one before it."""
    delay_steps: int = 0
    """Local steps between sending the observed round's replicas and taking their average."""
    ranks: int = 0
    """Ranks that train; of federated devices those that were heard."""
    reach_steps: float = math.nan
    """How far a device's optimizer reached in the round, in steps of its rate, mean by weight: with momentum farther
    than its local steps. NaN without federated devices."""
    steps: int = 0
    """Local steps since the last observation."""
    progress: float = math.nan
    """Share of the run's samples that is trained; NaN where no end is known."""
    lr: float = math.nan
    """Learning rate of the last local step, the plan's scale included."""
    step_response: float = 1.0
    """Power of a gradient's length that the length of the optimizer's step goes by, tried out on a twin of it: 1 of SGD
    (and where no twin can be made, and with devices), 0 of Adam."""
    train_loss: float = math.nan
    """Mean training loss over the samples since the last observation."""
    loss_trend: float = math.nan
    """Slope of the line through the latest 16 training losses: change of the loss per sample."""
    loss_window: int = 0
    """Samples between the first and the last of those losses."""
    train_accuracy: float = math.nan
    """Share of the training samples since the last observation that were classified rightly, before their step."""
    compute_s: float = math.nan
    """Seconds of compute since the last observation, mean over the ranks."""
    slowest_compute_s: float = math.nan
    """Seconds of compute of the slowest rank since the last observation."""
    sync_wait_s: float = math.nan
    """Seconds that the training thread waited for the network since the last observation, mean over the ranks."""
    transfer_s: float = math.nan
    """Seconds of the averaging before this one (of its last fragment), the most of any rank, from when it began."""
    sent_bytes: float = math.nan
    """Bytes that a rank sent since the last observation, mean over the ranks."""
    divergence: float = math.nan
    """Mean squared distance of the replicas from their mean at the round's end, weighted by samples."""
    model_sq_norm: float = math.nan
    """Squared norm of that mean (of the parameters that were averaged)."""
    grad_sq_norm: float = math.nan
    """Squared norm of the full gradient, estimated without bias and smoothed (McCandlish et al. 2018, eq. A.2)."""
    grad_variance: float = math.nan
    """Trace of the covariance of one sample's gradient, estimated without bias and smoothed (the same)."""
    noise_scale: float = math.nan
    """Gradient noise scale in samples: grad_variance / grad_sq_norm; NaN until both are above zero."""
    grad_change: float = math.nan
    """Relative change of a rank's gradient norm from step to step, smoothed; the most of any rank (SelSync)."""
    memory_share: float = math.nan
    """Most memory ever held, of what there is, on the fullest rank."""
    skipped_steps: int = 0
    """Local steps skipped for a non-finite loss since the last observation, over all ranks."""
    test_accuracy: float = math.nan
    """The latest evaluation's accuracy, as a fraction."""

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Observation:
        """The Observation whose `asdict` this is; None stands for NaN, since JSON has none."""
        values: dict[str, Any] = {name: math.nan if value is None else value for name, value in state.items()}
        values |= {name: Plan(**state[name]) for name in ("plan", "ran") if name in state}
        return cls(**values)

    def missing(self, *names: str) -> list[str]:
        """Which of these figures were not measured."""
        return [name for name in names if not math.isfinite(getattr(self, name))]


Memory = Mapping[str, Any]
"""Carried by a policy from one decision to the next: JSON values only, so that a checkpoint can hold it."""


@dataclass(frozen=True)
class Decision:
    """A Plan, the name of the phase it belongs to, and the numbers that decided it (JSON values)."""

    plan: Plan
    phase: str
    why: Mapping[str, Any] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)


def observed(seen: Observation) -> dict[str, Any]:
    """An Observation as JSON: what was measured."""
    default = Observation()
    return {
        each.name: plain(value) if isinstance(value, Plan) else value
        for each in fields(seen)
        if each.name != "plan"
        and not each.name.startswith("phase")  # the controller fills these in
        and (value := getattr(seen, each.name)) == value
        and (value != getattr(default, each.name) or each.name == "round")
    }


def plain(plan: Plan) -> dict[str, Any]:
    """A Plan as JSON: what is not as by default, besides batch and period."""
    return {
        name: value
        for name, value in asdict(plan).items()
        if name in ("batch_per_rank", "sync_period_steps", "lr_scale") or value != _DEFAULTS[name]
    }


_DEFAULTS = {each.name: each.default for each in fields(Plan)}
