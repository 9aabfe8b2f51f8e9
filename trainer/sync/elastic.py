"""Ranks that come and go: those that are left make one model of their replicas and go on, and newcomers take it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from trainer.config.sync import SyncConfig
from trainer.control.rounds import Rounds
from trainer.distributed.clock import Clock
from trainer.distributed.members import NOWHERE, Members
from trainer.errors import PeerError, TooFewError
from trainer.log import LOG
from trainer.sync.averager import Averager
from trainer.sync.early_end import EarlyEnd
from trainer.sync.feed import Feed
from trainer.sync.gradient_average import GradientAverage
from trainer.sync.layout import Layout
from trainer.sync.progress import Progress
from trainer.sync.replica import Replica, mean_values
from trainer.sync.timetable import Timetable
from trainer.sync.transition import Transition

Facts = Mapping[str, Any]
State = dict[str, Any]
T = TypeVar("T")


class Stateful(Protocol):
    """What newcomers must know to be like the others: a scheduler, a counter of the loop's own."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Be as another rank's was."""


@dataclass(frozen=True)
class Regrouped:
    """The ranks have changed."""

    epoch: int
    """The number of the new group, from 0."""
    ranks: int
    """That take part now."""
    rank: int
    """This one's, now."""
    left: Mapping[int, str]
    """Ranks of before that are not there any more, with what is known of why."""
    joined: tuple[int, ...]
    """New ranks."""
    local_step: int
    took_s: float
    """From the failure, or the wish, to the new group."""


@dataclass(frozen=True)
class Parts:
    """The collaborators of one LocalSGD."""

    replica: Replica
    averager: Averager
    timetable: Timetable
    gradients: GradientAverage
    transition: Transition
    early: EarlyEnd
    told: Rounds
    progress: Progress
    feed: Feed
    clock: Clock
    settings: SyncConfig


class Elastic:
    """Meets the members, makes their replicas one, and gives each what it must know to go on.

    Two counts tell how far a member is. `place` counts what ranks do together, one thing after another: a member with a
    smaller one was cut off in something that the others had finished, and need not do it again. `landed` counts
    averages: what a member with a smaller one moved is in the others' model already, so it takes theirs. All that are
    equally far average their replicas, weighted by the samples that each trained since they were last one.
    """

    def __init__(self, members: Members, parts: Parts, alike: Mapping[str, str]) -> None:
        self._members, self._parts, self._alike = members, parts, alike
        self._replica, self._averager, self._timetable = parts.replica, parts.averager, parts.timetable
        self._gradients, self._told, self._progress = parts.gradients, parts.told, parts.progress
        self._feed = parts.feed
        self._via = parts.replica.collectives
        self._carried: dict[str, Stateful] = {}
        self._arrived: State = {}
        self._place = 0
        self._world = -1
        """The number of the last epoch whose first rank's place this rank took."""
        self._behind = self._is_lasting = False
        self.absorbs = False
        """The others have counted this rank's present step already."""
        self.is_new = False
        """This rank came when others had begun."""
        self._heard: list[Regrouped] = []
        parts.gradients.on_failure, parts.feed.on_failure = self._mend_gradients, self._mend_feed
        parts.feed.between_steps = self.let_in

    # ---- what a loop does

    def begin(self) -> None:
        """This rank enters, and knows nothing of the others."""
        self._place = self._world = -1
        self._members.begin()

    @property
    def admits(self) -> bool:
        """A newcomer waits."""
        return self._members.knocked

    def carry(self, name: str, thing: Stateful) -> None:
        """Newcomers get this thing's state; a newcomer itself takes it now."""
        self._carried[name] = thing
        if name in self._arrived:
            thing.load_state_dict(self._arrived.pop(name))

    def did(self) -> None:
        """Something that ranks do together is done."""
        self._place += 1

    def heard(self) -> list[Regrouped]:
        """How the ranks have changed since this was last asked."""
        heard, self._heard = self._heard, []
        return heard

    def lasting(self, work: Callable[[], T], *, again: bool) -> T | None:
        """Do what needs the other ranks. Where some have gone those who are left become one, and the work is done again
        or not; never where the others had finished it. What is done within such work is done again with it."""
        if self._is_lasting:
            return work()
        while True:
            self._is_lasting = True
            try:
                result = work()
            except PeerError as error:
                if self.regroup(error) or not again:
                    return None
            else:
                self.did()
                return result
            finally:
                self._is_lasting = False

    def let_in(self) -> None:
        """Between two rounds let in who waits."""
        if self._told.admitting and self._progress.round_steps == 0:
            self.regroup(None)

    def _mend_feed(self, error: PeerError) -> None:
        self.regroup(error)

    def _mend_gradients(self, error: PeerError) -> None:
        """Gradients could not be averaged: do it again with those who are left, unless the others have made the update
        already, and this rank has taken what came of it."""
        if not self.regroup(error):
            self._gradients.again()
            return
        self.absorbs = True
        for parameter in self._replica.parameters:
            parameter.grad = None

    # ---- another group

    def regroup(self, cause: PeerError | None) -> bool:
        """Meet the others until a group of them has become one.

        Args:
            cause: what failed; None: newcomers are to be let in.

        Returns:
            Whether this rank was behind: the others had finished what it was doing.

        Raises:
            PeerError: too few are left, or the store is gone.
        """
        with self._parts.clock.off("other"), torch.inference_mode(mode=False):
            began, facts, admit = time.monotonic(), self._facts(), cause is None
            self._behind = False
            while True:
                if cause is not None:
                    self._members.ask(str(cause).splitlines()[0])
                place = self._place
                try:
                    self._meet(began, facts, admit=admit)
                    return self._behind
                except TooFewError:
                    raise
                except PeerError as error:
                    LOG.debug("regrouping failed: %s", error)
                    cause = error
                    if self._place != place:  # it has gone on, and failed after that
                        facts = self._facts()

    def _facts(self) -> Facts:
        is_in = self._members.epoch is not None
        return {
            "place": NOWHERE if self._place < 0 else [self._place, self._averager.landed],
            "apart": self._timetable.samples_apart,
            "own": self._told.unheard() + self._progress.ledger.samples,
            "world": self._world,
            "rank": self._via.rank if is_in else -1,
            "ranks": self._via.size if is_in else 0,
            "in_hand": self._feed.in_hand,
            "lefts": self._feed.lefts(),
            "read": self._feed.read(),
        }

    def _meet(self, began: float, facts: Facts, *, admit: bool) -> None:
        self._gradients.take_off()
        self._averager.drop()
        self._members.abandon()
        alike = {**self._alike, **self._replica.layout.described()}
        epoch = self._members.meet(facts, admit=admit, alike=alike)
        everyone = epoch.facts
        mine = everyone[epoch.members.index(self._members.number)]
        self._via.regroup(self._via.world.of_epoch(epoch))
        (furthest, landed), place = everyone[0]["place"], mine["place"][0]
        behind = place < furthest
        if furthest < 0:
            Layout.compare(self._replica.layout, self._via)
        elif self._replica.follow(self._via.object_of_first(self._replica.trained), is_new=place < 0):
            self._averager.retake()
        made = self._made_one(everyone)
        sent, optimizer = None, None
        if furthest >= 0:
            sent = self._via.object_of_first(self._sent)
            if any(each["place"][0] < furthest for each in everyone):
                optimizer = self._via.object_of_first(self._replica.whole_optimizer)
                self._replica.give_rests()
        else:
            self._replica.give_rests()
        self._via.sum_numbers([1.0])  # all have all: who fails from here on takes nothing with it
        with torch.no_grad():
            for flat, mean in zip(self._replica.flat_parameters.adopt(), made, strict=True):
                flat.copy_(mean)
        if behind and optimizer is not None:
            self._replica.take_whole_optimizer(*optimizer, settings_too=place < 0)
        self._place, self._averager.landed = furthest + 1, landed + 1
        # where a group that this rank has gone on in has failed at once, what it was then still holds
        self._behind = self._behind or behind
        # a batch that this rank has in hand itself is then of a step before
        self._feed.owes_step = self._feed.owes_step or (behind and everyone[0]["in_hand"])
        if sent is None:
            self._world = epoch.number
            self._progress.go_on(0, 0)
            self._begin_world()
        else:
            self._go_on(sent, mine, everyone, epoch.number)
            new = tuple(rank for rank, each in enumerate(everyone) if each["place"] == NOWHERE)
            step, took_s = self._progress.local_step, time.monotonic() - began
            self._heard.append(Regrouped(epoch.number, len(everyone), self._via.rank, epoch.left, new, step, took_s))

    def _made_one(self, everyone: Sequence[Facts]) -> list[torch.Tensor]:
        """The consensus of those that are furthest, beside this rank's own values, which stay."""
        weight = weights(everyone)[self._via.rank]
        with torch.no_grad():
            made = [flat.clone() for flat in self._replica.flat_parameters.adopt()]
            mean_values(self._via, made, weight)
        return made

    def _sent(self) -> State:
        """What the first rank tells the others, besides the model and the optimizer."""
        return {
            "local_step": self._progress.local_step,
            "rounds": self._progress.rounds,
            "told": self._told.state_dict(),
            "saving": self._told.saving,
            "clock": self._parts.clock.state_dict(),
            "outers": self._averager.outers(),
            "feed": self._feed.state_dict(),
            "carried": {name: thing.state_dict() for name, thing in self._carried.items()},
        }

    def _go_on(self, sent: State, mine: Facts, everyone: Sequence[Facts], number: int) -> None:
        """Be at the first rank's place; what is left of running passes is dealt anew."""
        furthest, is_new = everyone[0]["place"], mine["place"] == NOWHERE
        world = everyone[0]["world"]
        places = [(each["rank"], each) for each in everyone if each["world"] == world and each["place"] != NOWHERE]
        # who failed to take the place before this one has another deal: it takes the first rank's
        self._feed.regroup(places, everyone[0]["ranks"], None if mine["world"] == world else sent["feed"])
        self._world = number
        own = sum(each["own"] for each in everyone if each["place"] == furthest)
        if is_new:
            self._parts.clock.load_state_dict(sent["clock"])
            self._arrived = dict(sent["carried"])
        self._told.go_on(sent["told"], own)
        self._told.saving = sent["saving"]
        self._progress.go_on(sent["local_step"], sent["rounds"])
        self._begin_world(sent["outers"])
        self.is_new = self.is_new or is_new
        for name, thing in self._carried.items():
            if mine["place"][0] < furthest[0] and name in sent["carried"]:
                thing.load_state_dict(sent["carried"][name])
                self._arrived.pop(name, None)

    def _begin_world(self, outers: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Average in the world that the collectives have now; outer optimizers are the first rank's, where it has
        trained."""
        parts, plan = self._parts, self._told.plan
        self._averager.reopen(parts.settings.under(plan))
        if any(each.averages == "gradients" for each in self._told.controller.policy.plans()):
            self._via.for_gradients()  # now, while the store is there: it may be gone when it is first used
        if outers is not None:
            self._averager.load_outers(outers)
        self._timetable.begin_anew()
        parts.early.forget()
        if outers is not None and plan.averages == "gradients":
            parts.transition.unite()
        parts.transition.wrap(plan)
        parts.early.begin_round(plan)
        self._via.world.board.step = self._progress.local_step


def weights(everyone: Sequence[Facts]) -> list[float]:
    """Each member's share of the consensus: by the samples that those trained who are as far as the first."""
    apart = [each["apart"] if each["place"][1] == everyone[0]["place"][1] else 0 for each in everyone]
    total = sum(apart)
    return [each / total for each in apart] if total else [1.0, *(0.0 for _ in everyone[1:])]
