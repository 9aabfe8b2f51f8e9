"""Small messages between all ranks without a collective, so that a thread beside training may wait for them."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from typing import Any

from trainer.distributed.board import PATIENCE_S
from trainer.distributed.world import World
from trainer.errors import PeerError

LOOKS_S = 0.005, 0.25
"""Seconds between two looks at the store: the first, and at most."""


class Meeting:
    """Ranks gather JSON values through the process group's store; a world of one needs none.

    One thread of each rank uses it. Every gathering has a name of its own, so a rank that missed one is at the next.
    """

    def __init__(self, world: World) -> None:
        self._world, self._store = world, world.board.store
        self._told: list[str] = []
        """Keys that rank 0 has told under and not deleted."""
        self._closed = False

    def close(self) -> None:
        """Wait for nobody any more."""
        self._closed = True

    def gather(self, name: str, thing: Any) -> list[Any]:
        """Every rank's thing, by rank.

        Args:
            name: of this gathering, the same on every rank and never used again.
            thing: this rank's.

        Raises:
            PeerError: a peer left or did not answer in time.
        """
        if self._world.size == 1:
            return [thing]
        try:
            everyone: list[Any] = self._gathered(f"{self._world.board.prefix}/meeting/{name}", json.dumps(thing))
        except RuntimeError as error:  # the store is gone
            raise error if isinstance(error, PeerError) else PeerError(str(error).split("\n")[0]) from error
        return everyone

    def _gathered(self, key: str, mine: str) -> Any:
        if self._world.rank != 0:
            self._store.set(f"{key}/{self._world.rank}", mine)
            return json.loads(self._await(f"{key}/all"))
        others = [f"{key}/{rank}" for rank in range(1, self._world.size)]
        told = f"[{', '.join([mine, *map(self._await, others)])}]"
        # whoever has come here has read what was told before
        for old in (*others, *self._told):
            with suppress(RuntimeError, NotImplementedError):
                self._store.delete_key(old)
        self._store.set(f"{key}/all", told)
        self._told = [f"{key}/all"]
        return json.loads(told)

    def _await(self, key: str) -> str:
        deadline, pause, look_at = time.monotonic() + self._world.timeout_s, LOOKS_S[0], time.monotonic() + PATIENCE_S
        while not self._store.check([key]):
            now = time.monotonic()
            if self._closed or now > deadline:
                raise PeerError(f"a rank did not answer in {self._world.timeout_s:g} s")
            if now > look_at:
                look_at = now + PATIENCE_S
                if gone := self._world.board.gone():
                    raise PeerError("; ".join(f"rank {rank} {why}" for rank, why in gone.items()))
            time.sleep(pause)
            pause = min(2 * pause, LOOKS_S[1])
        return bytes(self._store.get(key)).decode()
