"""From recipe and flags to a Config, and back: flags override the recipe, the recipe the defaults."""

from __future__ import annotations

import contextlib
import io
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import tomli_w
import tyro

from trainer.config import flags
from trainer.config.config import Config, is_flat, to_dict
from trainer.config.places import recipe_path
from trainer.errors import ConfigError
from trainer.fields import fitted, nearest
from trainer.policies import POLICIES, Policy, policy_class, policy_name


def load(path: str | Path) -> Config:
    """The Config that a TOML recipe describes.

    Raises:
        ConfigError: not readable, not TOML, an unknown key, a wrong type, or an impossible value.
    """
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--recipe = {str(path)!r}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--recipe = {str(path)!r}: is not TOML ({error})") from error
    return from_dict(table)


def save(config: Config, path: Path) -> None:
    """Write the resolved configuration as a recipe that repeats it."""
    path.write_text(tomli_w.dumps(to_dict(config)))


def from_dict(table: Mapping[str, Any]) -> Config:
    """The Config of a recipe's tables; what they leave out has its default."""
    built = _build(Config, table, "")
    assert isinstance(built, Config)
    return built


def parse(argv: Sequence[str], prog: str) -> Config:
    """The Config of a command line: `--recipe FILE_OR_NAME`, `--policy.name NAME` and a flag for every field.

    A bare first word is the recipe.

    Raises:
        ConfigError: anything that cannot be; its text is one line.
        SystemExit: after `--help`.
    """
    known = flags.read(argv)
    config = load(recipe_path(known.recipe)) if known.recipe is not None else Config()
    if known.policy is not None and known.policy != policy_name(config.policy):
        table = to_dict(config)
        # the recipe's fields of another policy mean nothing to this one
        table["policy"] = {"name": known.policy}
        config = from_dict(table)
    return _flags(flags.mended(known.flags, config), prog, config)


def _flags(argv: Sequence[str], prog: str, default: Config) -> Config:
    about = (
        "Train with a synchronization controller. Also: --recipe FILE.toml or the NAME of one, the values that flags "
        "override; "
        f"--policy.name {{{','.join(sorted(POLICIES))},module:Class}}, whose fields are then the policy options."
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Config, prog=prog, description=about, default=default, args=list(argv))
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise ConfigError(_one_line(said.getvalue())) from None


def _one_line(box: str) -> str:
    """One line of the words that tyro draws a box around."""
    rows = [row.strip(" │|") for row in box.splitlines()[1:]]  # the first is the box's title
    told = [row for row in rows if row.strip("╭╮╰╯─+- ") and not row.startswith("For full helptext")]
    text = " ".join(told)
    head, _, rest = text.removeprefix("Error parsing ").partition(": ")
    if text.startswith("Error parsing ") and " = " in rest and not head.startswith("--"):
        # our own refusal, with the section that it came from; Constant's plan has no flags of its own
        return f"{head.removesuffix('.plan')}.{rest}" if head else rest
    return text


def _build(cls: Any, table: Any, path: str) -> Any:
    """An instance of a dataclass from a table, each key and type checked; `path` is what precedes a field's name."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{path.rstrip('.')} = {table!r}: must be a table of settings")
    if cls is Policy:
        table = dict(table)
        cls = policy_class(str(table.pop("name", "alternating")))
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    left = dict(table)
    for field in fields(cls):
        hint = hints[field.name]
        if is_flat(field):
            inner = {name: left.pop(name) for name in [part.name for part in fields(hint)] if name in left}
            values[field.name] = _build(hint, inner, path)
        elif field.name in left:
            values[field.name] = _value(hint, left.pop(field.name), f"{path}{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{path}{field.name} is missing: give it a value ({field.type})")
    if left:
        name, value = next(iter(left.items()))
        known = sorted(_names(cls, hints))
        mend = f"choose one of {', '.join(known)}{nearest(name, known)}"
        raise ConfigError(f"{path}{name} = {value!r}: unknown; {mend}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}{error}") from None


def _names(cls: Any, hints: Mapping[str, Any]) -> set[str]:
    """The keys that a table of this dataclass may have."""
    own = {field.name for field in fields(cls) if not is_flat(field)}
    return own.union(*(_names(hints[field.name], {}) for field in fields(cls) if is_flat(field)))


def _value(hint: Any, value: Any, path: str) -> Any:
    """`value` checked against a field's type; TOML has no null, so an optional field is simply left out."""
    if is_dataclass(hint):
        return _build(hint, value, f"{path}.")
    if hint is float and type(value) is int:
        return float(value)
    return fitted(path, hint, value)


def refuse(error: ConfigError, prog: str) -> int:
    """Say in one line why a configuration was refused; the exit code that goes with it."""
    print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
