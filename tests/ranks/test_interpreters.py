"""Processes from their first line on: what they import, how they refuse a job, and what memory they keep."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
from commands import Command

PLACE = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
BAD_JOBS = {
    "flag": (["--run.samples", "0"], "run.samples = 0"),
    "more ranks than samples in the data": (["--data.train-limit", "1"], "data set of 1 samples: too few for 2 ranks"),
}


@pytest.mark.parametrize("kind", BAD_JOBS)
def test_every_rank_ends_with_2_and_one_line_is_said(kind: str) -> None:
    flags, said = BAD_JOBS[kind]
    given = ["--data.name", "fake", *flags]
    ranks = [Command("trainer", given, os.environ | PLACE | {"RANK": rank, "LOCAL_RANK": rank}) for rank in ("0", "1")]
    told = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert said in told[0]
    assert (told[0].count("\n"), told[1]) == (1, "")


WITHOUT_TORCH = """
import importlib, sys
rooms = "trainer config.recipes control.rounds policies records.reader cli replay.__main__ report.__main__".split()
for room in rooms:
    importlib.import_module(room if room == "trainer" else f"trainer.{room}")
    assert "torch" not in sys.modules, room
from trainer.__main__ import main
assert main(["--run.samples", "0"]) == 2
assert "torch" not in sys.modules, "a flag that is refused"
"""


def test_what_decides_refuses_replays_and_reports_loads_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


STEPS = """
import resource
import torch
from trainer.memory import keep_freed_memory

faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
keep_freed_memory()
for step in range(30):
    held = [torch.ones(2**21) for _ in range(4)]  # 8 MiB each
    del held
    if step == 9:  # by then the heap has grown to where a step fits however it lies
        before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize("overruled", [False, True])
def test_freed_memory_is_there_for_the_next_step(overruled: bool) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    if overruled:
        env["MALLOC_TRIM_THRESHOLD_"] = "131072"
    ran = subprocess.run([sys.executable, "-c", STEPS], env=env, capture_output=True, text=True, check=True)
    pages = 4 * 2**23 // os.sysconf("SC_PAGE_SIZE")
    assert int(ran.stdout) > 10 * pages if overruled else int(ran.stdout) < pages
