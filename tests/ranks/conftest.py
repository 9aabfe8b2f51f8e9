"""Whole runs that several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import run
from whole_runs import in_process, settings


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two ranks."""
    root = tmp_path_factory.mktemp("runs")
    run(2, in_process, settings(root, "whole"))
    return root / "whole"
