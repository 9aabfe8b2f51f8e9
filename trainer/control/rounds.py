"""Carries ranks' reports about their rounds to the controller, and its answer to the next round's end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from trainer.control.controller import Controller, Phase
from trainer.control.reports import ADMIT, SAVE, STOP, Report, Total
from trainer.control.signals import Signals, reduce
from trainer.federated.cohorts import DeviceRound
from trainer.plan import Decision, Observation, Plan


@dataclass(frozen=True)
class Round:
    """A round as all ranks together know it, and what came of it."""

    seen: Observation
    phase: Phase
    """The phase that this round belonged to."""
    next_phase: Phase | None
    """The phase that begins now, where one does."""
    skipped_in_a_row: int
    """The most local steps that any rank had skipped one after another."""
    decision: Decision
    """The policy's answer."""
    left_out: tuple[int, ...] = ()
    """Ranks whose replicas held values that are not finite or had moved too far, and took the others' average."""
    devices: DeviceRound | None = None
    """Which devices took part, where there are any."""


@dataclass(frozen=True)
class Sent:
    """A round that this rank has told the others of, without having heard of theirs."""

    phase: Phase
    samples: int
    """Trained by all ranks, as far as this one knows."""
    planned: int
    """Trained by this rank by the Plan, which is one on all ranks."""
    own: int = 0
    """Trained by this rank."""


@dataclass(frozen=True)
class Told:
    """A round that all ranks have told of; the controller has not yet heard."""

    seen: Observation
    phase: Phase
    skipped_in_a_row: int
    left_out: tuple[int, ...] = ()
    devices: DeviceRound | None = None


class Rounds:
    """Carries rounds from the ranks to the controller, in order and the same on every rank.

    Args:
        controller: which decides.
        carried_out: how a Plan of its policy is carried out; None: as it is.
    """

    def __init__(self, controller: Controller, carried_out: Callable[[Plan], Plan] | None = None) -> None:
        self.controller = controller
        self._carried_out = carried_out or (lambda plan: plan)
        self.stopping = False
        """Some rank was asked to stop."""
        self.saving = False
        """Some rank was asked for a checkpoint, and none was written since."""
        self.step_response = 1.0
        """As in the Observation."""
        self.admitting = False
        """Some rank knows of a newcomer, which is not yet let in."""
        self.accuracy = math.nan
        """The latest evaluation's."""
        self.total_samples: int | None = None
        """Of the run, over all ranks, where its end is known."""
        self._signals = Signals()
        self._agreed_samples = 0
        self._sent: dict[int, Sent] = {}
        self._told: list[Told] = []

    @property
    def plan(self) -> Plan:
        """The present round's, as it is carried out."""
        return self._carried_out(self.controller.plan)

    def samples(self, here: int) -> int:
        """Trained by all ranks, as far as this one knows; `here` are those of all that are not yet sent."""
        return self._agreed_samples + sum(sent.samples for sent in self._sent.values()) + here

    def planned(self, here: int, ranks: int) -> int:
        """Trained by all ranks, if each trained as planned since they last told.

        It is one number on all ranks, by which a rate may ramp up; `here` are this rank's that are not yet sent.
        """
        return self._agreed_samples + (sum(sent.planned for sent in self._sent.values()) + here) * ranks

    def unheard(self) -> int:
        """Trained by this rank in rounds that it has sent, and of which it has not heard."""
        return sum(sent.own for sent in self._sent.values())

    def send(self, report: Report, samples: int) -> None:
        """This rank's report of a round is on its way to the others; `samples` are those of all ranks in it."""
        phase = self.controller.phase
        self._sent[report.round] = Sent(phase, samples, report.steps * phase.plan.batch_per_rank, report.samples)

    def tell(self, total: Total, devices: DeviceRound | None = None, **known: Any) -> None:
        """All ranks' reports of a round are there; keep what they come to until the controller is asked.

        Args:
            total: the reports.
            devices: which took part.
            known: figures of the Observation that came by other ways.
        """
        sent = self._sent.pop(int(total.alike["round"]))
        seen = reduce(total, self._agreed_samples)
        known |= self._signals.take(total, seen.samples, seen.train_loss)
        known["step_response"] = self.step_response
        progress = seen.samples / self.total_samples if self.total_samples else math.nan
        seen = replace(seen, ran=sent.phase.plan, progress=progress, test_accuracy=self.accuracy, **known)
        self._agreed_samples = seen.samples
        self.stopping = self.stopping or total.most["wish"] >= STOP
        self.saving = self.saving or SAVE <= total.most["wish"] < STOP
        self.admitting = self.admitting or total.most["wish"] % 1 == ADMIT
        self._told.append(Told(seen, sent.phase, int(total.most["in_a_row"]), tuple(total.left_out), devices))

    def decide(self) -> list[Round]:
        """Let the controller hear what was told, between two rounds; the rounds that it heard of."""
        heard = []
        for told in self._told:
            changed = self.controller.observe(told.seen, self.planned(0, told.seen.ranks))
            next_phase = self.controller.phase if changed else None
            decision, skipped = self.controller.decision, told.skipped_in_a_row
            heard.append(Round(told.seen, told.phase, next_phase, skipped, decision, told.left_out, told.devices))
        self._told.clear()
        return heard

    def go_on(self, state: Mapping[str, Any], unheard: int) -> None:
        """Go on from another rank's state, in another world; `unheard` samples were trained that nobody has told of.

        What was told and not decided on is dropped, since not every rank has heard it.
        """
        agreed = state["agreed_samples"] + unheard
        self.load_state_dict({**state, "agreed_samples": agreed, "sent": {}, "told": []})
        self.admitting = False

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "controller": self.controller.state_dict(),
            "accuracy": self.accuracy,
            "signals": self._signals.state_dict(),
            "agreed_samples": self._agreed_samples,
            "sent": {number: asdict(sent) for number, sent in self._sent.items()},
            "told": [asdict(told) for told in self._told],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.controller.load_state_dict(state["controller"])
        self.accuracy = state["accuracy"]
        self._agreed_samples = state["agreed_samples"]
        self._signals.load_state_dict(state["signals"])
        self._sent = {n: Sent(**sent | {"phase": Phase.restored(sent["phase"])}) for n, sent in state["sent"].items()}
        self._told = [
            Told(
                Observation.restored(told["seen"]),
                Phase.restored(told["phase"]),
                told["skipped_in_a_row"],
                tuple(told["left_out"]),
                None if told["devices"] is None else DeviceRound.restored(told["devices"]),
            )
            for told in state["told"]
        ]
