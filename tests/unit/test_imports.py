"""Data flows one way: a module imports only what stands before it."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "trainer"
LAYERS = [
    {"errors", "version", "log"},
    {"fields"},
    {"plan"},
    {"policies"},
    {"config", "memory"},
    {"federated", "distributed"},
    {"control"},
    {"cli", "wire", "data", "tasks"},
    {"sync", "records"},
    {"report"},
    {"loop"},
    {"train", "replay", "store"},
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


def test_every_public_name_is_there() -> None:
    import trainer

    for name in trainer.__all__:
        assert getattr(trainer, name) is not None
