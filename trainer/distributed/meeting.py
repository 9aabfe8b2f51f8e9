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

    One thread of each rank uses it, and all gather in one order.
    """

    def __init__(self, world: World) -> None:
        self._world, self._store = world, world.board.store
        self._count = 0
        self._closed = False

    def close(self) -> None:
        """Wait for nobody any more."""
        self._closed = True

    def gather(self, thing: Any, about: str) -> list[Any]:
        """Every rank's thing, by rank.

        Raises:
            PeerError: a peer left or did not answer in time; names what this was about.
        """
        if self._world.size == 1:
            return [thing]
        self._count += 1
        try:
            everyone: list[Any] = self._gathered(json.dumps(thing), about)
        except RuntimeError as error:  # the store is gone
            raise error if isinstance(error, PeerError) else PeerError(f"{about}: {error}") from error
        return everyone

    def _gathered(self, mine: str, about: str) -> Any:
        if self._world.rank != 0:
            self._store.set(self._key(self._world.rank), mine)
            return json.loads(self._await(self._key("all"), about))
        others = [self._key(rank) for rank in range(1, self._world.size)]
        told = f"[{', '.join([mine, *(self._await(key, about) for key in others)])}]"
        self._store.set(self._key("all"), told)
        # whoever has come to this meeting has read what the one before it told
        for key in (*others, self._key("all", self._count - 1)):
            with suppress(RuntimeError, NotImplementedError):
                self._store.delete_key(key)
        return json.loads(told)

    def _await(self, key: str, about: str) -> str:
        deadline, pause, look_at = time.monotonic() + self._world.timeout_s, LOOKS_S[0], time.monotonic() + PATIENCE_S
        while not self._store.check([key]):
            now = time.monotonic()
            if self._closed or now > deadline:
                raise PeerError(f"{about}: a rank did not answer in {self._world.timeout_s:g} s")
            if now > look_at:
                look_at = now + PATIENCE_S
                if gone := self._world.board.gone():
                    raise PeerError(f"{about}: {'; '.join(f'rank {rank} {why}' for rank, why in gone.items())}")
            time.sleep(pause)
            pause = min(2 * pause, LOOKS_S[1])
        return bytes(self._store.get(key)).decode()

    def _key(self, who: int | str, count: int | None = None) -> str:
        return f"{self._world.board.prefix}/meeting/{self._count if count is None else count}/{who}"
