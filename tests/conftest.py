"""Each folder of tests is a marker of its own, so that `-m "not ranks and not lab"` leaves the tests of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
MARKED = ("ranks", "lab")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder in MARKED:
            item.add_marker(folder)
