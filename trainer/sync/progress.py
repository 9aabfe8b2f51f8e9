"""How far this rank is, and what it tells the others of it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.optim import Optimizer

from trainer.config.sync import SyncConfig
from trainer.control.reports import ADMIT, STOP, Report
from trainer.control.rounds import Rounds
from trainer.distributed.clock import Clock
from trainer.distributed.collectives import Collectives
from trainer.memory import memory_share
from trainer.plan import Plan
from trainer.sync.gradient_notes import GradientNotes
from trainer.sync.replica import Replica


def optimizer_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The plain settings of every parameter group: what decides, beside gradients and state, what an update does."""
    plain = (int, float, bool, str, tuple, type(None))
    return [
        {
            name: float(value) if name == "lr" else value
            for name, value in group.items()
            if name == "lr" or (name != "params" and isinstance(value, plain))
        }
        for group in optimizer.param_groups
    ]


class Progress:
    """This rank's place in the run: local steps, rounds, and the observation that is being gathered.

    Args:
        replica: what is trained.
        told: what the ranks have told one another; it knows the controller, and so the Plan.
        collectives: whose bytes are counted.
        clock: this rank's.
        settings: the fewest local steps between two notes of a local phase's gradients, and what goes along.
        by_devices: ranks train devices in turn, so that samples and rates are those of the round's beginning.
    """

    def __init__(
        self,
        replica: Replica,
        told: Rounds,
        collectives: Collectives,
        clock: Clock,
        settings: SyncConfig,
        *,
        by_devices: bool = False,
    ) -> None:
        self._replica, self._told, self._collectives, self._clock = replica, told, collectives, clock
        device = replica.parameters[0].device
        self.local_step = 0
        self.rounds = 0
        """Rounds that have ended."""
        self.round_steps = 0
        """Local steps of the open round."""
        self.updates = 0
        """Optimizer steps of the observation that is being gathered."""
        self.transfer_s = math.nan
        """Seconds that this rank's latest transfer took; NaN before the first."""
        self.wish = 0.0
        """What this rank was asked for, and has not told the others."""
        self.admits = False
        """This rank knows of a newcomer."""
        self.by_devices = by_devices
        self.ledger = Ledger(device)
        self.notes = GradientNotes(device, settings.observe_steps, alone=collectives.size == 1 and not by_devices)
        self._sends_buffers = settings.batch_norm == "average"

    @property
    def plan(self) -> Plan:
        """The Plan of the open round."""
        return self._told.plan

    @property
    def samples(self) -> int:
        """Samples trained so far, over all ranks."""
        return self._told.samples(self.ledger.everyones)

    @property
    def lr_scale(self) -> float:
        """The factor on the optimizer's learning rate now."""
        here = 0 if self.by_devices else self.ledger.steps * self.plan.batch_per_rank
        return self._told.controller.lr_scale(self._told.planned(here, self._collectives.size))

    def count(
        self,
        loss: torch.Tensor,
        samples: int,
        everyones: int,
        *,
        skipped: bool = False,
        correct: torch.Tensor | None = None,
    ) -> None:
        """One local step is done; the arguments are `Ledger.count`'s."""
        self.local_step += 1
        self.round_steps += 1
        self.ledger.count(loss, samples, everyones, skipped=skipped, correct=correct)
        self.notes.end_step()

    def end_round(self) -> None:
        """The open round ends here."""
        self.rounds += 1
        self.round_steps = 0

    def drop_round(self, local_step: int) -> None:
        """The open round did not begin; it would have after this local step."""
        self.local_step, self.round_steps, self.updates = local_step, 0, 0
        self.ledger.begin(self._clock.read(), self._collectives.sent_bytes)
        self.notes.begin()

    def place(self) -> Report:
        """This rank's report as it is now, which ranks compare and weigh an average by."""
        plan, times, optimizer = self.plan, self._clock.read(), self._replica.optimizer
        rates = [float(group["lr"]) * self.lr_scale for group in optimizer.param_groups]
        told = rates, optimizer_settings(optimizer)
        return Report(
            round=self.rounds,
            step=self.local_step,
            batch=plan.batch_per_rank,
            period=plan.sync_period_steps,
            lr_scale=plan.lr_scale,
            plan=zlib.crc32(repr(plan).encode()),
            rates=zlib.crc32(repr(told).encode()),
            updates=self.updates,
            lr=rates[0],
            transfer_s=self.transfer_s,
            samples=self.ledger.samples,
            steps=self.ledger.steps,
            compute_s=times["compute_s"] - self.ledger.compute_from_s,
            wait_s=times["sync_wait_s"] - self.ledger.wait_from_s,
        )

    def report(self) -> Report:
        """This rank's share of the observation that ends here, for the others; the next one begins."""
        times, sent_bytes = self._clock.read(), self._collectives.sent_bytes
        averages, world = self.plan.averages, self._collectives.world
        sample, norm = self._replica.sample(self.rounds) if averages == "gradients" and world.size > 1 else (0.0, 0.0)
        report = replace(
            self.place(),
            wish=self.wish + (ADMIT if self.admits else 0.0),
            state_layout=self._replica.state_layout(),
            changed=self._replica.changed(),
            sample=sample,
            sample_norm=norm,
            moved_layout=self._replica.moved_layout(buffers=self._sends_buffers and averages == "parameters"),
            memory=memory_share(world.device, world.local_size),
            sketch=None if averages == "gradients" else self.notes.sketch(),
            **self.ledger.reported(sent_bytes),
            **self.notes.noted(),
        )
        self._told.send(report, self.ledger.everyones)
        self.ledger.begin(times, sent_bytes)
        self.notes.begin()
        self.updates = 0
        self.wish = self.wish if self.wish == STOP else 0.0
        return report

    def go_on(self, local_step: int, rounds: int) -> None:
        """Be at another rank's place, between two rounds, in another world."""
        self.local_step, self.rounds, self.round_steps, self.updates = local_step, rounds, 0, 0
        self.transfer_s = math.nan
        self.wish = self.wish if self.wish == STOP else 0.0
        self.ledger.begin(self._clock.read(), self._collectives.sent_bytes)
        self.notes.begin_world(alone=self._collectives.size == 1 and not self.by_devices)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "local_step": self.local_step,
            "rounds": self.rounds,
            "round_steps": self.round_steps,
            "updates": self.updates,
            "transfer_s": self.transfer_s,
            "ledger": self.ledger.state_dict(),
            "notes": self.notes.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name in ("local_step", "rounds", "round_steps", "updates", "transfer_s"):
            setattr(self, name, state[name])
        self.ledger.load_state_dict(state["ledger"])
        self.notes.load_state_dict(state["notes"])


@dataclass
class Ledger:
    """This rank's share of the observation that is being gathered, in one small message a rank."""

    device: torch.device
    steps: int = 0
    samples: int = 0
    everyones: int = 0
    """Of all ranks, where they are known; else as if each had trained as many as this one."""
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
    _correct_sum: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        # on the device, so that counting a step waits for nothing
        self._loss_sum = torch.zeros((), dtype=torch.float32, device=self.device)
        self._correct_sum = torch.zeros((), dtype=torch.float32, device=self.device)

    def count(
        self,
        loss: torch.Tensor,
        samples: int,
        everyones: int,
        *,
        skipped: bool = False,
        correct: torch.Tensor | None = None,
    ) -> None:
        """Count one local step.

        Args:
            loss: mean over this rank's samples; a skipped step has none.
            samples: of this rank.
            everyones: of all ranks.
            skipped: the optimizer made no update.
            correct: samples that were classified correctly.
        """
        self.steps += 1
        self.samples += samples
        self.everyones += everyones
        if skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            self.loss_samples += samples
            if samples:  # the mean loss of no samples is no number
                self._loss_sum.add_(loss.detach().to(self._loss_sum), alpha=samples)
            if correct is not None:
                self.judged += samples
                self._correct_sum += correct

    def reported(self, sent_bytes: float) -> dict[str, Any]:
        """Fields of a Report; `sent_bytes` are all ever sent."""
        return {
            "loss_samples": self.loss_samples,
            "loss_sum": self._loss_sum.item(),
            "judged": self.judged,
            "correct": self._correct_sum.item(),
            "skipped": self.skipped,
            "in_a_row": self.skipped_in_a_row,
            "sent_bytes": sent_bytes - self.sent_from_bytes,
        }

    def begin(self, times: Mapping[str, float], sent_bytes: float) -> None:
        """Begin the next observation."""
        self.steps = self.samples = self.everyones = self.loss_samples = self.skipped = self.judged = 0
        self.compute_from_s, self.wait_from_s = times["compute_s"], times["sync_wait_s"]
        self.sent_from_bytes = sent_bytes
        self._loss_sum.zero_()
        self._correct_sum.zero_()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint in the middle of an observation."""
        state = asdict(self)
        del state["device"], state["_loss_sum"], state["_correct_sum"]
        return state | {"loss_sum": self._loss_sum.item(), "correct_sum": self._correct_sum.item()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, value in state.items():
            if name not in ("loss_sum", "correct_sum"):
                setattr(self, name, value)
        self._loss_sum.fill_(state["loss_sum"])
        self._correct_sum.fill_(state["correct_sum"])
