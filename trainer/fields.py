"""Checks of a dataclass's fields by its type hints, the same for recipes, flags and library calls. Imports no torch."""

from __future__ import annotations

import math
import numbers
import os
import types
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trainer.errors import ConfigError

T = TypeVar("T")
WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def require_types(section: Any) -> None:
    """Refuse fields whose value is not of their type; take by value what means the same.

    A numpy 16 or a 16.0 becomes 16 where a whole number is meant, a list a tuple, a table of settings their dataclass.
    Neither a truth, a text, None, NaN nor an infinity passes for a number.

    Raises:
        ConfigError: one line with the field, the value and the mend.
    """
    kind: Any = type(section)
    for name, hint in hints_of(kind).items():
        value = getattr(section, name)
        taken = fitted(name, hint, value)
        if taken is not value:
            object.__setattr__(section, name, taken)  # the section is frozen, and still being built


@cache
def hints_of(kind: Any) -> dict[str, Any]:
    """The type of every field of a dataclass; those that cannot be read are left out."""
    try:
        hints = get_type_hints(kind)
    except (NameError, TypeError, AttributeError):  # a user's own class, with a type that only a checker knows
        return {}
    return {field.name: hints[field.name] for field in fields(kind) if field.init}


def fitted(field: str, hint: Any, value: Any) -> Any:
    """`value` as the type `hint` has it.

    Raises:
        ConfigError: one line with the field, the value and the mend.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fitted(field, args[0], value)
    if origin in (Union, types.UnionType):
        return _one_of(field, args, value)
    if origin is Literal:
        if any(value is choice or (type(value) is type(choice) and value == choice) for choice in args):
            return value
        known = [str(choice) for choice in args]
        raise ConfigError(f"{field} = {value!r}: choose one of {', '.join(known)}{nearest(value, known)}")
    if origin is tuple:
        return _tuple(field, args, value)
    if hint in _PLAIN:
        return _plain(field, hint, value)
    if is_dataclass(hint):
        return _dataclass(field, hint, value)
    return value


def _one_of(field: str, kinds: tuple[Any, ...], value: Any) -> Any:
    """The value as the first of these types that takes it; the refusal names what may be given."""
    if value is None and type(None) in kinds:
        return None
    told = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return fitted(field, kind, value)
        except ConfigError as error:
            told.append(str(error).removeprefix(f"{field} = {value!r}: "))
    if len(told) == 1:
        raise ConfigError(f"{field} = {value!r}: {told[0]}")
    raise ConfigError(f"{field} = {value!r}: must be {or_words(kinds)}")


def or_words(kinds: Iterable[Any]) -> str:
    """These types in words: a whole number, a number, or auto."""
    words: list[str] = []
    for kind in kinds:
        if kind is int and float in kinds:
            continue
        if get_origin(kind) is Literal:
            words += [str(choice) for choice in get_args(kind)]
        elif kind is not type(None):
            words.append(WORDS.get(kind, getattr(kind, "__name__", str(kind))))
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _plain(field: str, kind: Any, value: Any) -> Any:
    if type(value) is kind and (kind is not float or math.isfinite(value)):
        return value
    taken = _PLAIN[kind](value)
    if taken is None:
        raise ConfigError(f"{field} = {value!r}: must be {WORDS[kind]}")
    return taken


def _int(value: Any) -> int | None:
    number = _float(value)
    return int(value) if number is not None and float(number).is_integer() else None


def _float(value: Any) -> int | float | None:
    if type(value) is int:
        return value  # shown as it was written
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        return None
    return float(value)


def _bool(value: Any) -> bool | None:
    # numpy's truth is none of Python's, and numpy need not be imported to know it
    return bool(value) if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_") else None


def _str(value: Any) -> str | None:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    return str(text) if isinstance(text, str) else None


_PLAIN: dict[Any, Any] = {int: _int, float: _float, bool: _bool, str: _str}


def _tuple(field: str, args: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{field} = {value!r}: must be a list")
    if len(args) != 2 or args[1] is not Ellipsis:
        return tuple(value)
    taken = tuple(fitted(field, args[0], item) for item in value)
    same = isinstance(value, tuple) and all(new is old for new, old in zip(taken, value, strict=True))
    return value if same else taken


def _dataclass(field: str, kind: Any, value: Any) -> Any:
    """An instance as it is; a table or a list of values builds one."""
    if isinstance(value, kind):
        return value
    name = kind.__name__
    if getattr(kind, "__abstractmethods__", None) or not isinstance(value, Mapping | tuple | list):
        mend = f"must be a {name}, such as {_example(kind)}"
        raise ConfigError(f"{field} = {value!r}: {mend}")
    try:
        return build(kind, value) if isinstance(value, Mapping) else kind(*value)
    except ConfigError as error:
        raise ConfigError(f"{field}.{error}") from None
    except TypeError:
        raise ConfigError(f"{field} = {value!r}: must be a {name}, such as {_example(kind)}") from None


def _example(kind: Any) -> str:
    """A call that builds one: the first two fields at their defaults."""
    shown = [field for field in fields(kind) if isinstance(field.default, int | float | str)][:2]
    return f"{kind.__name__}({', '.join(f'{field.name}={field.default!r}' for field in shown)})"


def build(kind: type[T], table: Mapping[Any, Any]) -> T:
    """A dataclass of the fields that a table gives.

    Raises:
        ConfigError: an unknown key, or a value that cannot be.
    """
    section: Any = kind
    known = sorted(field.name for field in fields(section) if field.init)
    for key in table:
        if key not in known:
            raise ConfigError(f"{key} = {table[key]!r}: unknown; choose one of {', '.join(known)}{nearest(key, known)}")
    return kind(**table)


def nearest(word: object, known: Iterable[str]) -> str:
    """Words for the end of a refusal: which known name was probably meant; empty where none is near."""
    found = get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""
