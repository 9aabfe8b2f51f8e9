"""Who takes part, where ranks come and go: members meet at a store that outlives each of them, and agree on epochs.

An *epoch* is an ordered list of members. The store holds one list an epoch, written once, so that there is no second
opinion. A member that notices a failure asks for the next epoch; all that are alive come, and go on without the rest.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from trainer.errors import ConfigError, MismatchError, PeerError, TooFewError

T = TypeVar("T")
HEART_S = 1.0
"""Seconds between two signs of life."""
SILENT_BEATS = 3
"""So many missing ones, and a member is taken to be frozen or cut off."""
LOOK_S = 0.25
"""Seconds between two looks at the store while a collective is waited for."""
PAUSE_S = 0.01
"""The same while an epoch is agreed on."""
PROBE_S = 0.3
"""Seconds that a living host may take to answer."""
STORE_S = 10.0
"""Seconds that the store may take to answer before the first member gives up."""
NOWHERE = [-1, -1]
"""The place of a member that is new."""
_abandoned: list[Any] = []
"""Groups whose collectives may hang for ever: ending them would wait for those."""


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
        self._address, self._host, self._port = address, *_host_and_port(address)
        self._store = _Store(self._connect())
        self.epoch: Epoch | None = None
        """The present one; None before the first."""
        self.knocked = False
        """A newcomer waits to be let in."""
        self._run = 0
        """Of those that the members meet for, one after another."""
        self._earlier: tuple[int, ...] = ()
        """Who ended the run before together: those of them that are alive begin the next."""
        self._closed = False
        self._groups: Iterator[int] = itertools.count()
        self._made: list[Any] = []
        self._hearts: dict[int, tuple[bytes, float]] = {}
        self._check_job(job)
        self.number = self._store.add(_key("count"), 1) - 1
        """This member's."""
        self._listener = self._listen()
        self._beat(self._store, 0)
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._beating.start()

    def _connect(self) -> Any:
        try:
            return dist.TCPStore(  # type: ignore[attr-defined]  # public, though its stub forgets it
                self._host, self._port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=STORE_S)
            )
        except Exception as error:
            raise ConfigError(
                f"elastic = {self._address!r}: no store answers there; start one with "
                f"python -m trainer.store --port {self._port}"
            ) from error

    def _check_job(self, job: str) -> None:
        theirs = self._store.compare_set(_key("job"), "", job or "-").decode()
        if theirs != (job or "-"):
            raise MismatchError(
                f"the members at {self._address} run another job ({theirs}, this one is {job or '-'}): give all the "
                "same configuration, or this run a store of its own"
            )

    def _listen(self) -> socket.socket:
        """A port that answers as long as this process lives."""
        family = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect((self._host, self._port))
            own = way.getsockname()[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((own, 0))
        listener.listen(64)
        self._store.set(_key("at", self.number), json.dumps([own, listener.getsockname()[1]]))
        threading.Thread(target=_answer, args=(listener,), name="alive", daemon=True).start()
        return listener

    # ---- signs of life

    def _beat(self, store: Any, beat: int) -> None:
        store.set(_key("heart", self.number), str(beat))

    def _keep_beating(self) -> None:
        with suppress(Exception):  # a store that is gone is noticed by whoever needs it
            store = _Store(self._connect())  # of its own, so that no other call holds it up
            for beat in itertools.count(1):
                if self._ended.wait(HEART_S):
                    return
                self._beat(store, beat)
                epoch = self.epoch
                self.knocked = epoch is not None and store.add(self._key("knocks"), 0) > epoch.heard

    def _silent(self, numbers: Sequence[int]) -> set[int]:
        """Those whose hearts have stood still as long as this process has looked, and long enough."""
        now = time.monotonic()
        silent: set[int] = set()
        if not numbers:
            return silent
        for number, beat in zip(numbers, self._store.multi_get([_key("heart", n) for n in numbers]), strict=True):
            before, since = self._hearts.get(number, (b"", now))
            if beat != before or now - since > 10 * HEART_S * SILENT_BEATS:  # or this process has not looked
                self._hearts[number] = beat, now
            elif now - since > HEART_S * SILENT_BEATS:
                silent.add(number)
        return silent

    def _refuses(self, number: int) -> bool:
        """Whether the host answers that the process is not there."""
        try:
            host, port = json.loads(self._store.get(_key("at", number)))
            socket.create_connection((host, port), PROBE_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False

    def _gone(self, numbers: Sequence[int]) -> dict[int, str]:
        """Those that will not come, and why."""
        found = {}
        for number in numbers:
            if self._store.check([self._key("left", number)]):
                found[number] = self._store.get(self._key("left", number)).decode()
            elif self._refuses(number):
                found[number] = "ended without a word"
        silent = self._silent([number for number in numbers if number not in found])
        return found | dict.fromkeys(silent, f"gave no sign of life for {SILENT_BEATS * HEART_S:g} s")

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
        silent = self._silent([number for number in self.epoch.members if number != self.number])
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
        self._ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

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
        for n in range(self._store.add(_key("count"), 0)):
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
                here = sum(self._is_here(0, n) for n in range(self._store.add(_key("count"), 0)))
                said = (
                    f"{here} of {len(self._earlier) or self.ranks} ranks came"
                    if now == 0
                    else "no member let this one in"
                )
                raise TooFewError(f"{said} {waited}")
            time.sleep(PAUSE_S)

    def _propose_first(self) -> None:
        here = [n for n in range(self._store.add(_key("count"), 0)) if self._is_here(0, n)]
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
        self._groups, self._made = itertools.count(), []
        self._hearts.clear()
        self.knocked = False

    def _named(self, reasons: Mapping[int, str]) -> str:
        """Members as ranks, each with its reason."""
        members = self.epoch.members if self.epoch is not None else ()
        return "; ".join(f"rank {members.index(n)} {why}" for n, why in reasons.items() if n in members)

    def _key(self, *parts: Any) -> str:
        """Of what the present run keeps in the store."""
        return _key(f"run-{self._run}", *parts)

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
        # a connection of its own, which may wait without holding up this process's other questions
        try:
            store = distributed_c10d.PrefixStore(f"{self.prefix}/group-{next(self._groups)}", self._connect())
        except ConfigError as error:
            raise TooFewError(f"the store at {self._address} is gone") from error
        timeout = timedelta(seconds=self.timeout_s)
        group = self._watched(
            lambda: distributed_c10d.ProcessGroupGloo(store, rank, size, timeout), "joining the new group"
        )
        self._made.append(group)
        return group

    def abandon(self) -> None:
        """Collectives of the present epoch have failed, or may hang: its groups are left as they are."""
        _abandoned.extend(self._made)
        self._made = []

    def _watched(self, work: Callable[[], T], what: str) -> T:
        """Do what may hang where a member has gone; it is then left to itself."""
        found: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                found.append(work())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name=what, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_S)
            if thread.is_alive() and (why := self.broken()):
                raise PeerError(f"{what} failed: {why}")
        if failed:
            raise PeerError(f"{what} failed: {str(failed[0]).splitlines()[0]}") from failed[0]
        return found[0]


class _Store:
    """A store that is asked no more once its connection is lost: the backend says each failure in a page of its own."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._lost: str | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._store, name)

        def ask(*args: Any) -> Any:
            if self._lost is not None:
                raise RuntimeError(self._lost)
            try:
                return call(*args)
            except dist.DistNetworkError as error:
                self._lost = str(error)
                raise

        return ask


def hangs() -> bool:
    """Whether this process has had a group whose collectives may still hang; it must end without an orderly goodbye."""
    return bool(_abandoned)


def _answer(listener: socket.socket) -> None:
    with suppress(OSError):
        while True:
            listener.accept()[0].close()


def _key(*parts: Any) -> str:
    return "/".join(("ebbtide-members", *map(str, parts)))


def _difference(
    theirs: Mapping[str, str], ours: Mapping[str, str], sides: tuple[str, str] = ("here", "on the members")
) -> str:
    """The first thing in which these differ, in one line."""
    name = next(name for name in (*ours, *theirs) if theirs.get(name) != ours.get(name))
    first, second = (f"{of.get(name, 'missing')} {side}" for of, side in zip((theirs, ours), sides, strict=True))
    return f"the {name} is {first} but {second}; give all ranks the same"


def _host_and_port(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"elastic = {address!r}: must be host:port of the store that members meet at")
    return host.strip("[]"), int(port)
