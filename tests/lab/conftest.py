"""The run that every lab's runs are compared with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import RECIPE

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small run's recipe, in a folder of its own."""
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def plain(recipe: Path) -> Path:
    """The directory of the same run under a plain torchrun on this machine's own loopback, never interrupted."""
    foreign = ("SLURM", "SBATCH", "SRUN", "TORCHELASTIC", "DEVICES")
    env = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    flags = ("--recipe", str(recipe), "--run.root", str(recipe.parent), "--run.name", "plain")
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = (*torchrun, "-m", "trainer", *flags)
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return recipe.parent / "plain"
