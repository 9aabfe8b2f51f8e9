"""Averaging the replicas: a snapshot is exchanged, at once or beside training, and each replica takes the result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import torch

from trainer.config.sync import SyncConfig
from trainer.control.reports import ALIKE, Report, Total, refuse_difference, weights_of
from trainer.distributed.background import Background
from trainer.distributed.clock import Clock
from trainer.distributed.collectives import Collectives
from trainer.sync.outer_optimizer import Outer
from trainer.sync.part import Part
from trainer.sync.replica import Place, Replica, mean_values


@dataclass(frozen=True)
class Arrived:
    """A transfer's result besides the averages."""

    total: Total
    """The total of all ranks' reports."""
    divergence: float
    """Squared distance of the replicas from their mean, weighted by samples; of the parts that were sent."""
    sq_norm: float
    """Squared norm of their mean; of the same parts, at the same times."""
    transfer_s: float
    """From when it began, after those sent before it, to having the average, on this rank; peers' lateness included."""
    sent_bytes: float


class Pending(Protocol):
    """A transfer's result."""

    def result(self) -> Arrived:
        """Wait for it."""


@dataclass(frozen=True)
class Done:
    """A result that is there."""

    arrived: Arrived

    def result(self) -> Arrived:
        """At once."""
        return self.arrived


@dataclass
class Carried:
    """Tensors that go along with a round's parameters, averaged in place."""

    state: dict[Place, torch.Tensor] = field(default_factory=dict)
    """The optimizer's own, or beside training copies."""
    snapshot: dict[Place, torch.Tensor] = field(default_factory=dict)
    """Beside training, what those copies were before they were averaged."""


@dataclass
class Transfer:
    """An averaging under way."""

    fragments: tuple[int, ...]
    delayed: bool
    """Local steps may go on beside it."""
    ends_round: bool
    """It carries buffers and optimizer state, and what the policy is told."""
    sent_at: int
    """Local step of the snapshot."""
    land_at: int
    """Local step at which every replica takes the average."""
    pending: Pending
    carried: Carried


class Averager:
    """Sends and lands averages of one replica, in order; those with a delay beside training, in a group of their own.

    Args:
        replica: whose parameters, buffers and optimizer state are averaged.
        settings: how.
        collectives: of all ranks, used by this thread.
        clock: where this thread's waits are counted.
    """

    def __init__(self, replica: Replica, settings: SyncConfig, collectives: Collectives, clock: Clock) -> None:
        self._replica, self.settings, self._via, self._clock = replica, settings, collectives, clock
        self._fragments: list[list[Part]] = []
        self._outers: list[Outer | None] = []
        self._background: Background | None = None
        self._beside = collectives
        self.flying: list[Transfer] = []
        self.landed = 0
        """Averages that this rank has taken, the same number on all ranks between two of them."""

    def open(self) -> None:
        """Begin from replicas that are one; every rank calls it."""
        world, settings = self._via.world, self.settings
        self._outers = [Outer.of(settings, flat) for flat in self._replica.flat_parameters.adopt()]
        self._divide()
        if settings.node_period_steps is not None and world.size > 1:
            self._via.add_levels(*world.new_levels())
        self._open_background()

    def _divide(self) -> None:
        """Make the fragments, each with its share of every flat buffer."""
        flats, count = self._replica.flat_parameters.adopt(), self.settings.fragments
        self._fragments = [[] for _ in range(count)]
        for number, fragment in enumerate(self._fragments):
            for flat, outer in zip(flats, self._outers, strict=True):
                place = slice(len(flat) * number // count, len(flat) * (number + 1) // count)
                if place.start < place.stop:
                    share = None if outer is None else outer.at(place)
                    fragment.append(Part(flat[place], self.settings, self._via.world, share))

    def relayout(self) -> None:
        """Take the model's members anew, with nothing under way; outer optimizers keep what they know of each.

        Raises:
            MismatchError: models that differ in more than values.
        """
        before, known = self._replica.flat_parameters.places(), self._outers
        self._replica.relayout()
        flats = self._replica.flat_parameters.adopt()
        mean_values(self._via, flats, 1 / self._via.size)  # new layers begin as one
        self._outers = [Outer.of(self.settings, flat) for flat in flats]
        places = {key: (number, place) for key, number, place in before}
        for key, number, place in self._replica.flat_parameters.places():
            outer, (old, at) = self._outers[number], places.get(key, (0, slice(0, 0)))
            other = known[old]
            if outer is not None and other is not None and at.stop - at.start == place.stop - place.start:
                outer.at(place).take(other.at(at))
        self._divide()

    def retake(self) -> None:
        """Take the replica's members, which a checkpoint has changed."""
        self._outers = [Outer.of(self.settings, flat) for flat in self._replica.flat_parameters.adopt()]
        self._divide()

    def use(self, settings: SyncConfig) -> None:
        """Average as these settings say from now on: every rank calls it, with replicas that are one."""
        self.settings = settings
        if settings.fragments != len(self._fragments):
            self._divide()
        else:
            self._replica.flat_parameters.adopt()
            for part in self._parts(self.everything):
                part.use(settings)
        self._open_background()

    def _open_background(self) -> None:
        world = self._via.world
        if self.settings.delay_steps == 0 or world.size == 1:
            return
        if self._beside is self._via:
            self._beside = Collectives(world, None, self.settings.bucket_bytes, world.new_group())
            if self._via.within is not None:
                self._beside.add_levels(*world.new_levels())
        if self._background is None:
            self._background = Background(world.device)

    def close(self) -> None:
        """Let the thread end; `open` begins another."""
        if self._background is not None:
            self._background.close()
            self._background = None

    def drop(self) -> None:
        """Give up what is under way, which may hang for ever: its memory is not used again, and what it was to bring
        stays to be sent."""
        self.close()
        self.flying, self._beside = [], self._via

    def reopen(self, settings: SyncConfig) -> None:
        """Average as these settings say from now on, from replicas that are one, in another world; outer optimizers
        keep what they know."""
        self.settings = settings
        self._divide()
        self._open_background()

    def outers(self) -> list[dict[str, Any]]:
        """The outer optimizers' state, one a flat buffer."""
        return [{} if outer is None else outer.state_dict() for outer in self._outers]

    def load_outers(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on with another rank's."""
        for outer, state in zip(self._outers, states, strict=True):
            if outer is not None:
                outer.load_state_dict(state)

    @property
    def everything(self) -> range:
        """All fragments."""
        return range(len(self._fragments))

    def rebase(self) -> None:
        """The replicas were made one by other means."""
        self._replica.flat_parameters.adopt()
        for part in self._parts(self.everything):
            part.rebase()

    def send(
        self,
        fragments: Sequence[int],
        report: Report,
        local_step: int,
        delay_steps: int = 0,
        *,
        ends_round: bool = False,
        plainly: bool = False,
    ) -> Transfer:
        """Start averaging these fragments; with a delay above zero training may go on.

        Args:
            fragments: their numbers.
            report: this rank's numbers for the others; at a round's end those that a policy is told by, too.
            local_step: now.
            delay_steps: local steps after which the average is to be taken.
            ends_round: buffers and optimizer state go along, as the settings say.
            plainly: pass the outer optimizer by.
        """
        self._replica.flat_parameters.adopt()
        assert not any(set(flying.fragments) & set(fragments) for flying in self.flying), "take what is under way first"
        delayed = delay_steps > 0 and self._background is not None
        parts = self._parts(fragments)
        self.average_within(fragments, report.samples)
        carried = self._carry(delayed) if ends_round else Carried()
        if delayed:
            for part in parts:
                part.snapshot()

        def work() -> Arrived:
            return self._exchange(parts, report, carried, delayed=delayed, plainly=plainly, ends_round=ends_round)

        pending: Pending = self._background.submit(work) if delayed and self._background else Done(work())
        due = local_step + (delay_steps if delayed else 0)
        transfer = Transfer(tuple(fragments), delayed, ends_round, local_step, due, pending, carried)
        self.flying.append(transfer)
        return transfer

    @torch.no_grad()
    def average_within(self, fragments: Sequence[int], samples: float) -> None:
        """Make the node's replicas one, weighted by the samples that each trained; without levels, nothing."""
        via = self._via.within
        if via is None or via.size == 1 or self.settings.node_period_steps == 1:  # at 1 they are one at every step
            return
        with self._clock.waiting("sync_wait"):
            self._replica.flat_parameters.adopt()
            parts = self._parts(fragments)
            own = samples if all(part.is_finite for part in parts) else -1.0
            weights = weights_of([rank["samples"] for rank in via.gather({"samples": own})]).tolist()
            for part in parts:
                part.average_within(weights, via)

    def _exchange(
        self,
        parts: Sequence[Part],
        report: Report,
        carried: Carried,
        *,
        delayed: bool,
        plainly: bool,
        ends_round: bool,
    ) -> Arrived:
        via = self._beside if delayed else self._via
        before, began = via.sent_bytes, time.perf_counter()
        with nullcontext() if delayed else self._clock.waiting("sync_wait"), torch.no_grad():
            norm = sum(part.pack(delayed=delayed) for part in parts)
            total = share(report.with_sq_norm(norm), via)
            weights = total.weights().tolist()
            own = weights[via.rank]
            lr = total.sums["lr"] / via.size
            mean = sum(part.exchange(weights, lr, via, delayed=delayed, plainly=plainly) for part in parts)
            sq_norm = sum(part.agreed_sq_norm for part in parts)
            if ends_round:
                self._average_carried(carried, total, own, via, delayed=delayed)
        divergence = max(0.0, total.mean_sq_norm() - mean) + total.mean_spread()
        took, sent = time.perf_counter() - began, via.sent_bytes - before
        return Arrived(total, divergence, sq_norm, took, sent)

    def _average_carried(
        self, carried: Carried, total: Total, weight: float, via: Collectives, *, delayed: bool
    ) -> None:
        """Average what goes along with a round's parameters: optimizer state, and what has moved without a gradient.

        Beside training an average of buffers would come too late to replace what they are then; an evaluation averages
        them in any case.
        """
        if "state_layout" in total.differing:
            # it cannot be made alike beside training: this time each rank keeps its own
            carried.state = {} if delayed or self.settings.state != "average" else self._replica.shared_state()
        mean_values(via, [*carried.state.values()], weight)
        if delayed:
            return
        buffers = self.settings.batch_norm == "average"
        if "moved_layout" in total.differing:
            self._replica.unite(buffers=buffers)
        else:
            self._replica.average_moved(weight, buffers=buffers)

    def _carry(self, delayed: bool) -> Carried:
        """Optimizer state as it is now, as far as the settings say that it is averaged."""
        state = self._replica.state() if self.settings.state == "average" else {}
        if not delayed:
            return Carried(state)
        copies, snapshot = ({place: each.clone() for place, each in state.items()} for _ in range(2))
        return Carried(copies, snapshot)

    @torch.no_grad()
    def land(self, transfer: Transfer, local_step: int, *, wholly: bool = False) -> Arrived:
        """Wait for a transfer and take its average; `wholly` whatever `mixing` says."""
        with self._clock.waiting("sync_wait"):
            arrived = transfer.pending.result()
        self.flying.remove(transfer)
        self.landed += 1
        self._replica.flat_parameters.adopt()
        left_out = self._via.rank in arrived.total.left_out
        for part in self._parts(transfer.fragments):
            if left_out:
                part.replace(delayed=transfer.delayed)
            else:
                part.land(delayed=transfer.delayed, progressed=local_step > transfer.sent_at, wholly=wholly)
        if transfer.delayed:
            carried = transfer.carried
            self._replica.correct_state(carried.state, carried.snapshot, local_step - transfer.sent_at)
        if left_out or (transfer.ends_round and self.settings.state == "reset"):
            self._replica.reset_state()
        if transfer.delayed:
            self._via.sent_bytes += arrived.sent_bytes
        return arrived

    def _parts(self, fragments: Sequence[int]) -> list[Part]:
        return [part for fragment in fragments for part in self._fragments[fragment]]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; waits for what is under way, and does not take it."""
        for transfer in self.flying:
            transfer.pending.result()  # it changes the parts until it is there
        return {
            "parts": [part.state_dict() for part in self._parts(self.everything)],
            "flying": [
                {
                    "fragments": transfer.fragments,
                    "delayed": transfer.delayed,
                    "ends_round": transfer.ends_round,
                    "sent_at": transfer.sent_at,
                    "land_at": transfer.land_at,
                    "arrived": _plain(transfer.pending.result()),
                    "carried": asdict(transfer.carried),
                }
                for transfer in self.flying
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, once model and optimizer are loaded."""
        self._replica.flat_parameters.adopt()
        for part, saved in zip(self._parts(self.everything), state["parts"], strict=True):
            part.load_state_dict(saved)
        self.flying = []
        for saved in state["flying"]:
            carried = Carried(**saved.pop("carried"))
            arrived = saved.pop("arrived")
            pending = Done(Arrived(**{**arrived, "total": Total.restored(arrived["total"])}))
            self.flying.append(Transfer(**saved, pending=pending, carried=carried))


def _plain(arrived: Arrived) -> dict[str, Any]:
    """For a checkpoint."""
    return {**{each.name: getattr(arrived, each.name) for each in fields(arrived)}, "total": arrived.total.state()}


def share(report: Report, via: Collectives) -> Total:
    """The total of all ranks' reports.

    Raises:
        MismatchError: ranks are not at one place of one Plan.
    """
    total = Total.of(*via.share(report.sums(via.size), report.mosts(), report.own))
    if set(total.differing) & set(ALIKE):
        refuse_difference(via.gather(report.place()))
    return total
