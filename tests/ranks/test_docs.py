"""Python in the documentation: what is complete runs as it stands, and what is not is at least Python."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commands import Command, ranks_env

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def blocks() -> list[Any]:
    """Every block of Python, under the name of its page."""
    found = []
    for page in PAGES:
        if "_build" in page.parts:
            continue
        for number, block in enumerate(re.findall(r"^ *```python\n(.*?)```", page.read_text(), flags=re.S | re.M)):
            lines = block.splitlines()
            margin = len(lines[0]) - len(lines[0].lstrip())
            code = "\n".join(line[margin:] for line in lines) + "\n"
            found.append(pytest.param(code, id=f"{page.relative_to(ROOT / 'docs').with_suffix('')}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks())
def test_a_block_that_imports_what_it_uses_runs(code: str, tmp_path: Path) -> None:
    ast.parse(code)
    if not code.startswith(("import ", "from ")):
        return
    (tmp_path / "block.py").write_text(code)
    together = "init_process_group" in code
    places = ranks_env(2) if together else [dict(os.environ)]
    processes = [Command("block.py", [], env, tmp_path) for env in places]
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(places), told


def directives() -> ModuleType:
    """docs/fields.py; it needs Sphinx, of the extra `docs`."""
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("fields_of_docs", ROOT / "docs" / "fields.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_field_of_a_recipe_is_described_on_the_page_of_fields() -> None:
    from trainer.config.config import Config
    from trainer.policies import POLICIES

    made = directives()
    page = (ROOT / "docs" / "reference" / "configuration.md").read_text()
    sections = {field.name: type(field.default) for field in fields(Config) if field.name != "policy"}
    for section, cls in sections.items():
        assert f"{{config-fields}} {cls.__module__}:{cls.__name__} {section}" in page
    for cls in [*sections.values(), *POLICIES.values()]:
        for name, (_, meaning) in made.meanings(cls).items():
            assert meaning, f"{cls.__name__}.{name} has no line beneath it"


def test_every_link_between_pages_and_files_leads_somewhere() -> None:
    pages = [*PAGES, ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
    for page in (page for page in pages if "_build" not in page.parts):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page}: {link}"
