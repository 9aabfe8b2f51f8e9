"""The command line: recipe and flags -> Config -> train().

Exit codes: 0 done; 2 bad configuration (one line, no traceback); 1 anything else, a stop on a signal included.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from trainer import recipes
from trainer.errors import ConfigError, MismatchError, PeerError
from trainer.launcher import read_launch


def main(argv: Sequence[str]) -> int:
    """Train what the command line asks for."""
    return guarded("trainer", lambda: _train(argv))


def _train(argv: Sequence[str]) -> int:
    config = recipes.parse(argv, "python -m trainer")
    from trainer.train import train  # imports torch, which `--help` and a bad flag need not wait for

    summary = train(config)
    if summary is None:
        return 1
    if read_launch().rank == 0:
        speedup = summary["scaling_speedup"]
        print(
            f"done: test accuracy {summary['test_accuracy']:.4f}, {summary['samples']:,} samples in "
            f"{summary['elapsed_s']:.1f} s, {summary['samples_per_s']:,.0f} samples/s, scaling speedup "
            f"{'not measured' if speedup is None else f'{speedup:.2f}'}"
        )
    return 0


def guarded(prog: str, work: Callable[[], int]) -> int:
    """Run a command so that what goes wrong is said once, to people, with the exit code that goes with it."""
    try:
        return work()
    except ConfigError as error:
        # every rank was given the same configuration: the first of each host says why it cannot be
        return recipes.refuse(error, prog) if _place()[1] == 0 else 2
    except (PeerError, MismatchError, FloatingPointError) as error:
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


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
