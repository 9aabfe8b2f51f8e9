"""Serve the store that the members of an elastic run meet at; it is started once, and outlives each of them.

python -m trainer.store --port 29400
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from trainer.cli import guarded, leave
from trainer.errors import ConfigError


def main(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT."""
    parser = argparse.ArgumentParser("python -m trainer.store", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=29400, help="to listen at; 0: any free one, which is said")
    asked = parser.parse_args(argv)
    return guarded("trainer.store", lambda: _serve(asked.port))


def _serve(port: int) -> int:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # takes seconds, which `--help` need not wait for

    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # also in the store's own threads
    try:
        store = TCPStore("0.0.0.0", port, is_master=True, wait_for_workers=False)
    except (RuntimeError, OverflowError, TypeError) as error:
        raise ConfigError(f"port = {port}: cannot be listened at ({str(error).splitlines()[0]})") from error
    print(f"store: members meet at port {store.port}", flush=True)
    signal.sigwait(ends)
    return 0


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
