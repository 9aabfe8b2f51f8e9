"""How far this rank is, and what it tells the others of it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import torch

from trainer.clock import Clock
from trainer.collectives import Collectives
from trainer.gradients import GradientNotes
from trainer.ledger import Header, Ledger
from trainer.memory import memory_share
from trainer.plan import Plan
from trainer.replica import Replica
from trainer.rounds import Rounds


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
