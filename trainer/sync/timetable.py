"""When averages are sent and taken: the model's fragments in turn, each landing some local steps after it was sent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from trainer.config.sync import SyncConfig
from trainer.control.reports import Report, Total
from trainer.control.rounds import Rounds
from trainer.plan import Plan
from trainer.sync.averager import Averager, Transfer
from trainer.sync.progress import Progress


class Timetable:
    """The averages of one replica in time: every rank sends and takes the same ones at the same local steps.

    Args:
        averager: what sends and lands.
        settings: how late, and how often inside a node.
        told: who hears what a round's average brought.
        progress: where this rank is.
    """

    def __init__(self, averager: Averager, settings: SyncConfig, told: Rounds, progress: Progress) -> None:
        self._averager, self._settings, self._told, self._progress = averager, settings, told, progress
        self._delay = Delay(settings)
        self._apart, self._sq_norm = 0.0, 0.0  # of the fragments that were taken of the present round
        self._are_one = True
        self._layout_changed = False
        self._about: dict[str, Any] = {}
        self._samples_apart = 0
        """Trained by this rank since the replicas were last one."""

    @property
    def are_one(self) -> bool:
        """The replicas are equal on all ranks."""
        return self._are_one

    @property
    def samples_apart(self) -> int:
        """Trained by this rank since the replicas were last one."""
        return 0 if self._are_one else self._samples_apart

    def begin_anew(self) -> None:
        """The replicas were made one in another world; what was under way is dropped, and delays are measured again."""
        self._are_one, self._samples_apart = True, 0
        self._apart = self._sq_norm = 0.0
        self._delay.forget()

    def stepped(self, plan: Plan, samples: int) -> None:
        """This rank trained so many samples in a local step of this Plan."""
        if self._are_one:
            self._samples_apart = 0
        self._samples_apart += samples
        self._are_one = self._are_one and plan.averages == "gradients"

    @property
    def layout_changed(self) -> bool:
        """Some rank has told of a model that is not laid out as the ranks agreed."""
        return self._layout_changed

    def heard(self, total: Total) -> None:
        """Note what all ranks told of their models."""
        self._layout_changed = self._layout_changed or total.most["changed"] > 0

    def layout_mended(self) -> None:
        """The ranks have agreed on a layout."""
        self._layout_changed = False

    def part_again(self) -> None:
        """The replicas are not one any more, on all ranks alike."""
        self._are_one = False

    def use(self, settings: SyncConfig) -> None:
        """Average as these settings say from now on: every rank calls it, with replicas that are one."""
        self._averager.use(settings)
        self._delay.forget()
        self._progress.transfer_s = math.nan

    def within_round(self, plan: Plan) -> None:
        """Do what is due after a local step that does not end a round: the node's average, a fragment's turn."""
        steps = self._progress.round_steps
        due = [each for each in self._averager.everything[:-1] if steps == self._turn(each, plan)]
        self._within_node(due)
        for fragment in due:
            self._take_of([fragment])
            self.send([fragment], self._progress.place(), plan)

    def last_of_round(self, plan: Plan) -> list[int]:
        """The fragments to be sent at a round's end; what is still under way of them is taken."""
        due = [each for each in self._averager.everything if self._turn(each, plan) >= plan.sync_period_steps]
        if self._progress.round_steps == plan.sync_period_steps:  # a round that ends early has had its node's average
            self._within_node(due)
        self._take_of(due)
        return due

    def _within_node(self, sent: Sequence[int]) -> None:
        """Where it is due, the node's average of all but what is sent now, which begins with it."""
        period = self._settings.node_period_steps
        rest = [each for each in self._averager.everything if each not in sent]
        if period and rest and self._progress.round_steps % period == 0:
            self._averager.average_within(rest, self._progress.ledger.samples)

    def send(
        self, fragments: Sequence[int], report: Report, plan: Plan, *, ends_round: bool = False, **about: Any
    ) -> None:
        """Send these fragments' average, to be taken as many steps later as the settings say, within `plan`'s round.

        Args:
            fragments: their numbers.
            report: this rank's.
            plan: the present one.
            ends_round: the controller is told of it.
            about: what else it is told, where the average is taken at once.
        """
        self._about = about
        delay_steps = self._delay.steps(self._averager.settings.delay_steps, plan.sync_period_steps)
        self._averager.send(fragments, report, self._progress.local_step, delay_steps, ends_round=ends_round)
        self.land()

    def land(self) -> None:
        """Take every average that is due by now."""
        self._take(flying for flying in self._averager.flying if flying.land_at <= self._progress.local_step)

    def make_one(self) -> None:
        """Take what is under way, and where that leaves replicas apart average them once more."""
        self._take(self._averager.flying)
        if not self._are_one:
            now = self._progress.local_step
            report = replace(self._progress.place(), samples=self._samples_apart)
            self._averager.send(self._averager.everything, report, now, plainly=True)
            self._averager.land(self._averager.flying[-1], now, wholly=True)
            self._are_one = True

    def _take_of(self, fragments: Iterable[int]) -> None:
        """Take what is under way of these fragments."""
        self._take(flying for flying in self._averager.flying if {*flying.fragments} & {*fragments})

    def _take(self, transfers: Iterable[Transfer]) -> None:
        """Take these averages, and pass on what they tell."""
        now = self._progress.local_step
        for transfer in [*transfers]:
            arrived = self._averager.land(transfer, now)
            self._progress.transfer_s = arrived.transfer_s
            self._delay.saw(arrived.total)
            self.heard(arrived.total)
            whole = transfer.fragments == tuple(self._averager.everything) and self._settings.mixing == 1
            self._are_one |= whole and transfer.sent_at == now
            self._apart += arrived.divergence
            self._sq_norm += arrived.sq_norm
            if transfer.ends_round:
                self._told.tell(
                    arrived.total,
                    divergence=self._apart,
                    model_sq_norm=self._sq_norm,
                    delay_steps=min(transfer.land_at, now) - transfer.sent_at,
                    **self._about,
                )
                self._apart = self._sq_norm = 0.0

    def _turn(self, fragment: int, plan: Plan) -> int:
        """Local step of a round at whose end this fragment is sent."""
        return -(-(fragment + 1) * plan.sync_period_steps // len(self._averager.everything))

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; the averager's own state is apart."""
        told = {"apart": self._apart, "sq_norm": self._sq_norm, "samples_apart": self._samples_apart}
        return {"delay": self._delay.state_dict(), "are_one": self._are_one, **told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._delay.load_state_dict(state["delay"])
        self._are_one, self._apart, self._sq_norm = state["are_one"], state["apart"], state["sq_norm"]
        self._samples_apart = state["samples_apart"]


REMEMBERED = 5  # transfers: one slow one changes nothing


class Delay:
    """The delay of the next transfer. Every rank computes it from what all ranks told, so it is one on all."""

    def __init__(self, settings: SyncConfig) -> None:
        self._most = settings.max_delay_steps
        self._needed: list[float] = []

    def steps(self, asked: int | Literal["auto"], period: int) -> int:
        """Local steps, never more than a round's; `auto` waits for its first transfers, to measure them."""
        measured = min(math.ceil(statistics.median(self._needed)), self._most) if self._needed else 0
        return min(measured if asked == "auto" else asked, period)

    def forget(self) -> None:
        """Measure again, since what is sent has changed."""
        self._needed = []

    def saw(self, total: Total) -> None:
        """Note what all ranks told of their latest transfer."""
        slowest, steps, compute_s = total.most["transfer_s"], total.sums["steps"], total.sums["compute_s"]
        if steps and compute_s > 0 and math.isfinite(slowest):
            self._needed = [*self._needed, slowest / (compute_s / steps)][-REMEMBERED:]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"needed": self._needed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._needed = list(state["needed"])
