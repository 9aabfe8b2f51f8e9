"""Errors meant for people, the rules that raise them, and `module:name` look-ups."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A setting that cannot hold. Its text is one line: the field, the value, the mend."""


class PeerError(RuntimeError):
    """A collective that did not finish: names the operation and the rank it failed on."""


class DataError(RuntimeError):
    """Data that could not be read. Its text is one line: the item, the cause."""


class TooFewError(PeerError):
    """Fewer ranks are left than the run may have, or the store that they meet at is gone."""


class MismatchError(RuntimeError):
    """Ranks that disagree about what they are doing: names both sides."""


def require(field: str, value: object, holds: bool, mend: str) -> None:
    """Refuse `field = value` with its mend unless it holds."""
    if not holds:
        raise ConfigError(f"{field} = {value!r}: {mend}")


def require_at_least(section: object, low: int, *names: str) -> None:
    """Refuse fields of a dataclass that are below `low`; None stands for not given."""
    for name in names:
        value = getattr(section, name)
        require(name, value, value is None or value >= low, f"must be at least {low}")


def require_choices(section: object) -> None:
    """Refuse Literal fields of a dataclass that hold none of their choices (no parser checks a library call)."""
    kind: Any = type(section)
    for name, choices in _choices(kind).items():
        value = getattr(section, name)
        require(name, value, value in choices, f"choose one of {', '.join(map(str, choices))}")


@cache
def _choices(kind: Any) -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(kind)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def import_object(field: str, spec: str) -> Any:
    """The object behind `module:name`; `field` names the setting that it came from.

    Raises:
        ConfigError: the module or the name is not there.
    """
    module, _, name = spec.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{field} = {spec!r}: write module:name of something importable ({error})") from error
    return found
