"""Each folder of tests is a marker of its own, so that `-m "not ranks and not lab"` leaves the tests of one process.

Where several processes of pytest share the tests, those that look at the same runs stay together.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
MARKED = ("ranks", "lab")
SHARED = ("whole", "runs")
"""Fixtures of runs that take long, and that many tests look at."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder in MARKED:
            item.add_marker(folder)
        shared = [name for name in SHARED if name in getattr(item, "fixturenames", ())]
        if folder == "lab" or shared:  # one Slurm, and one pair of hosts, at a time
            item.add_marker(pytest.mark.xdist_group("lab" if folder == "lab" else shared[0]))
    items.sort(key=lambda item: item.path.parent.name != "lab")  # the longest first
