"""Memory: what a job may hold on its host, and what it keeps."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.memory import memory_of_host

HOST = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/slurm/job\n", {"slurm/job/memory.max": "max", "slurm/memory.max": "1000000"}, 1_000_000),
        ("0::/\n", {"memory.max": "2000000"}, 2_000_000),
        (
            "9:cpu,cpuacct:/a\n4:memory:/a/b\n0::/\n",
            {"memory/a/b/memory.limit_in_bytes": "3000000", "memory/a/memory.limit_in_bytes": "4000000"},
            3_000_000,
        ),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, HOST),
        ("0::/gone\n", {}, HOST),
        (None, {}, HOST),
    ],
)
def test_the_least_limit_of_the_control_groups_counts(
    tmp_path: Path, groups: str | None, limits: dict[str, str], expected: int
) -> None:
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups)
    for name, text in limits.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert memory_of_host(tmp_path) == expected


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
