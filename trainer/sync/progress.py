"""How far this rank is, and what it tells the others of it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from trainer.control.reports import Header
from trainer.control.rounds import Rounds
from trainer.distributed.clock import Clock
from trainer.distributed.collectives import Collectives
from trainer.memory import memory_share
from trainer.plan import Plan
from trainer.sync.gradient_notes import GradientNotes
from trainer.sync.replica import Replica


class Progress:
    """This rank's place in the run: local steps, rounds, and the observation that is being gathered.

    Args:
        replica: what is trained.
        told: what the ranks have told one another; it knows the controller, and so the Plan.
        collectives: whose bytes are counted.
        clock: this rank's.
        observe_steps: the fewest local steps between two notes of a local phase's gradients.
    """

    def __init__(
        self, replica: Replica, told: Rounds, collectives: Collectives, clock: Clock, observe_steps: int
    ) -> None:
        self._replica, self._told, self._collectives, self._clock = replica, told, collectives, clock
        device = replica.parameters[0].device
        self.local_step = 0
        self.rounds = 0
        """Rounds that have ended."""
        self.round_steps = 0
        """Local steps of the open round."""
        self.samples_apart = 0
        """Trained by this rank since the replicas were last one."""
        self.transfer_s = math.nan
        """Seconds that this rank's latest transfer took; NaN before the first."""
        self.stop_asked = False
        self.ledger = Ledger(device)
        self.notes = GradientNotes(device, observe_steps, alone=collectives.size == 1)

    @property
    def plan(self) -> Plan:
        """What the open round does."""
        return self._told.controller.plan

    @property
    def samples(self) -> int:
        """Samples trained so far, over all ranks."""
        return self._told.samples(self.ledger.samples, self._collectives.size)

    @property
    def lr_scale(self) -> float:
        """The factor on the optimizer's learning rate now."""
        here = self.ledger.steps * self.plan.batch_per_rank
        return self._told.controller.lr_scale(self._told.planned(here, self._collectives.size))

    def count(
        self, loss: torch.Tensor, samples: int, *, skipped: bool = False, right: torch.Tensor | None = None
    ) -> None:
        """One local step is done; the arguments are `Ledger.count`'s."""
        self.local_step += 1
        self.round_steps += 1
        self.samples_apart += samples
        self.ledger.count(loss, samples, skipped=skipped, right=right)
        self.notes.end_step()

    def end_round(self) -> None:
        """The open round ends here."""
        self.rounds += 1
        self.round_steps = 0

    def place(self) -> Header:
        """What ranks compare and weigh an average by, as it is now."""
        return self._place(self._clock.read())

    def report(self) -> Header:
        """This rank's share of the observation that ends here, for the others; the next one begins."""
        times, sent_bytes = self._clock.read(), self._collectives.sent_bytes
        header = self._place(times) | {
            "stop": self.stop_asked,
            "no_gradient": self._replica.without_gradient(),
            "layout": self._replica.layout_digest(),
            "memory": memory_share(self._collectives.world.device, self._collectives.world.local_size),
            **self.ledger.header(sent_bytes),
            **self.notes.header(),
        }
        self._told.send(header)
        self.ledger.begin(times, sent_bytes)
        self.notes.begin()
        return header

    def _place(self, times: Mapping[str, float]) -> Header:
        plan = self.plan
        return {
            "round": self.rounds,
            "step": self.local_step,
            "batch": plan.batch_per_rank,
            "period": plan.sync_period_steps,
            "lr_scale": plan.lr_scale,
            "plan": zlib.crc32(repr(plan).encode()),
            "lr": self._replica.optimizer.param_groups[0]["lr"] * self.lr_scale,
            "transfer_s": self.transfer_s,
            **self.ledger.place(times),
        }

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "local_step": self.local_step,
            "rounds": self.rounds,
            "round_steps": self.round_steps,
            "samples_apart": self.samples_apart,
            "transfer_s": self.transfer_s,
            "ledger": self.ledger.state_dict(),
            "notes": self.notes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in ("local_step", "rounds", "round_steps", "samples_apart", "transfer_s"):
            setattr(self, name, state[name])
        self.ledger.load_state_dict(state["ledger"])
        self.notes.load_state_dict(state["notes"])


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
