"""A checkpoint's folder: what its manifest says of it, and whether its files are what the manifest says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.loop.snapshot import restored
from trainer.loop.tensor_file import Checksum, read_tensors, write_bytes
from trainer.version import __version__

FORMAT = 1
NAME = "manifest.json"
PARTIAL = ".partial"


class BadCheckpointError(Exception):
    """A folder that is no good checkpoint; says why, in words that follow its name."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is, and what gives its state a meaning."""

    run: str
    """Id of the run, the same after every resume."""
    local_step: int
    samples: int
    """Trained by all ranks."""
    ranks: int
    written_at: str
    parameters: list[list[Any]]
    """Name, shape and type of every parameter and saved buffer."""
    config: Mapping[str, Any]
    """The configuration as tables."""
    metrics_bytes: int
    """Of metrics.jsonl at this step."""
    files: Mapping[str, Checksum] = field(default_factory=dict)
    format: int = FORMAT
    version: str = __version__
    """Of the library that wrote it."""

    def write(self, folder: Path) -> None:
        """Write it beside the files that it names."""
        content = json.dumps(asdict(self), sort_keys=True)
        text = json.dumps({"manifest": json.loads(content), "blake2b": _hashed(content)}, indent=1, sort_keys=True)
        write_bytes(folder / NAME, [text.encode() + b"\n"])

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a checkpoint's folder.

        Raises:
            BadCheckpointError: there is none, or it is not what was written, or of a newer format.
        """
        try:
            table = json.loads((folder / NAME).read_text())
            content, told = table["manifest"], table["blake2b"]
            newer = content["format"] > FORMAT
        except OSError as error:
            raise BadCheckpointError(f"{NAME} cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise BadCheckpointError(f"{NAME} is no manifest of a checkpoint") from error
        if newer:
            mend = f"this is version {__version__}, which reads format {FORMAT}"
            raise BadCheckpointError(
                f"is of format {content['format']}, written by version {content['version']}: {mend}"
            )
        if told != _hashed(json.dumps(content, sort_keys=True)):
            raise BadCheckpointError(f"{NAME} has another checksum than it says")
        files = {name: Checksum(**each) for name, each in content.pop("files").items()}
        return cls(**content, files=files)


def _hashed(content: str) -> str:
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def verify(folder: Path, files: Mapping[str, Checksum], names: Iterable[str]) -> None:
    """Compare these files with what the manifest says of them.

    Raises:
        BadCheckpointError: names the first that differs.
    """
    for name in names:
        try:
            found = Checksum.of(folder / name)
        except OSError as error:
            raise BadCheckpointError(f"{name} cannot be read ({error.strerror})") from error
        if found.bytes != files[name].bytes:
            raise BadCheckpointError(f"{name} has {found.bytes:,} bytes where {files[name].bytes:,} were written")
        if found != files[name]:
            raise BadCheckpointError(f"{name} has another checksum than the manifest says")


def files_of(rank: int) -> tuple[str, str]:
    """The names of a rank's state and of the tensors that it wrote."""
    return f"rank-{rank:04d}.json", f"rank-{rank:04d}.safetensors"


def load_rank(folder: Path, rank: int) -> dict[str, Any]:
    """One rank's state; tensors that are the same on several ranks were written by the first of them."""
    state, own = files_of(rank)
    coded = json.loads((folder / state).read_text())
    tensors = read_tensors(folder / own)
    by_file: dict[int, dict[str, str]] = {}
    for name, (owner, there) in coded["elsewhere"].items():
        by_file.setdefault(owner, {})[name] = there
    for owner, names in by_file.items():
        theirs = read_tensors(folder / files_of(owner)[1], {*names.values()})
        # memory of its own for each: training changes them in place
        tensors |= {name: theirs[there].clone() for name, there in names.items()}
    found: dict[str, Any] = restored(coded["state"], tensors.__getitem__)
    return found
