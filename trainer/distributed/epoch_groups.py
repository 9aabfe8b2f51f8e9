"""Process groups of an epoch's members: made when they are asked for, and left as they are when the epoch is over."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch.distributed import distributed_c10d

from trainer.distributed.store_client import StoreClient
from trainer.errors import ConfigError, PeerError, TooFewError

LOOK_S = 0.25
"""Seconds between two looks at whether the epoch is over."""
_abandoned: list[Any] = []
"""Groups whose collectives may hang for ever: ending them would wait for those."""


class EpochGroups:
    """The groups that one member makes.

    Args:
        address: of the store.
        timeout_s: of their collectives.
        broken: why the present epoch is over, where it is.
    """

    def __init__(self, address: str, timeout_s: float, broken: Callable[[], str | None]) -> None:
        self._address, self._timeout, self._broken = address, timedelta(seconds=timeout_s), broken
        # members wait in it for one another, which must not hold up other questions; a new connection may take seconds
        # where names are slow to resolve, so it is kept
        self._store: StoreClient | None = StoreClient(address)
        self._numbers = itertools.count()
        self._made: list[Any] = []

    def begin_epoch(self) -> None:
        """Groups are numbered anew."""
        self._numbers, self._made = itertools.count(), []

    def abandon(self) -> None:
        """Collectives of the present epoch have failed, or may hang: its groups are left as they are."""
        _abandoned.extend(self._made)
        self._made = []

    def new(self, prefix: str, rank: int, size: int) -> Any:
        """A further group; all members call this, in one order.

        Args:
            prefix: of the epoch's keys.
            rank: this member's.
            size: of the group.

        Raises:
            PeerError: a member went away before it was made, or the store is gone.
        """
        if self._store is None:
            try:
                self._store = StoreClient(self._address)
            except ConfigError as error:
                raise TooFewError(f"the store at {self._address} is gone") from error
        store = distributed_c10d.PrefixStore(f"{prefix}/group-{next(self._numbers)}", self._store.raw)
        group = self._watched(lambda: distributed_c10d.ProcessGroupGloo(store, rank, size, self._timeout))
        self._made.append(group)
        return group

    def _watched(self, make: Callable[[], Any]) -> Any:
        """Make what may hang where a member has gone; it is then left to itself, with the connection that it holds."""
        found: list[Any] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                found.append(make())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="joining a group", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(LOOK_S)
            if thread.is_alive() and (why := self._broken()):
                self._store = None
                raise PeerError(f"joining the new group failed: {why}")
        if failed:
            self._store = None
            raise PeerError(f"joining the new group failed: {str(failed[0]).splitlines()[0]}") from failed[0]
        return found[0]
