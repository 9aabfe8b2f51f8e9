"""How many local steps an average may take: fixed, or as many as hide the transfer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from trainer.settings import SyncConfig

REMEMBERED = 5  # transfers: one slow one changes nothing


class Delay:
    """The delay of the next transfer. Every rank computes it from what all ranks told, so it is one on all."""

    def __init__(self, settings: SyncConfig) -> None:
        self._most = settings.max_delay_steps
        self._needed: list[float] = []

    def steps(self, asked: int | Literal["auto"], period: int) -> int:
        """Local steps, never more than a round's; `auto` waits for its first transfers, to measure them."""
        measured = min(math.ceil(statistics.median(self._needed)), self._most) if self._needed else 0
        return min(measured if asked == "auto" else asked, period)

    def forget(self) -> None:
        """What is sent has changed: measure again."""
        self._needed = []

    def saw(self, headers: Sequence[Mapping[str, float]]) -> None:
        """Note what all ranks told of their latest transfer."""
        slowest = max(header["transfer_s"] for header in headers)
        steps = sum(header["steps"] for header in headers)
        compute_s = sum(header["compute_s"] for header in headers)
        if steps and compute_s > 0 and math.isfinite(slowest):
            self._needed = [*self._needed, slowest / (compute_s / steps)][-REMEMBERED:]

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"needed": self._needed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._needed = list(state["needed"])
