"""Who takes part, where ranks come and go: members meet at a store that outlives each of them, and agree on epochs.

An *epoch* is an ordered list of members. The store holds one list an epoch, written once, so that there is no second
opinion. A member that notices a failure asks for the next epoch; all that are alive come, and go on without the rest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from trainer.distributed.alive import Alive
from trainer.distributed.epoch_groups import LOOK_S, EpochGroups
from trainer.distributed.store_client import StoreClient, key
from trainer.errors import ConfigError, MismatchError, PeerError, TooFewError

PAUSE_S = 0.01
"""Seconds between two looks at the store while an epoch is agreed on."""
NOWHERE = [-1, -1]
"""The place of a member that is new."""


@dataclass(frozen=True)
class Epoch:
    """The members that take part, in order: the place is the rank."""

    number: int
    members: tuple[int, ...]
    facts: tuple[Mapping[str, Any], ...]
    """What each told on coming."""
    left: Mapping[int, str]
    """The ranks of the epoch before that are not in it, and why."""
    heard: int
    """Knocks of newcomers that were answered: let in, refused, or found gone."""


class Members:
    """This process among the members of a run; a member number is never used again.

    One after another they may meet for several runs: the next begins once all have ended the one before.

    Args:
        address: host:port of the store, as `python -m trainer.store` serves it.
        ranks: members that the run begins with.
        min_ranks: fewer than so many end the run.
        max_ranks: more than so many are refused; None: any number.
        timeout_s: seconds after which a collective or a meeting that has not ended is an error.
        job: what is run; members with another are refused.

    Raises:
        ConfigError: no store answers, or numbers that do not go together.
        MismatchError: the members at this store run another job.
    """

    def __init__(
        self,
        address: str,
        *,
        ranks: int = 1,
        min_ranks: int = 1,
        max_ranks: int | None = None,
        timeout_s: float = 300.0,
        job: str = "",
    ) -> None:
        if not 1 <= min_ranks <= ranks:
            raise ConfigError(f"min_ranks = {min_ranks}: must be in 1 .. {ranks}, the ranks that the run begins with")
        if max_ranks is not None and max_ranks < ranks:
            raise ConfigError(f"max_ranks = {max_ranks}: must be at least {ranks}, the ranks that the run begins with")
        self.ranks, self.min_ranks, self.max_ranks, self.timeout_s = ranks, min_ranks, max_ranks, timeout_s
        self._address, self._store = address, StoreClient(address)
        self.epoch: Epoch | None = None
        """The present one; None before the first."""
        self.knocked = False
        """A newcomer waits to be let in."""
        self._run = 0
        """Of those that the members meet for, one after another."""
        self._earlier: tuple[int, ...] = ()
        """Who ended the run before together: those of them that are alive begin the next."""
        self._closed = False
        self._check_job(job)
        self._groups = EpochGroups(address, timeout_s, self.broken)
        self.number = self._store.add(key("count"), 1) - 1
        """This member's."""
        self._alive = Alive(self.number, address, self._store, self._hear_knocks)

    def _check_job(self, job: str) -> None:
        theirs = self._store.compare_set(key("job"), "", job or "-").decode()
        if theirs != (job or "-"):
            raise MismatchError(
                f"the members at {self._address} run another job ({theirs}, this one is {job or '-'}): give all the "
                "same configuration, or this run a store of its own"
            )

    # ---- who is there

    def _hear_knocks(self, store: StoreClient) -> None:
        epoch = self.epoch
        self.knocked = epoch is not None and store.add(self._key("knocks"), 0) > epoch.heard

    def _gone(self, numbers: Sequence[int]) -> dict[int, str]:
        """Those that will not come, and why."""
        told = [number for number in numbers if self._store.check([self._key("left", number)])]
        reasons = {number: self._store.get(self._key("left", number)).decode() for number in told}
        return reasons | self._alive.gone([number for number in numbers if number not in reasons])

    def broken(self) -> str | None:
        """Why the present epoch is over, where it is: some member asks for the next, or one is gone. None also where
        the store is gone, since the members need not be."""
        with suppress(RuntimeError, OSError):
            return self._broken()
        return None

    def _broken(self) -> str | None:
        assert self.epoch is not None
        asked = self._key(self.epoch.number + 1, "asked")
        if self._store.check([asked]):
            return str(self._store.get(asked).decode())
        silent = self._alive.silent([number for number in self.epoch.members if number != self.number])
        return self._named(dict.fromkeys(silent, "gives no sign of life")) if silent else None

    def ask(self, reason: str) -> None:
        """Tell the others that the present epoch is over."""
        if self.epoch is not None:
            with suppress(RuntimeError, OSError):  # a store that is gone is told of when they meet
                self._store.set(self._key(self.epoch.number + 1, "asked"), reason)

    def leave(self, reason: str) -> None:
        """Take no further part; the others need not wait."""
        with suppress(Exception):
            self._store.set(self._key("left", self.number), reason)

    def end(self, reason: str) -> None:
        """Leave a run that all end together; who begins again meets the others for the next one."""
        assert self.epoch is not None
        self.leave(reason)
        self._earlier, self.epoch = self.epoch.members, None
        self._run += 1

    def begin(self) -> None:
        """Take part, also after a `leave`; the next `meet` is a newcomer's.

        Raises:
            ConfigError: they are closed.
        """
        self._require_open()
        self.epoch = None
        with suppress(Exception):
            self._store.delete_key(self._key("left", self.number))

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("members are closed: close them after the last block of LocalSGD that they meet for")

    def close(self) -> None:
        """Give no more signs of life."""
        self._closed = True
        with suppress(Exception):
            self._store.compare_set(self._key("left", self.number), "", "ended")  # else it has said why
        self._alive.close()

    # ---- epochs

    def meet(self, facts: Mapping[str, Any], *, admit: bool = False, alike: Mapping[str, str] | None = None) -> Epoch:
        """Agree on the next epoch; all members that are alive come.

        Args:
            facts: this member's, plain values; `place`, two numbers, says how far it is, and orders the members.
            admit: let newcomers in; the same on all members.
            alike: by name, what newcomers must have as the members have it; others are refused.

        Raises:
            PeerError: too few are left, or they do not come in time; or the store is gone.
            MismatchError: this is a newcomer, and was refused; or those that begin differ.
            ConfigError: they are closed.
        """
        self._require_open()
        try:
            self._store.set(self._key("alike", self.number), json.dumps(dict(alike or {})))
            if self.epoch is not None:
                found = self._go_on(self.epoch, facts, admit=admit)
                if found is not None:
                    return found
            return self._come_new({**facts, "place": NOWHERE})
        except (RuntimeError, OSError) as error:
            if isinstance(error, PeerError | MismatchError):
                raise
            raise TooFewError(f"the store at {self._address} is gone ({str(error).splitlines()[0]})") from error

    def _go_on(self, before: Epoch, facts: Mapping[str, Any], *, admit: bool) -> Epoch | None:
        """The next epoch; None where it was agreed on without this member, which was taken to be gone."""
        number = before.number + 1
        self._store.set(self._key(number, "here", self.number), json.dumps(facts))
        self._store.set(self._key(number, "asked"), "a member asked for a new group")
        gone: dict[int, str] = {}
        deadline = time.monotonic() + self.timeout_s
        look_at = 0.0
        while not self._store.check([self._key(number)]):
            missing = [n for n in before.members if n not in gone and not self._is_here(number, n)]
            if not missing:
                self._propose(number, before, gone, admit=admit)
                continue
            now = time.monotonic()
            if now > look_at:
                gone |= self._gone(missing)
                look_at = now + LOOK_S / 2
            if now > deadline:
                raise PeerError(f"{self._named(dict.fromkeys(missing, 'did not come'))} in {self.timeout_s:g} s")
            time.sleep(PAUSE_S)
        epoch = self._read(number)
        if self.number not in epoch.members:
            return None
        self._enter(epoch)
        return epoch

    def _propose(self, number: int, before: Epoch, gone: Mapping[int, str], *, admit: bool) -> None:
        chosen = [n for n in before.members if n not in gone]
        if len(chosen) < self.min_ranks:
            why = f": {self._named(gone)}" if gone else ""
            raise TooFewError(f"{len(chosen)} of at least {self.min_ranks} ranks are left{why}")
        heard = before.heard
        if admit:
            heard = self._store.add(self._key("knocks"), 0)  # before looking: who knocks later is heard later
            chosen += self._let_in(number, before, len(chosen))
        facts = {n: json.loads(self._store.get(self._key(number, "here", n))) for n in chosen}
        order = sorted(chosen, key=lambda n: facts[n]["place"], reverse=True)  # stable: the oldest first
        left = {before.members.index(n): why for n, why in gone.items()}
        self._write(number, order, facts, left, heard)

    def _let_in(self, number: int, before: Epoch, count: int) -> list[int]:
        """Newcomers that wait and fit; others are told why not.

        Args:
            number: of the epoch that they wait for.
            before: the epoch before.
            count: members that it has without them.
        """
        mine = json.loads(self._store.get(self._key("alike", self.number)))
        found: list[int] = []
        for n in range(self._store.add(key("count"), 0)):
            if n in before.members or not self._is_here(number, n) or self._gone([n]):
                continue
            theirs = json.loads(self._store.get(self._key("alike", n)))
            full = self.max_ranks is not None and count + len(found) >= self.max_ranks
            if theirs != mine:
                self._store.set(self._key("refused", n), json.dumps([_difference(theirs, mine), True]))
            elif full:
                said = f"max_ranks = {self.max_ranks}: as many take part already"
                self._store.set(self._key("refused", n), json.dumps([said, False]))
            else:
                found.append(n)
        return found

    def _write(
        self, number: int, order: Sequence[int], facts: Mapping[int, Any], left: Mapping[int, str], heard: int = 0
    ) -> None:
        everyone = {"members": order, "facts": [facts[n] for n in order]}
        told = {**everyone, "left": [[*each] for each in left.items()], "heard": heard}
        self._store.compare_set(self._key(number), "", json.dumps(told))

    def _come_new(self, facts: Mapping[str, Any]) -> Epoch:
        """Be in the first epoch, or be let into a later one."""
        deadline, told = time.monotonic() + self.timeout_s, -1
        look_at = 0.0
        self._store.delete_key(self._key("refused", self.number))
        while True:
            now = self._store.add(self._key("now"), 0)  # epochs so far; each is written before it is counted
            if told >= 0 and self._store.check([self._key(told)]):
                epoch = self._read(told)
                if self.number in epoch.members:
                    self._enter(epoch)
                    return epoch
            if told >= 0 and self._store.check([self._key("refused", self.number)]):
                said, differs = json.loads(self._store.get(self._key("refused", self.number)))
                raise MismatchError(said) if differs else TooFewError(said)
            if now != told:
                self._store.set(self._key(now, "here", self.number), json.dumps(facts))
                told = now
                if now:  # again for each epoch, since an earlier knock is answered by one that it came too late for
                    self._store.add(self._key("knocks"), 1)
            if now == 0 and not self._earlier:
                self._propose_first()
            elif now == 0 and time.monotonic() > look_at:
                look_at = time.monotonic() + LOOK_S / 2
                self._propose_next_run()
            elif now and time.monotonic() > look_at:
                look_at = time.monotonic() + LOOK_S
                there = self._read(now - 1).members
                others = [n for n in there if n != self.number]
                if len(self._gone(others)) == len(others):
                    raise TooFewError(
                        f"the run whose members met at {self._address} has ended: start another store for another run"
                    )
            if time.monotonic() > deadline:
                waited = f"in {self.timeout_s:g} s"
                here = sum(self._is_here(0, n) for n in range(self._store.add(key("count"), 0)))
                said = (
                    f"{here} of {len(self._earlier) or self.ranks} ranks came"
                    if now == 0
                    else "no member let this one in"
                )
                raise TooFewError(f"{said} {waited}")
            time.sleep(PAUSE_S)

    def _propose_first(self) -> None:
        here = [n for n in range(self._store.add(key("count"), 0)) if self._is_here(0, n)]
        if len(here) < self.ranks or self._store.check([self._key(0)]):
            return
        here = [n for n in here if not self._gone([n])][: self.max_ranks]
        if len(here) >= self.ranks:
            self._write_first(here)

    def _propose_next_run(self) -> None:
        """The same, of a run that those begin who ended the one before, as far as they are alive."""
        gone = self._gone(self._earlier)
        here = [n for n in self._earlier if n not in gone]
        if not all(self._is_here(0, n) for n in here) or self._store.check([self._key(0)]):
            return
        if len(here) < self.min_ranks:
            raise TooFewError(f"{len(here)} of at least {self.min_ranks} ranks are left")
        self._write_first(here)

    def _write_first(self, here: Sequence[int]) -> None:
        """Begin a run with these members.

        Raises:
            MismatchError: they do not run the same.
        """
        alike = {n: json.loads(self._store.get(self._key("alike", n))) for n in here}
        other = next((n for n in here if alike[n] != alike[here[0]]), None)
        if other is not None:
            raise MismatchError(_difference(alike[other], alike[here[0]], ("on a rank", "on another")))
        facts = {n: json.loads(self._store.get(self._key(0, "here", n))) for n in here}
        self._write(0, here, facts, {})

    def _is_here(self, number: int, member: int) -> bool:
        return bool(self._store.check([self._key(number, "here", member)]))

    def _read(self, number: int) -> Epoch:
        told = json.loads(self._store.get(self._key(number)))
        return Epoch(number, tuple(told["members"]), tuple(told["facts"]), dict(told["left"]), told["heard"])

    def _enter(self, epoch: Epoch) -> None:
        self.epoch = epoch
        # the first to enter counts it: `now` is never behind by more than the members that are on their way
        if (
            self._store.compare_set(self._key(epoch.number, "entered"), "", str(self.number))
            == str(self.number).encode()
        ):
            self._store.add(self._key("now"), 1)
        self._groups.begin_epoch()
        self._alive.look_anew()
        self.knocked = False

    def _named(self, reasons: Mapping[int, str]) -> str:
        """Members as ranks, each with its reason."""
        members = self.epoch.members if self.epoch is not None else ()
        return "; ".join(f"rank {members.index(n)} {why}" for n, why in reasons.items() if n in members)

    def _key(self, *parts: Any) -> str:
        """Of what the present run keeps in the store."""
        return key(f"run-{self._run}", *parts)

    # ---- collectives of the epoch

    @property
    def store(self) -> Any:
        """The store."""
        return self._store

    @property
    def prefix(self) -> str:
        """Of what the present epoch keeps in the store."""
        assert self.epoch is not None
        return self._key(self.epoch.number, "epoch")

    def new_group(self) -> Any:
        """A process group of the present epoch; all its members call this, in one order.

        Raises:
            PeerError: a member went away before it was made, or the store is gone.
        """
        assert self.epoch is not None
        rank, size = self.epoch.members.index(self.number), len(self.epoch.members)
        return self._groups.new(self.prefix, rank, size)

    def abandon(self) -> None:
        """Collectives of the present epoch have failed, or may hang: its groups are left as they are."""
        self._groups.abandon()


def _difference(
    theirs: Mapping[str, str], ours: Mapping[str, str], sides: tuple[str, str] = ("here", "on the members")
) -> str:
    """The first thing in which these differ, in one line."""
    name = next(name for name in (*ours, *theirs) if theirs.get(name) != ours.get(name))
    first, second = (f"{of.get(name, 'missing')} {side}" for of, side in zip((theirs, ours), sides, strict=True))
    return f"the {name} is {first} but {second}; give all ranks the same"
