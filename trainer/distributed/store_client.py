"""A connection to the store that members meet at, as `python -m trainer.store` serves it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.errors import ConfigError

ANSWER_S = 10.0
"""Seconds that the store may take to answer a new connection."""


class StoreClient:
    """A connection that is asked no more once it is lost: the backend says each failure in a page of its own.

    It has the methods of torch's TCPStore.
    """

    def __init__(self, address: str) -> None:
        """Connect to host:port.

        Raises:
            ConfigError: no address, or nobody answers there.
        """
        host, port = host_and_port(address)
        try:
            self.raw = dist.TCPStore(  # type: ignore[attr-defined]  # public, though its stub forgets it
                host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_S)
            )
        except Exception as error:
            raise ConfigError(
                f"elastic = {address!r}: no store answers there; start one with python -m trainer.store --port {port}"
            ) from error
        self._lost: str | None = None

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self.raw, name)

        def ask(*args: Any) -> Any:
            if self._lost is not None:
                raise RuntimeError(self._lost)
            try:
                return call(*args)
            except dist.DistNetworkError as error:
                self._lost = str(error)
                raise

        return ask


def host_and_port(address: str) -> tuple[str, int]:
    """The two parts of an address.

    Raises:
        ConfigError: it has none.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"elastic = {address!r}: must be host:port of the store that members meet at")
    return host.strip("[]"), int(port)


def key(*parts: Any) -> str:
    """A key of the members' own."""
    return "/".join(("ebbtide-members", *map(str, parts)))
