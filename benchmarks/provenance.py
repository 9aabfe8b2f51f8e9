"""Where a figure comes from: commit, versions, machine, time."""

from __future__ import annotations

import os
import subprocess
import time

import torch

from trainer.distributed.world import versions


def provenance() -> dict[str, str | int]:
    """What must stand beside a measured figure."""
    device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "commit": commit,
        "when": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        **device,
        **versions(),
    }
