"""Where recipes lie, so that a name finds one. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from trainer.errors import ConfigError
from trainer.fields import nearest

PACKAGE = Path(__file__).resolve().parent.parent
SHIPPED = PACKAGE / "recipes"
"""The recipes inside an installed package."""


def recipe_folder() -> Path:
    """The folder of the recipes that ship, in a checkout and in an installed wheel.

    They are written in launch/recipes. trainer/recipes is a link to that folder, and a wheel holds the files in its
    place.
    """
    return SHIPPED


def recipe_folders() -> Iterator[Path]:
    """The folders that hold recipes by name, in the order in which they are searched."""
    yield Path("launch") / "recipes"
    yield PACKAGE.parent / "launch" / "recipes"
    yield SHIPPED


def recipe_names() -> list[str]:
    """The names that find a recipe."""
    return sorted({path.stem for folder in recipe_folders() for path in folder.glob("*.toml")})


def recipe_path(given: str | Path) -> Path:
    """The file of a recipe: a path as it is given, or the name of a recipe of this checkout or of the package.

    Raises:
        ConfigError: no recipe has that name; names the nearest, and those that there are.
    """
    path = Path(given)
    if path.suffix or len(path.parts) != 1 or path.is_file():
        return path
    for folder in recipe_folders():
        found = folder / f"{path.name}.toml"
        if found.is_file():
            return found
    known = recipe_names()
    mend = f"choose a FILE.toml or one of {', '.join(known)}" if known else "no recipes are here; name a FILE.toml"
    raise ConfigError(f"--recipe = {str(given)!r}: no recipe has that name; {mend}{nearest(path.name, known)}")
