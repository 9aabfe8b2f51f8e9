"""Directives of the documentation: a dataclass's fields as a table, out of the code; a file of the repository."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective


def meanings(cls: type) -> dict[str, tuple[str, str]]:
    """Type and meaning of every field, as the code of the class and of those it inherits from says them."""
    found: dict[str, tuple[str, str]] = {}
    for kind in reversed(cls.__mro__):
        if not is_dataclass(kind):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
        assert isinstance(body, ast.ClassDef)
        for line, below in zip(body.body, [*body.body[1:], None], strict=True):
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                continue
            told = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            meaning = " ".join(str(below.value.value).split()) if told else ""  # type: ignore[union-attr]
            found[line.target.id] = (ast.unparse(line.annotation), meaning)
    return found


def default(field: Field[Any]) -> str:
    """A field's default, as a recipe writes it."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING:
        return "must be given"
    if value is None:
        return "not set"
    if is_dataclass(value):
        shown = ", ".join(f"{part.name} {getattr(value, part.name)}" for part in fields(value)[:2])
        return f"`{shown}`"
    text = str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')
    return f"`{text}`"


def table(cls: type, section: str = "") -> str:
    """The fields of a class as a Markdown table."""
    told = meanings(cls)
    rows = ["| field | default | meaning |", "| --- | --- | --- |"]
    for field in fields(cls):
        kind, meaning = told.get(field.name, ("", ""))
        choices = re.findall(r"Literal\[([^\]]*)\]", kind)
        meaning += f" One of {choices[0].replace(chr(39), '')}." if choices and "," in choices[0] else ""
        rows.append(f"| `{section}{field.name}` | {default(field)} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


class ConfigFields(SphinxDirective):
    """`{config-fields} module:Class SECTION`: the table of that class."""

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].partition(":")
        section = f"{self.arguments[1]}." if len(self.arguments) > 1 else ""
        return self.parse_text_to_nodes(table(getattr(importlib.import_module(module), name), section))


class PolicyFields(SphinxDirective):
    """`{policy-fields}`: the table of every registered policy, each beneath its name."""

    def run(self) -> list[nodes.Node]:
        from trainer.policies import POLICIES

        parts = []
        for name, cls in sorted(POLICIES.items()):
            about = inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ")
            parts.append(f"**{name}.** {about}\n\n{table(cls, 'policy.')}")
        return self.parse_text_to_nodes("\n\n".join(parts))


class RepositoryPage(SphinxDirective):
    """`{repository-page} FILE`: a Markdown file of the repository, without pictures and links to what is not here."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = Path(__file__).resolve().parent.parent / self.arguments[0]
        self.env.note_dependency(str(path))
        text = re.sub(r"!\[[^\]]*\]\([^)]*\)\n", "", path.read_text())
        text = re.sub(r"\[([^\]]*)\]\((?!http)[^)]*\)", r"\1", text)
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def setup(app: Any) -> dict[str, bool]:
    """Make the directives known."""
    app.add_directive("config-fields", ConfigFields)
    app.add_directive("policy-fields", PolicyFields)
    app.add_directive("repository-page", RepositoryPage)
    return {"parallel_read_safe": True}
