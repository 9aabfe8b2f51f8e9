"""Signs of life: a member gives them, and looks for those of others.

A process that is gone is told by its host, which refuses a connection to the port that it listened at. One that is
frozen or cut off is told by its heartbeat in the store, which stands still.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from trainer.distributed.store_client import StoreClient, host_and_port, key

HEART_S = 1.0
"""Seconds between two signs of life."""
SILENT_BEATS = 3
"""So many missing ones, and a member is taken to be frozen or cut off."""
PROBE_S = 0.3
"""Seconds that a living host may take to answer."""


class Alive:
    """This member's signs of life, from now until `close`.

    Args:
        number: this member's.
        address: of the store.
        store: the connection that other members are looked for with.
        at_beat: done at each beat, with the connection of the heartbeat's own thread.
    """

    def __init__(self, number: int, address: str, store: StoreClient, at_beat: Callable[[StoreClient], None]) -> None:
        self._number, self._store, self._at_beat = number, store, at_beat
        self._hearts: dict[int, tuple[bytes, float]] = {}
        self._ended = threading.Event()
        self._listener = self._listen(*host_and_port(address))
        self._store.set(key("heart", number), "0")
        own = StoreClient(address)  # so that no other question holds it up
        threading.Thread(target=self._beat, args=(own,), name="heartbeat", daemon=True).start()

    def _listen(self, host: str, port: int) -> socket.socket:
        """A port that answers as long as this process lives, on the network that leads to the store."""
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as way:
            way.connect((host, port))
            own = way.getsockname()[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind((own, 0))
        listener.listen(64)
        self._store.set(key("at", self._number), json.dumps([own, listener.getsockname()[1]]))
        threading.Thread(target=_answer, args=(listener,), name="alive", daemon=True).start()
        return listener

    def _beat(self, store: StoreClient) -> None:
        with suppress(Exception):  # a store that is gone is noticed by whoever needs it
            for beat in itertools.count(1):
                if self._ended.wait(HEART_S):
                    return
                store.set(key("heart", self._number), str(beat))
                self._at_beat(store)

    def close(self) -> None:
        """Give no more."""
        self._ended.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    # ---- others

    def look_anew(self) -> None:
        """What was seen of others counts no more."""
        self._hearts.clear()

    def silent(self, numbers: Sequence[int]) -> set[int]:
        """Those whose hearts have stood still as long as this process has looked, and long enough."""
        now = time.monotonic()
        found: set[int] = set()
        if not numbers:
            return found
        for number, beat in zip(numbers, self._store.multi_get([key("heart", n) for n in numbers]), strict=True):
            before, since = self._hearts.get(number, (b"", now))
            if beat != before or now - since > 10 * HEART_S * SILENT_BEATS:  # or this process has not looked
                self._hearts[number] = beat, now
            elif now - since > HEART_S * SILENT_BEATS:
                found.add(number)
        return found

    def gone(self, numbers: Sequence[int]) -> dict[int, str]:
        """Those that are not there any more, and what is known of why."""
        ended = [number for number in numbers if self._refuses(number)]
        silent = self.silent([number for number in numbers if number not in ended])
        told = dict.fromkeys(silent, f"gave no sign of life for {SILENT_BEATS * HEART_S:g} s")
        return dict.fromkeys(ended, "ended without a word") | told

    def _refuses(self, number: int) -> bool:
        """Whether the host answers that the process is not there."""
        try:
            host, port = json.loads(self._store.get(key("at", number)))
            socket.create_connection((host, port), PROBE_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return False


def _answer(listener: socket.socket) -> Any:
    with suppress(OSError):
        while True:
            listener.accept()[0].close()
