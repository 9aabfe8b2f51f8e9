"""How the documentation is built: `make docs`, or `python -m sphinx -W docs docs/_build`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from trainer.version import __version__  # noqa: E402  # of this checkout

project = "Ebbtide"
author = "the authors of Ebbtide"
copyright = author
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "fields"]
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Ebbtide"
html_show_copyright = False

default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_google_docstring = True
nitpicky = False  # names of torch and the standard library are not looked up: that would need the network


def set_code_apart(app: Any, what: str, name: str, found: Any, options: Any, lines: list[str]) -> None:
    """Mark the indented examples of docstrings as code, which reStructuredText would take for quotations."""
    marked: list[str] = []
    inside = section = False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            inside, section = False, line in ("Args:", "Returns:", "Raises:", "Yields:")
        if indented and not inside and not section and (not marked or not marked[-1]):
            marked += [".. code-block:: python", ""]
            inside = True
        marked.append(line)
    lines[:] = marked


def setup(app: Any) -> None:
    """Docstrings are marked before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", set_code_apart, priority=100)
