"""The board: a rank that leaves says why, and those who wait for it read it."""

from __future__ import annotations

import itertools
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

PATIENCE_S = 1.0
"""Seconds that the store may take to answer."""
_opened: weakref.WeakKeyDictionary[Any, Iterator[int]] = weakref.WeakKeyDictionary()
"""Numbers of the boards to come, by store."""


@dataclass
class Board:
    """Keys of the process group's store, one a rank that left. Without a store nothing is said and nothing is read.

    Every rank opens its boards in one order, so that all mean the same keys.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    prefix: str = ""
    step: int = 0
    """The local step that this rank is at: a peer that ended its loop before it will not come any more."""
    _word: tuple[str, int | None] | None = None

    @classmethod
    def open(cls, rank: int, size: int, group: Any = None) -> Board:
        """The board of a process group's ranks; every rank of it calls this, as often as the others."""
        ranks = "all" if group is None else "-".join(map(str, dist.get_process_group_ranks(group)))
        store = dist.distributed_c10d._get_default_store()
        number = next(_opened.setdefault(store, itertools.count()))
        return cls(rank, size, store, f"ebbtide/{ranks}/{number}")

    def begin(self) -> None:
        """This rank takes part from its first step on: what it said of an earlier loop counts no more."""
        self.step = 0
        if self._word is not None:
            self._word = None
            self._write()

    def say(self, reason: str, *, after_step: int | None = None) -> None:
        """Tell the others why this rank leaves; the latest word counts, and a store that is gone is no error.

        Args:
            reason: goes on after "rank 3", in one line.
            after_step: the last local step that this rank takes part in; None: it takes part in nothing any more.
        """
        self._word = reason, after_step
        self._write()

    @contextmanager
    def saying(self, reason: str, after_step: int) -> Iterator[None]:
        """Say so for the block's time: a peer that is past that step would wait for this rank in vain."""
        if self._word is not None:  # what was said first tells more
            yield
            return
        self._word = word = reason, after_step
        self._write()
        try:
            yield
        finally:
            if self._word is word:  # else this rank leaves, and has said why
                self._word = None
                self._write()

    def _write(self) -> None:
        def work() -> None:
            self.store.set(self._key(self.rank), json.dumps(self._word))
            self.store.set(f"{self.prefix}/any", "1")

        self._bounded(work)

    def _bounded(self, work: Callable[[], Any]) -> Any:
        """The answer of `work`, which asks the store, or None: a store that is gone or silent is asked no more.

        Its host may have left first, or the cable may be cut; neither leaving nor waiting may fail or hang for it.
        """
        if self.store is None:
            return None
        found: list[Any] = []

        def ask() -> None:
            with suppress(Exception):
                found.append(work())

        asking = threading.Thread(target=ask, name="board", daemon=True)
        asking.start()
        asking.join(PATIENCE_S)
        if asking.is_alive():
            self.store = None
        return found[0] if found else None

    def gone(self, patience_s: float = 0.0) -> dict[int, str]:
        """The other ranks that will not take part in this rank's step, and why; waits so long for the first word."""
        deadline = time.monotonic() + (patience_s if self.store is not None else 0.0)
        while not (found := self._bounded(lambda: dict(self._gone())) or {}) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def _gone(self) -> Iterator[tuple[int, str]]:
        if not self.store.check([f"{self.prefix}/any"]):
            return
        for rank in range(self.size):
            if rank != self.rank and self.store.check([self._key(rank)]):
                word = json.loads(self.store.get(self._key(rank)))
                if word is not None and (word[1] is None or word[1] < self.step):
                    yield rank, word[0]

    def _key(self, rank: int) -> str:
        return f"{self.prefix}/{rank}"


def told(error: BaseException) -> str:
    """An error as a reason to leave, in one line."""
    text = " ".join(str(error).split())
    return f"left with {type(error).__name__}" + (f": {text[:300]}" if text else "")
