"""Each folder of tests is a marker of its own, so that `-m "not ranks and not lab"` leaves the tests of one process.

Where several processes of pytest share the tests, those that look at the same runs stay together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
MARKED = ("ranks", "lab")
TOGETHER = ("test_packaging.py", "test_recorded_runs.py", "test_what_a_run_says.py")
"""Files whose tests look at something that takes long to make."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(HERE).parts[0]
        if folder in MARKED:
            item.add_marker(folder)
    items.sort(key=lambda item: item.path.parent.name != "lab")  # the longest first


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal out tests one by one, but those of a file that makes something, and those of the lab, to one process.

    The lab has one Slurm and one pair of hosts at a time. The marks that pytest-xdist has for this do nothing under
    pytest 9.2.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = Path(nodeid.split("::")[0])
            if "lab" in path.parts:
                return "lab"
            return str(path) if path.name in TOGETHER else nodeid

    return Scheduler(config, log)
