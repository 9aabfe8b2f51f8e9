"""The helper that starts ranks: a failure is told with its traceback, and spoils no other test."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from ranks import RankError, run

from trainer.distributed.world import World


def number(world: World) -> int:
    return os.getpid()


def raising(world: World) -> None:
    if world.rank == 1:
        raise ArithmeticError("the second rank is wrong")
    torch.distributed.barrier()


def dying(world: World) -> None:
    torch.distributed.barrier()  # the other is there, and does not fail first
    os._exit(3)


def hanging(world: World) -> None:
    time.sleep(100)


def leaving(world: World) -> int:
    threading.Thread(target=time.sleep, args=(20,), daemon=True).start()
    return os.getpid()


def test_processes_are_kept_and_new_ones_are_had_for_the_asking() -> None:
    before = run(2, number)
    assert run(2, number) == before
    assert not set(run(2, number, fresh=True)) & set(before)
    assert run(2, number) == before


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (raising, r"rank 1:\n.*in raising\n.*ArithmeticError: the second rank is wrong"),
        (dying, "a rank died without a word"),
        (hanging, r"ranks \[0, 1\] did not answer in 2 s"),
    ],
)
def test_a_failure_is_told_and_ends_its_processes(function: object, said: str) -> None:
    before = run(2, number)
    with pytest.raises(RankError, match=rf"(?s){said}"):
        run(2, function, timeout_s=2 if function is hanging else 60)  # type: ignore[arg-type]
    assert not set(run(2, number)) & set(before)


def test_a_process_in_which_a_thread_is_left_is_used_no_more() -> None:
    spoiled = run(2, leaving)
    assert not set(run(2, number)) & set(spoiled)
