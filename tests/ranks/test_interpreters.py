"""New interpreters: what they import, how they refuse a job, and what memory they keep."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PLACE = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
BAD_JOBS = {
    "flag": (["--run.samples", "0"], "run.samples = 0"),
    "more ranks than samples in the data": (["--data.train-limit", "1"], "data set of 1 samples: too few for 2 ranks"),
}


@pytest.mark.parametrize("kind", BAD_JOBS)
def test_every_rank_ends_with_2_and_one_line_is_said(kind: str) -> None:
    flags, said = BAD_JOBS[kind]
    command = [sys.executable, "-m", "trainer", "--data.name", "fake", *flags]
    ranks = [
        subprocess.Popen(
            command, env=os.environ | PLACE | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in ("0", "1")
    ]
    told = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert said in told[0]
    assert (told[0].count("\n"), told[1]) == (1, "")


def test_torch_is_not_loaded_by_importing_the_package_or_refusing_a_flag() -> None:
    code = (
        "import sys, trainer, trainer.__main__ as m; m.main(['--run.samples', '0']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_what_decides_loads_no_torch() -> None:
    rooms = "trainer.config.recipes, trainer.control.rounds, trainer.policies, trainer.records.reader, trainer.cli"
    code = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


@pytest.mark.parametrize("command", ["replay", "report"])
def test_the_command_needs_no_torch(command: str) -> None:
    look = f"import sys, trainer.{command}.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], timeout=60).returncode == 0


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
