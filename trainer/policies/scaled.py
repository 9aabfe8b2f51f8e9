"""Large batches with what small ones have: gradients as long as theirs, or as noisy."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trainer.errors import require
from trainer.plan import Decision, Memory, Observation, Plan
from trainer.policies.base import LrScaling, Policy, register


@register("scaled_gradients")
@dataclass(frozen=True, kw_only=True)
class ScaledGradients(Policy):
    """Large batches whose gradient is multiplied by s, so that its expected norm is the small batch's.

    With the gradient noise scale φ and batches b and B over all ranks, E‖g_b‖² = ‖G‖² (1 + φ / b), so
    s² = (1 + φ / b) / (1 + φ / B): between 1 (no noise) and √(B / b) for s (nothing but noise). s² is AdaScale's gain.
    A summary of arXiv 2509.10537 says that the paper scales the gradients of large batches; its formula is not known,
    and this one is the project's own. The factor is put on the learning rate, which is the same for SGD without weight
    decay; under Adam, whose step forgets a gradient's length, it is a rule for the rate.
    """

    small: Plan = Plan(32, sync_period_steps=1)
    """The small batch, which gradients are made as long as; it is never trained with."""
    large: Plan = Plan(256, sync_period_steps=1)
    """The large batch's Plan, for the whole run."""
    lr_scaling: LrScaling = "norm"
    """How the rate follows the large batch: by s, which is `norm`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        smaller = self.small.batch_per_rank <= self.large.batch_per_rank
        require("small.batch_per_rank", self.small.batch_per_rank, smaller, "must be at most large.batch_per_rank")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        """The large batch, always; the noise scale so far is among the reasons."""
        known = seen.noise_scale > 0
        why = {"noise_scale": seen.noise_scale} if known else {"held": "not measured: noise_scale"}
        return Decision(self.large, "scaled", why)

    def plans(self) -> tuple[Plan, ...]:
        """Both: the rate is meant at the small one."""
        return self.small, self.large


@register("small_batch_noise")
@dataclass(frozen=True, kw_only=True)
class SmallBatchNoise(Policy):
    """Large batches whose gradients are given the noise of small ones.

    With the covariance Σ of one sample's gradient and batches b and B, the gradient is given zero-mean noise of
    covariance Σ (1/b - 1/B), so that it has mean and covariance of a small batch's; it is then as long, too. The noise
    is a combination of the ranks' own gradients, which differ by nothing else, with weights that are drawn anew in
    every local step: where N ranks average gradients, the mean's weights are 1/N + c_k with Σ c_k = 0 and
    ‖c‖² = (B/b - 1) / N. So it has Σ whole, not its diagonal, and sends nothing more. On one rank, and where replicas
    are apart, the gradient of the step before is the other one. A summary of arXiv 2509.10537 says that the paper
    brings the noise of small batches back; how is not known, and this way is the project's own.

    Any policy's Plan may ask for it by `noise_batch`: in `alternating` for its large-batch phases alone.
    """

    small: Plan = Plan(32, sync_period_steps=1)
    """The small batch, whose noise is given; it is never trained with."""
    large: Plan = Plan(256, sync_period_steps=1)
    """The large batch's Plan, for the whole run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        smaller = self.small.batch_per_rank <= self.large.batch_per_rank
        require("small.batch_per_rank", self.small.batch_per_rank, smaller, "must be at most large.batch_per_rank")
        require("large.noise_batch", self.large.noise_batch, self.large.noise_batch is None, "is small's; leave it out")

    def decide(self, seen: Observation, memory: Memory) -> Decision:
        """The large batch with the small one's noise, always."""
        return Decision(self._noisy, "noisy")

    def plans(self) -> tuple[Plan, ...]:
        """Both: the rate is meant at the small one."""
        return self.small, self._noisy

    @property
    def _noisy(self) -> Plan:
        return replace(self.large, noise_batch=self.small.batch_per_rank)
