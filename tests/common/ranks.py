"""Real processes for tests: `run(size, function, *arguments)` calls it on every rank and collects the answers."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

# ranks are forked from a process that has imported torch once, and run nothing before
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torchvision", "trainer.train"])


class RankError(AssertionError):
    """A rank raised; carries every failed rank's traceback."""


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = 90,
    local_size: int = 0,
    backend: Literal["gloo", "nccl"] = "gloo",
) -> list[Any]:
    """What `function(world, *arguments)` returns on each of `size` ranks, by rank; over NCCL they share devices."""
    port = free_port()
    pipes, processes = [], []
    for rank in range(size):
        receive, send = _context.Pipe(duplex=False)
        place = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": rank % (local_size or size),
            "LOCAL_WORLD_SIZE": local_size or size,
            "GROUP_RANK": rank // (local_size or size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
            "NCCL_MULTI_RANK_GPU_ENABLE": 1,
        }
        process = _context.Process(target=_rank, args=(send, place, backend, function, arguments), daemon=False)
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    try:
        return _collect(pipes, timeout_s)
    finally:
        for process in processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    failed: list[str] = []
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    while open_pipes:
        ready = wait(list(open_pipes), timeout=timeout_s)
        if not ready:
            raise RankError(f"ranks {sorted(open_pipes.values())} did not answer in {timeout_s} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = open_pipes.pop(pipe)
            with contextlib.suppress(EOFError):
                good, result = pickle.loads(pipe.recv_bytes())
                results[rank] = result
                if not good:
                    failed.append(f"rank {rank}:\n{result}")
    if failed or len(results) < len(pipes):
        raise RankError("\n".join(failed) or "a rank died without a word")
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    send: Connection,
    place: dict[str, Any],
    backend: Literal["gloo", "nccl"],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update({name: str(value) for name, value in place.items()})
    import torch

    from trainer.config.config import WorldConfig
    from trainer.distributed.world import open_world

    torch.set_num_threads(1)
    torch.manual_seed(int(place["RANK"]))
    try:
        with open_world(WorldConfig(backend=backend, timeout_s=30)) as world:
            result = function(world, *arguments)
        send.send_bytes(pickle.dumps((True, result)))  # by value: this process is gone when it is read
    except BaseException:
        send.send_bytes(pickle.dumps((False, traceback.format_exc())))
