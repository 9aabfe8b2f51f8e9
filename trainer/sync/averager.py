"""Averaging the replicas: a snapshot is exchanged, at once or beside training, and each replica takes the result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from trainer.config.sync import SyncConfig
from trainer.control.reports import Header, compare
from trainer.distributed.background import Background
from trainer.distributed.clock import Clock
from trainer.distributed.collectives import Collectives
from trainer.sync.outer_optimizer import Outer
from trainer.sync.part import Part
from trainer.sync.replica import Place, Replica


@dataclass(frozen=True)
class Arrived:
    """What a transfer brought besides the averages."""

    headers: list[Header]
    """Every rank's, by rank."""
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
    """What goes along with a round's parameters, averaged in place."""

    buffers: list[torch.Tensor] = field(default_factory=list)
    """The model's own; none beside training, where the average would come too late to replace what they are then. An
    evaluation averages them in any case."""
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

    def open(self) -> None:
        """Begin from replicas that are one; every rank calls it."""
        world, settings = self._via.world, self.settings
        self._outers = [Outer.of(settings, flat) for flat in self._replica.flat_parameters.adopt()]
        self._divide()
        if settings.node_period_steps is not None and world.size > 1:
            self._via.add_levels(world.mesh["local"].get_group(), world.mesh["node"].get_group())
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
        if self.settings.delay_steps != 0 and world.size > 1 and self._background is None:
            self._background = Background(world.device)
            self._beside = Collectives(world, None, self.settings.bucket_bytes, world.new_group())
            if self._via.within is not None:
                self._beside.add_levels(*world.new_levels())

    def close(self) -> None:
        """Let the thread end."""
        if self._background is not None:
            self._background.close()

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
        header: Header,
        local_step: int,
        delay_steps: int = 0,
        *,
        ends_round: bool = False,
        plainly: bool = False,
    ) -> Transfer:
        """Start averaging these fragments; with a delay above zero training may go on.

        Args:
            fragments: their numbers.
            header: this rank's numbers for the others; at a round's end those that a policy is told by, too.
            local_step: now.
            delay_steps: local steps after which the average is to be taken.
            ends_round: buffers and optimizer state go along, as the settings say.
            plainly: pass the outer optimizer by.
        """
        self._replica.flat_parameters.adopt()
        assert not any(set(flying.fragments) & set(fragments) for flying in self.flying), "take what is under way first"
        delayed = delay_steps > 0 and self._background is not None
        parts = self._parts(fragments)
        self.average_within(fragments, header["samples"])
        carried = self._carry(delayed) if ends_round else Carried()
        if delayed:
            for part in parts:
                part.snapshot()

        def work() -> Arrived:
            return self._exchange(parts, header, carried, delayed=delayed, plainly=plainly, ends_round=ends_round)

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
            ranks = [rank["samples"] for rank in via.gather({"samples": samples})]
            trained = sum(ranks)
            weights = [count / trained if trained else 1 / via.size for count in ranks]
            self._replica.flat_parameters.adopt()
            for part in self._parts(fragments):
                part.average_within(weights, via)

    def _exchange(
        self,
        parts: Sequence[Part],
        header: Header,
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
            headers = via.gather(header | {"norm": norm})
            compare(headers)
            trained = sum(rank["samples"] for rank in headers)
            weights = [rank["samples"] / trained if trained else 1 / via.size for rank in headers]
            lr = sum(rank["lr"] for rank in headers) / via.size
            mean = sum(part.exchange(weights, lr, via, delayed=delayed, plainly=plainly) for part in parts)
            sq_norm = sum(part.agreed_sq_norm for part in parts)
            one_layout = not ends_round or len({rank["layout"] for rank in headers}) == 1
            if delayed and not one_layout:
                carried.state = {}  # it cannot be made alike beside training: this time each rank keeps its own
            elif self.settings.state == "average" and not one_layout:
                carried.state = self._replica.shared_state()
            via.mean_([*carried.buffers, *carried.state.values()], weights[via.rank])
        divergence = max(0.0, sum(w * rank["norm"] for w, rank in zip(weights, headers, strict=True)) - mean)
        took, sent = time.perf_counter() - began, via.sent_bytes - before
        return Arrived(headers, divergence, sq_norm, took, sent)

    def _carry(self, delayed: bool) -> Carried:
        """Buffers and optimizer state as they are now, as far as the settings say that they are averaged."""
        settings, replica = self.settings, self._replica
        state = replica.state() if settings.state == "average" else {}
        if not delayed:
            return Carried(replica.flat_buffers.adopt() if settings.batch_norm == "average" else [], state)
        copies, snapshot = ({place: each.clone() for place, each in state.items()} for _ in range(2))
        return Carried([], copies, snapshot)

    @torch.no_grad()
    def land(self, transfer: Transfer, local_step: int, *, wholly: bool = False) -> Arrived:
        """Wait for a transfer and take its average; `wholly` whatever `mixing` says."""
        with self._clock.waiting("sync_wait"):
            arrived = transfer.pending.result()
        self.flying.remove(transfer)
        self._replica.flat_parameters.adopt()
        for part in self._parts(transfer.fragments):
            part.land(delayed=transfer.delayed, progressed=local_step > transfer.sent_at, wholly=wholly)
        if transfer.delayed:
            carried = transfer.carried
            self._replica.correct_state(carried.state, carried.snapshot, local_step - transfer.sent_at)
        if transfer.ends_round and self.settings.state == "reset":
            self._replica.optimizer.state.clear()
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
                    "arrived": asdict(transfer.pending.result()),
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
            arrived = Arrived(**saved.pop("arrived"))
            for header in arrived.headers:
                header["stop"] = 0.0  # that stop has been; this run is to go on
            pending = Done(arrived)
            self.flying.append(Transfer(**saved, pending=pending, carried=carried))
