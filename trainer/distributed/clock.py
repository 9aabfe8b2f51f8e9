"""Where a rank's wall time went: one clock, read in seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

WAITS = ("sync_wait", "input_wait")
Off = Literal["eval", "checkpoint", "other"]
Wait = Literal["sync_wait", "input_wait"]


@dataclass
class Clock:
    """Training time (`elapsed_s`) runs from `start` on, except inside `off`; waits are parts of it.

    On CUDA work is asynchronous, so the clock synchronizes the device before it reads at a boundary (`off`, a
    blocking wait, `read`), and measures overlapped communication by events on the stream.
    """

    device: torch.device
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys((*WAITS, "eval", "checkpoint", "other"), 0.0)
    )
    _trained_s: float = 0.0
    _since: float | None = None
    _overlap_from: Any = None
    _is_waiting: bool = False
    _overlaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    def start(self) -> None:
        """Let training time run."""
        if self._since is None:
            self._since = self._now()

    def stop(self) -> None:
        """Stop training time."""
        if self._since is not None:
            self._trained_s += self._now() - self._since
            self._since = None

    @contextmanager
    def off(self, what: Off) -> Iterator[None]:
        """Work that is not training: off the training clock, and counted under its own name."""
        running = self._since is not None
        self.stop()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += self._now() - began
            if running:
                self.start()

    @contextmanager
    def waiting(self, what: Wait) -> Iterator[None]:
        """A wait of the training thread; counted while training time runs, and once where waits are nested."""
        if self._is_waiting:
            yield
            return
        self._is_waiting = True
        began = self._now() if what == "sync_wait" else time.perf_counter()
        try:
            yield
        finally:
            self._is_waiting = False
            ended = self._now() if what == "sync_wait" else time.perf_counter()
            if self._since is not None:
                self.seconds[what] += ended - began

    def overlap_begins(self) -> None:
        """Compute that hides communication is over: from here to `overlap_ends` the wait is exposed."""
        self._overlap_from = self._event() if self.device.type == "cuda" else time.perf_counter()

    def overlap_ends(self) -> None:
        """The communication that was being hidden is done; nothing happens where none had begun."""
        began, self._overlap_from = self._overlap_from, None
        if began is None:
            return
        if self.device.type == "cuda":
            self._overlaps.append((began, self._event()))
        else:
            self.seconds["sync_wait"] += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        """Seconds so far: elapsed_s = compute_s + sync_wait_s + input_wait_s, and eval_s, checkpoint_s beside it."""
        now = self._now()
        for began, ended in self._overlaps:
            self.seconds["sync_wait"] += began.elapsed_time(ended) / 1_000
        self._overlaps.clear()
        elapsed = self._trained_s + (now - self._since if self._since is not None else 0.0)
        compute = elapsed - sum(self.seconds[name] for name in WAITS)
        return {"elapsed_s": elapsed, "compute_s": compute} | {f"{name}_s": s for name, s in self.seconds.items()}

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far, for a checkpoint."""
        return {"elapsed_s": self.read()["elapsed_s"], "seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's seconds."""
        self._trained_s, self.seconds = state["elapsed_s"], dict(state["seconds"])
        if self._since is not None:
            self._since = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            # this stream's work only: an average beside training must neither be waited for nor pass for compute
            torch.cuda.current_stream(self.device).synchronize()
        return time.perf_counter()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # no annotations in torch
        event.record()
        return event
