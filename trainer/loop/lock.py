"""One run at a time in a run's folder: a lock that dies with its holder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError

NAME = "lock"
BEAT_S = 5.0
"""Seconds between two signs of life."""
WATCH_S = 3 * BEAT_S
"""Seconds without a sign of life after which another host's holder is taken for dead."""


class RunLock:
    """The lock of a run's folder, held by this process until `release` or its end.

    The kernel holds it for the process, so nothing is left behind by a kill. Its text says who holds it. Where a
    file system keeps such locks to one host, or has none, the text decides: a process of this host is looked up by its
    id and the time it started, and another host's holder is watched for signs of life.
    """

    def __init__(self, folder: Path) -> None:
        """Take it.

        Raises:
            ConfigError: another run holds it, or the folder cannot be written.
        """
        self.folder = folder
        self._hold()

    def _hold(self) -> None:
        while not self._open(self.folder):  # its last holder removed the file in the same moment
            os.close(self._file)
        self._ended = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beating.start()

    def _open(self, folder: Path) -> bool:
        self.path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise ConfigError(f"run.root = {str(folder.parent)!r}: cannot be written ({error.strerror})") from error
        try:
            self._take(folder)
        except BaseException:
            os.close(self._file)
            raise
        return self.is_held

    def _take(self, folder: Path) -> None:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(folder, _holder(self._read())) from error
            free = False  # no such locks here
        held_by = _holder(self._read())
        if held_by.get("host") == platform.node():
            alive = not free and _started(held_by.get("pid", 0)) == held_by.get("started") is not None
        else:
            alive = bool(held_by) and self._beats()
        if alive:
            raise _in_use(folder, held_by)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        mine = {"host": platform.node(), "pid": os.getpid(), "started": _started(os.getpid()), "since": since}
        self._text = json.dumps(mine).encode() + b"\n"
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, self._text, 0)

    @property
    def is_held(self) -> bool:
        """Whether it is still this process's: nobody took it over while this process was frozen or cut off."""
        try:
            return os.stat(self.path).st_ino == os.fstat(self._file).st_ino and self._read() == self._text
        except OSError:
            return False

    def release(self) -> None:
        """Let go; the file is removed."""
        self._ended.set()
        self._beating.join()
        if self.is_held:
            with suppress(OSError):
                self.path.unlink()
        os.close(self._file)

    def moved(self, aside: Path) -> None:
        """The folder was renamed to `aside`: hold the one that takes its place.

        Raises:
            ConfigError: another run was quicker.
        """
        self.path = aside / NAME
        self.release()
        self._hold()

    def _read(self) -> bytes:
        return os.pread(self._file, 4_096, 0)

    def _beats(self) -> bool:
        """Whether another host's holder gives a sign of life, by its own host's clock."""
        before, until = os.fstat(self._file).st_mtime_ns, time.monotonic() + WATCH_S
        while time.monotonic() < until:
            time.sleep(min(0.2, WATCH_S / 4))
            with suppress(OSError):
                if os.stat(self.path).st_mtime_ns != before:
                    return True
        return False

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self._file)


def _holder(text: bytes) -> dict[str, Any]:
    """What a lock's text says; empty where nobody wrote it, or half of it."""
    try:
        told = json.loads(text or b"{}")
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _started(pid: int) -> str | None:
    """When a process of this host started, in the kernel's own count since a boot; None where there is none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return None


def _in_use(folder: Path, held_by: dict[str, Any]) -> ConfigError:
    who = (
        f"process {held_by.get('pid', '?')} on {held_by.get('host', 'another host')} since {held_by.get('since', '?')}"
    )
    return ConfigError(f"run.name = {folder.name!r}: {folder} is in use by {who}; end that run, or give another name")
