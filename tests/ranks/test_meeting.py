"""Ranks that gather through the store, beside training."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import torch
from ranks import run

from trainer.distributed.meeting import Meeting
from trainer.distributed.world import World
from trainer.errors import PeerError


def met(world: World) -> list[Any]:
    """Gather in a thread, while this one averages."""
    meeting, found = Meeting(world), []

    def work() -> None:
        for number in range(5):
            time.sleep(0.01 * world.rank)
            found.append(meeting.gather(f"meeting {number}", {"rank": world.rank, "number": number}))

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(200):
        torch.distributed.all_reduce(torch.ones(10))
    thread.join()
    torch.distributed.barrier()
    return [*found, meeting._store.num_keys()]


def test_all_gather_every_ranks_thing_and_leave_little_in_the_store() -> None:
    everyone, before = run(3, met), run(3, kept)[0]
    for *found, keys in everyone:
        assert found == [[{"rank": rank, "number": number} for rank in range(3)] for number in range(5)]
        assert keys - before <= 1


def kept(world: World) -> int:
    torch.distributed.barrier()
    return Meeting(world)._store.num_keys()


def missed(world: World) -> tuple[str, list[int]]:
    """Rank 2 misses the first, and comes to the second."""
    meeting, said = Meeting(replace(world, timeout_s=0.5)), ""
    if world.rank != 2:
        try:
            meeting.gather("first", world.rank)
        except PeerError as error:
            said = str(error)
    torch.distributed.barrier()
    return said, meeting.gather("second", world.rank)


def test_a_rank_that_does_not_come_is_waited_for_no_longer_than_the_time_out() -> None:
    late = "a rank did not answer in 0.5 s"
    assert run(3, missed) == [(late, [0, 1, 2]), (late, [0, 1, 2]), ("", [0, 1, 2])]


def left(world: World) -> tuple[str, float]:
    meeting, began = Meeting(world), time.monotonic()
    if world.rank == 1:
        world.board.say("left with ArithmeticError: an error of its own")
        torch.distributed.barrier()
        return "", 0.0
    try:
        meeting.gather("without rank 1", None)
    except PeerError as error:
        torch.distributed.barrier()
        return str(error), time.monotonic() - began
    raise AssertionError


def test_a_peer_that_left_is_named_within_seconds() -> None:
    said, took_s = run(2, left)[0]
    assert said == "rank 1 left with ArithmeticError: an error of its own"
    assert took_s < 5
