"""How much memory this process has held, and that it keeps what it will need again."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # mallopt(3)
STATUS = Path("/proc/self/status")


def keep_freed_memory() -> None:
    """Have the C library keep what one local step frees for the next, as CUDA's allocator does.

    By default glibc gives memory back whenever the top of its heap is free, which is a matter of luck: the same loop
    then faults all its gradients and activations in again at every step or not at all. Blocks above 32 MiB are given
    back all the same. All threads share one heap, so that averaging beside training takes what training has freed.
    `MALLOC_TRIM_THRESHOLD_` in the environment overrules this; other C libraries know no such thing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        mallopt(M_TRIM_THRESHOLD, 2**30)
        mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that it takes
        mallopt(M_ARENA_MAX, 1)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has held: of the CUDA device, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # ru_maxrss counts what the launcher held before it became this process
        _, _, rest = STATUS.read_bytes().partition(b"VmHWM:")
        return int(rest.split(None, 1)[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_share(device: torch.device, ranks_here: int) -> float:
    """The most memory that this rank has held, as a share of the device's, or of its part of what the host lets the job
    have."""
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else memory_of_host() // ranks_here
    return peak_memory_bytes(device) / total


@cache
def memory_of_host(root: Path = Path("/")) -> int:
    """Bytes that the processes of a job may hold on this host: all of its memory, or what a container or a batch system
    lets them have (the limits of the process's control group and of those above it, version 1 or 2)."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_limits(root)])


def _limits(root: Path) -> Iterator[int]:
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else []:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        inner = Path(path.lstrip("/"))
        for group in (inner, *inner.parents):
            limit = top / group / name
            if limit.exists() and (text := limit.read_text().strip()).isdigit():  # else "max"
                yield int(text)
