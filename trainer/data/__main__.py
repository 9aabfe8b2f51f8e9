"""`python -m trainer.data NAME --root DIR`: make sure that a named data set is there."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torchvision.datasets

from trainer.data.sets import TORCHVISION

DEBIAN = {"fashion_mnist": ("dataset-fashion-mnist", Path("/usr/share/datasets/fashion-mnist"))}


def main() -> int:
    """Try what is there, then Debian's package, then torchvision's download; else say what was tried."""
    parser = argparse.ArgumentParser(prog="python -m trainer.data", description=main.__doc__)
    parser.add_argument("name", choices=sorted(TORCHVISION))
    parser.add_argument("--root", default="data")
    args = parser.parse_args()
    failed = []
    for attempt in (_there, _debian, _download):
        why_not = attempt(args.name, args.root)
        if why_not is None:
            return 0
        failed.append(why_not)
    print(f"{args.name} is not to be had: {'; '.join(failed)}", file=sys.stderr)
    return 1


def _there(name: str, root: str) -> str | None:
    """Opened as training would open it (compressed files are unpacked)."""
    dataset = getattr(torchvision.datasets, TORCHVISION[name])
    try:
        for train in (True, False):
            dataset(root, train=train)
    except (RuntimeError, OSError, EOFError):
        return f"{root} does not hold it (put its files there)"
    return None


def _debian(name: str, root: str) -> str | None:
    if name not in DEBIAN:
        return "Debian has no package of it"
    package, files = DEBIAN[name]
    if not files.is_dir():
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            return f"Debian's package {package} is not installed, and cannot be without apt-get and root"
        for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-y", "-q", package]):
            subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    if not files.is_dir():
        return f"apt-get could not install Debian's package {package}"
    raw = Path(root) / TORCHVISION[name] / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for file in files.glob("*.gz"):
        torchvision.datasets.utils.extract_archive(str(file), str(raw))
    return _there(name, root)


def _download(name: str, root: str) -> str | None:
    try:
        for train in (True, False):
            getattr(torchvision.datasets, TORCHVISION[name])(root, train=train, download=True)
    except Exception as error:  # any way in which a download can fail
        return f"torchvision could not download it ({' '.join(str(error).split())[:120]})"
    return None


if __name__ == "__main__":
    sys.exit(main())
