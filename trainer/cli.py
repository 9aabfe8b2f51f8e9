"""Shared by all commands of the trainer: an error is said once, to people, with its exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from trainer.config import recipes
from trainer.distributed.launcher import read_launch
from trainer.errors import ConfigError, DataError, MismatchError, PeerError


def guarded(prog: str, work: Callable[[], int]) -> int:
    """Run a command so that what goes wrong is said once, to people, with the exit code that goes with it."""
    # torch's C++ part logs a page for each connection that a peer closes; what comes of it is said below, in one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        return work()
    except ConfigError as error:
        # every rank was given the same configuration: the first of each host says why it cannot be
        return recipes.refuse(error, prog) if _place()[1] == 0 else 2
    except (DataError, PeerError, MismatchError, FloatingPointError) as error:
        print(f"{prog}: rank {_place()[0]}: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(f"{prog}: rank {_place()[0]}: interrupted", file=sys.stderr, flush=True)
    except Exception as error:
        traceback.print_exc()
        print(f"{prog}: rank {_place()[0]}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return 1


def _place() -> tuple[int, int]:
    try:
        launch = read_launch()
    except ConfigError:
        return 0, 0
    return launch.rank, launch.local_rank


def leave(code: int) -> NoReturn:
    """End this process. After a failure its collective's threads may still run, and would abort an orderly exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 1:
        os._exit(code)
    sys.exit(code)
