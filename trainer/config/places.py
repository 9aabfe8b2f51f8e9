"""The folder of the recipes that ship."""

from __future__ import annotations

from pathlib import Path


def recipe_folder() -> Path:
    """The folder of the recipes that ship, in a checkout and in an installed wheel.

    They are written in launch/recipes. trainer/recipes is a link to that folder, and a wheel holds the files in its
    place.
    """
    return Path(__file__).resolve().parent.parent / "recipes"
