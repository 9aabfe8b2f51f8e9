"""Whole commands in processes of their own, such as the ranks of `python -m trainer`.

They are forked from the process that has imported torch once, which is what a command takes longest for.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ranks import context, free_port


class Command:
    """`python -m module *flags`, or `python script.py *flags`, in a forked process; it starts in the folder `cwd`.

    It has of subprocess.Popen what tests use.
    """

    def __init__(self, module: str, flags: Sequence[str], env: Mapping[str, str], cwd: Path | None = None) -> None:
        self.args = [sys.executable, "-m", module, *flags]
        self._said = Path(tempfile.mkdtemp(prefix="ebbtide-said-"))
        told = (module, list(flags), dict(env), self._said, cwd or Path.cwd())
        self._process = context.Process(target=_command, args=told)
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; minus the signal's number where one ended it."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it said on its standard output and on its standard error, once it has ended."""
        self.wait(timeout)
        paths = (self._said / name for name in ("out", "err"))
        out, err = (path.read_text() if path.exists() else "" for path in paths)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.returncode is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()


def ranks_env(ranks: int) -> list[dict[str, str]]:
    """The environments that a launcher would give so many ranks of one host."""
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [shared | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1} for rank in range(ranks)]
    return [dict(os.environ) | {name: str(value) for name, value in place.items()} for place in places]


def _command(module: str, flags: list[str], env: dict[str, str], said: Path, cwd: Path) -> None:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [folder for folder in env.get("PYTHONPATH", "").split(os.pathsep) if folder]
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(said / name, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", 1)))  # read when torch was imported, before the fork
    sys.argv = [module, *flags]
    if module.endswith(".py"):
        sys.path.insert(0, str(cwd))
        runpy.run_path(str(cwd / module), run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
