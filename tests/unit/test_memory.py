"""Memory: what a job may hold on its host, and what it keeps."""

from __future__ import annotations

import os
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
