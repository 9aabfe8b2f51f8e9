"""Real processes for tests: `run(size, function, *arguments)` calls it on every rank and collects the answers.

A process takes longer to begin than most tests take to run. So processes are kept, and each is a rank of many worlds in
turn, of a new process group every time. After a failure every process of that world is ended; `fresh=True` asks for new
ones.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing as mp
import os
import pickle
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

Backend = Literal["gloo", "nccl"]

# processes are forked from one that has imported once what most tests need, and has run nothing
context = mp.get_context("forkserver")
context.set_forkserver_preload(
    ["pytest", "hypothesis.strategies", "torch.distributed.checkpoint", "torchvision", "trainer.train"]
)
PORTS = range(10_000, 32_000)
"""Below those that the kernel gives to outgoing connections."""


class RankError(AssertionError):
    """A rank raised; carries every failed rank's traceback."""


def free_port() -> int:
    """A TCP port that nothing listens on, drawn so that worlds which begin at the same time get ports of their own."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@dataclass(frozen=True)
class Task:
    """One rank's part in a world: its environment, and the function to call there."""

    place: dict[str, str]
    backend: Backend
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Answer:
    """The function's result, or a traceback; and whether the process is as it was before."""

    good: bool
    result: Any
    clean: bool = True


class Process:
    """One process that is a rank of many worlds in turn."""

    def __init__(self) -> None:
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=False)
        self._process.start()
        theirs.close()

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def give(self, task: Task) -> None:
        self.pipe.send_bytes(pickle.dumps((list(sys.path), os.getcwd(), pickle.dumps(task))))

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


_idle: list[Process] = []


@atexit.register
def end_all() -> None:
    """End the processes that wait for a world."""
    while _idle:
        _idle.pop().end()


def run(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = 90,
    local_size: int = 0,
    backend: Backend = "gloo",
    fresh: bool = False,
) -> list[Any]:
    """What `function(world, *arguments)` returns on each of `size` ranks, by rank; over NCCL they share devices.

    Raises:
        RankError: a rank raised, died, or did not answer for `timeout_s`.
    """
    fresh = fresh or backend == "nccl"  # a CUDA context is never as it was before
    processes = [Process() if fresh or not _idle else _idle.pop() for _ in range(size)]
    port, kept = free_port(), []
    try:
        for rank, process in enumerate(processes):
            place = _place(rank, size, local_size or size, port)
            process.give(Task(place, backend, function, arguments))
        answers = _collect([process.pipe for process in processes], timeout_s)
        if not fresh:
            kept = [process for process, answer in zip(processes, answers, strict=True) if answer.clean]
        return [answer.result for answer in answers]
    finally:
        for process in processes:
            if process not in kept:
                process.end()
        _idle.extend(reversed(kept))


def run_each(
    size: int, function: Callable[..., Any], cases: Sequence[tuple[Any, ...]], *, timeout_s: float = 90
) -> list[list[Any]]:
    """What `function(world, *case)` returns for each case, by rank, one case after another in one world.

    A world takes longer to begin than most cases take. A case that fails ends them all; the error names it.
    """
    ranks = run(size, _each, function, cases, timeout_s=timeout_s)
    return [list(results) for results in zip(*ranks, strict=True)]


def _each(world: Any, function: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    import torch

    results = []
    for case in cases:
        torch.manual_seed(world.rank)
        try:
            results.append(function(world, *case))
        except BaseException as error:
            error.add_note(f"in the case {case}")
            raise
    return results


def _place(rank: int, size: int, local_size: int, port: int) -> dict[str, str]:
    """The environment that a launcher would give this rank."""
    place = {
        "RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_RANK": rank % local_size,
        "LOCAL_WORLD_SIZE": local_size,
        "GROUP_RANK": rank // local_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1,
        "NCCL_MULTI_RANK_GPU_ENABLE": 1,
    }
    return {name: str(value) for name, value in place.items()}


def _collect(pipes: list[Connection], timeout_s: float) -> list[Answer]:
    answers: dict[int, Answer] = {}
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    while open_pipes:
        ready = wait(list(open_pipes), timeout=timeout_s)
        if not ready:
            raise RankError(f"ranks {sorted(open_pipes.values())} did not answer in {timeout_s} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            with contextlib.suppress(EOFError, ConnectionResetError):
                answers[rank] = pickle.loads(pipe.recv_bytes())
    failed = [f"rank {rank}:\n{answer.result}" for rank, answer in answers.items() if not answer.good]
    if failed or len(answers) < len(pipes):
        raise RankError("\n".join(failed) or "a rank died without a word")
    return [answers[rank] for rank in range(len(pipes))]


# ---- in the process


def _serve(pipe: Connection) -> None:
    """Be a rank of one world after another, until one fails or nobody asks any more."""
    born = State()
    gc.collect()
    gc.freeze()  # what is there by now need not be looked at again
    while True:
        try:
            path, folder, coded = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        sys.path[:] = path
        os.chdir(folder)
        try:
            result = _rank(pickle.loads(coded), born)
            answer = pickle.dumps(Answer(True, result, born.restore()))  # by value, since what is shared may end
        except BaseException:
            pipe.send_bytes(pickle.dumps(Answer(False, traceback.format_exc())))
            return
        pipe.send_bytes(answer)


def _rank(task: Task, born: State) -> Any:
    """The function's result, in a world of its own."""
    import numpy as np
    import torch

    from trainer.config.config import WorldConfig
    from trainer.distributed.world import open_world

    os.environ.update(task.place)
    torch.set_num_threads(1)
    rank = int(task.place["RANK"])
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(rank)
    with open_world(WorldConfig(backend=task.backend, timeout_s=30)) as world:
        return task.function(world, *task.arguments)


def fork_readers() -> None:
    """Have reading processes of this rank forked from it, as a rank of a launcher forks them.

    Else they come from a server of their own, which imports everything first.
    """
    mp.set_start_method("fork", force=True)


class State:
    """What of a process must be at a world's begin as it was at its own."""

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.start_method = mp.get_start_method()
        self.signals = self._signals()

    def _signals(self) -> list[Any]:
        return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]

    def restore(self) -> bool:
        """Set back what can be; False where something is left that cannot."""
        import torch

        os.environ.clear()
        os.environ.update(self.environment)
        mp.set_start_method(self.start_method, force=True)
        gc.collect()
        end = time.monotonic() + 1  # threads that were told to end may take a moment
        while threading.active_count() > 1 and time.monotonic() < end:
            time.sleep(0.001)
        return (
            threading.active_count() == 1
            and self.signals == self._signals()
            and not torch.distributed.is_initialized()
            and not mp.active_children()
            and torch.get_default_dtype() == torch.float32
            and torch.is_grad_enabled()
        )
