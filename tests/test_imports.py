"""Data flows one way: a module imports only what stands before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "trainer"
LAYERS = [
    {"errors", "version", "log"},
    {"fields"},
    {"plan"},
    {"policies"},
    {"config", "memory"},
    {"control", "distributed"},
    {"cli", "wire", "data", "tasks"},
    {"sync", "records"},
    {"report"},
    {"loop"},
    {"train", "replay"},
    {"__main__"},
]
"""Rooms of the package from the ground up; those of one row do not know one another."""
FLOOR = {room: floor for floor, rooms in enumerate(LAYERS) for room in rooms}


def imported(file: Path) -> set[str]:
    """The rooms that a file imports when it is loaded or run, type-checking blocks apart."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "trainer":
            names = [f"trainer.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("trainer.")}
    return found


def test_no_module_imports_upward() -> None:
    files = {file: file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in PACKAGE.rglob("*.py")}
    files.pop(PACKAGE / "__init__.py")  # public names, imported when they are used
    assert set(files.values()) == set(FLOOR)
    for file, room in files.items():
        above = {name for name in imported(file) if name != room and FLOOR[name] >= FLOOR[room]}
        assert not above, f"{file.relative_to(PACKAGE)} imports upward: {above}"


def test_torch_is_not_loaded_by_importing_the_package_or_refusing_a_flag() -> None:
    code = (
        "import sys, trainer, trainer.__main__ as m; m.main(['--run.samples', '0']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_what_decides_loads_no_torch() -> None:
    rooms = "trainer.config.recipes, trainer.control.rounds, trainer.policies, trainer.records.reader, trainer.cli"
    code = f"import sys, {rooms}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_every_public_name_is_there() -> None:
    import trainer

    for name in trainer.__all__:
        assert getattr(trainer, name) is not None
