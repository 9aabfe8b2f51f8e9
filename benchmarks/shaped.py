"""Hosts joined by slow links, on one machine, for as long as a `with` block lasts. Needs root and iproute2."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "launch" / "lab" / "hosts.sh"
PORT = 29500
GRACE_S = 10.0
sets_of_hosts = itertools.count()


@dataclass(frozen=True)
class Hosts:
    """Hosts that are up, one rank on each."""

    count: int
    env: dict[str, str]

    def run(self, module: str, *arguments: str, timeout_s: float) -> None:
        """`python -m module arguments` as one rank a host; an error of any rank ends all.

        Raises:
            RuntimeError: a rank failed, with the end of what it said, or did not end in time.
        """
        cores = os.cpu_count() or 1
        ranks, said = [], []
        for rank in range(self.count):
            place = {
                "RANK": str(rank),
                "WORLD_SIZE": str(self.count),
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "GROUP_RANK": str(rank),
                "MASTER_ADDR": "10.99.0.1",
                "MASTER_PORT": str(PORT),
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "eth0",
            }
            on_core = ["taskset", "-c", str(rank % cores)]
            command = [str(SCRIPT), "exec", str(rank + 1), *on_core, sys.executable, "-m", module, *arguments]
            said.append(tempfile.TemporaryFile("w+"))  # noqa: SIM115  # closed when this method ends
            ranks.append(subprocess.Popen(command, env=self.env | place, stderr=said[rank]))
        deadline = time.monotonic() + timeout_s
        try:
            while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < deadline:
                if any(codes):  # the others hear of it, and may say why
                    deadline = min(deadline, time.monotonic() + GRACE_S)
                time.sleep(0.1)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        if not any(codes) and None in codes:
            raise RuntimeError(f"{module} did not end in {timeout_s:.0f} s")
        if any(codes):
            for file in said:
                file.seek(0)
            ends = "".join(file.read()[-2_000:] for file in said)
            raise RuntimeError(f"{module} {' '.join(arguments)}: exit codes {codes}\n{ends}")


@contextmanager
def hosts(count: int, rate: str, mtu: int = 9000) -> Iterator[Hosts]:
    """`count` hosts whose links carry `rate` (100mbit, 1gbit ...) in each direction; "" is as fast as it goes.

    Frames of 9,000 bytes stand in for the segmentation that a network card does and these links do not: with 1,500 the
    kernel's work for each packet, not the rate, decides.
    """
    prefix = f"ebbtide{os.getpid()}n{next(sets_of_hosts)}"
    env = os.environ | {"HOSTS_PREFIX": prefix, "LAB_OWNER": str(os.getpid()), "HOSTS_MTU": str(mtu)}
    subprocess.run([str(SCRIPT), "up", str(count), *([rate] if rate else [])], check=True, env=env)
    try:
        yield Hosts(count, env)
    finally:
        subprocess.run([str(SCRIPT), "down"], check=True, env=env)


def bits_per_s(rate: str) -> float:
    """The number behind 100mbit, 1gbit, 500kbit."""
    for unit, factor in (("gbit", 1e9), ("mbit", 1e6), ("kbit", 1e3)):
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise ValueError(f"rate = {rate!r}: write kbit, mbit or gbit")


def interface_bytes() -> int:
    """Bytes that this host has sent, by its interface's own counter: frames, headers and acknowledgements too."""
    out = subprocess.run(["ip", "-s", "-o", "link", "show", "eth0"], check=True, capture_output=True, text=True).stdout
    return int(out.split("TX:")[1].split("\\")[1].split()[0])


def place_of(rate: str, hosts: int, series: str | None = None) -> str:
    """The name that results over such links are kept under; a series, of other ways or another machine, lies apart."""
    return "-".join([rate or "loopback", str(hosts), "hosts", *([series] if series else [])])


def write_table(path: Path, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, also written to `path`."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    path.write_text("\n".join(lines) + "\n")
    return path.read_text()
