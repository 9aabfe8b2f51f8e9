"""One thread beside training, which runs what it is given in order; on CUDA on a stream of its own."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")


class Task(Generic[T]):
    """Work that was handed over; `result` waits for it."""

    def __init__(self, work: Callable[[], T], device: torch.device) -> None:
        self.work, self._device = work, device
        self.ready = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
        self.future: Future[T] = Future()
        self.finished: torch.cuda.Event | None = None

    def result(self) -> T:
        """The work's return value, or its error. On CUDA the current stream goes on after it."""
        result = self.future.result()
        if self.finished is not None:
            torch.cuda.current_stream(self._device).wait_event(self.finished)
        return result


class Background:
    """A thread that dies with the process: a peer that never answers keeps nobody from leaving."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # no annotations in torch
        self._queue: queue.SimpleQueue[Task[Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="averaging", daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Task[T]:
        """Run `work` after all that was submitted before, and after what this thread has queued on the device."""
        task = Task(work, self._device)
        self._queue.put(task)
        return task

    def close(self) -> None:
        """Let the thread end once its queue is empty."""
        self._queue.put(None)

    def _work(self) -> None:
        on_stream: AbstractContextManager[Any] = nullcontext()
        if self._stream is not None:
            on_stream = torch.cuda.stream(self._stream)
        with on_stream, torch.no_grad():
            while (task := self._queue.get()) is not None:
                try:
                    if self._stream is not None and task.ready is not None:
                        self._stream.wait_event(task.ready)
                    result = task.work()
                    if self._stream is not None:
                        task.finished = self._stream.record_event()
                    task.future.set_result(result)
                except BaseException as error:
                    task.future.set_exception(error)
