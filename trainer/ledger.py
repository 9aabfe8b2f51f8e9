"""What a rank has done since the ranks last compared: its numbers, and what all ranks' numbers come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer.errors import MismatchError
from trainer.plan import Observation

Header = dict[str, float]
AGREED = ("round", "step", "batch", "period", "lr_scale", "plan")
"""What every rank must believe alike."""


@dataclass
class Ledger:
    """This rank's share of the observation that is being gathered, in one small message a rank."""

    device: torch.device
    steps: int = 0
    samples: int = 0
    loss_samples: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    """Goes on across observations."""
    judged: int = 0
    """Samples whose classification is known."""
    compute_from_s: float = 0.0
    wait_from_s: float = 0.0
    sent_from_bytes: float = 0.0
    _loss_sum: torch.Tensor = field(init=False)
    _right_sum: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        # on the device, so that counting a step waits for nothing
        self._loss_sum = torch.zeros((), device=self.device)
        self._right_sum = torch.zeros((), device=self.device)

    def count(
        self, loss: torch.Tensor, samples: int, *, skipped: bool = False, right: torch.Tensor | None = None
    ) -> None:
        """Count one local step; a skipped one has no loss, and `right` are the samples classified rightly."""
        self.steps += 1
        self.samples += samples
        if skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            self.loss_samples += samples
            self._loss_sum.add_(loss.detach(), alpha=samples)
            if right is not None:
                self.judged += samples
                self._right_sum += right

    def place(self, times: Mapping[str, float]) -> dict[str, float]:
        """How far this rank is in its observation; `times` is what the clock reads."""
        return {
            "samples": self.samples,
            "steps": self.steps,
            "compute_s": times["compute_s"] - self.compute_from_s,
            "wait_s": times["sync_wait_s"] - self.wait_from_s,
        }

    def header(self, sent_bytes: float) -> dict[str, float]:
        """What else an observation is made of; the bytes are all ever sent."""
        return {
            "loss_samples": self.loss_samples,
            "loss_sum": self._loss_sum.item(),
            "judged": self.judged,
            "right": self._right_sum.item(),
            "skipped": self.skipped,
            "in_a_row": self.skipped_in_a_row,
            "sent_bytes": sent_bytes - self.sent_from_bytes,
        }

    def begin(self, times: Mapping[str, float], sent_bytes: float) -> None:
        """Begin the next observation."""
        self.steps = self.samples = self.loss_samples = self.skipped = self.judged = 0
        self.compute_from_s, self.wait_from_s = times["compute_s"], times["sync_wait_s"]
        self.sent_from_bytes = sent_bytes
        self._loss_sum.zero_()
        self._right_sum.zero_()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint in the middle of an observation."""
        state = asdict(self)
        del state["device"], state["_loss_sum"], state["_right_sum"]
        return state | {"loss_sum": self._loss_sum.item(), "right_sum": self._right_sum.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, value in state.items():
            if name not in ("loss_sum", "right_sum"):
                setattr(self, name, value)
        self._loss_sum.fill_(state["loss_sum"])
        self._right_sum.fill_(state["right_sum"])


def compare(headers: Sequence[Header]) -> None:
    """Every rank must have come to the same point by the same Plan.

    Raises:
        MismatchError: names two ranks and what each believes.
    """
    for rank, header in enumerate(headers):
        for name in AGREED:
            if header[name] != headers[0][name]:
                sides = "; ".join(
                    f"rank {who} is at round {it['round']:.0f}, local step {it['step']:.0f}, "
                    f"{it['samples']:.0f} samples, plan of batch {it['batch']:.0f} and period {it['period']:.0f}"
                    for who, it in ((0, headers[0]), (rank, header))
                )
                raise MismatchError(f"ranks disagree about their {name}: {sides}")


SUMMED = ("samples", "loss_sum", "loss_samples", "judged", "right", "compute_s", "wait_s", "sent_bytes", "skipped")


def reduce(headers: Sequence[Header], before: int) -> Observation:
    """What all ranks did together; `before` is the samples trained up to the last observation."""
    total = {name: sum(header[name] for header in headers) for name in SUMMED}
    most = {name: max(header[name] for header in headers) for name in ("compute_s", "transfer_s", "memory")}
    changes = [header["grad_change"] for header in headers if math.isfinite(header["grad_change"])]
    ranks = len(headers)
    return Observation(
        round=int(headers[0]["round"]),
        local_step=int(headers[0]["step"]),
        samples=before + int(total["samples"]),
        ranks=ranks,
        steps=int(headers[0]["steps"]),
        lr=sum(header["lr"] for header in headers) / ranks,
        train_loss=total["loss_sum"] / total["loss_samples"] if total["loss_samples"] else math.nan,
        train_accuracy=total["right"] / total["judged"] if total["judged"] else math.nan,
        compute_s=total["compute_s"] / ranks,
        slowest_compute_s=most["compute_s"],
        sync_wait_s=total["wait_s"] / ranks,
        transfer_s=most["transfer_s"],
        sent_bytes=total["sent_bytes"] / ranks,
        grad_change=max(changes, default=math.nan),
        memory_share=most["memory"],
        skipped_steps=int(total["skipped"]),
    )
