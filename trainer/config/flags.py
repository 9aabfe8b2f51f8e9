"""A command line's words: flags with their values, slips mended where the meaning is plain. Imports no torch."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

from trainer.config.config import Config, is_flat
from trainer.errors import ConfigError
from trainer.fields import WORDS, fitted, hints_of, nearest, or_words
from trainer.policies import POLICIES

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
FIRST = ("--recipe", "--policy.name")
"""Flags that say what the other flags are."""


@dataclass(frozen=True)
class Given:
    """One flag of a command line, with the words that follow it."""

    flag: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """A command line: the recipe, the policy's name, and the other flags."""

    recipe: str | None
    policy: str | None
    flags: tuple[Given, ...]


def read(argv: Sequence[str]) -> Words:
    """The words of a command line; a bare first word is the recipe.

    Raises:
        ConfigError: a word that belongs to no flag, or `--recipe` or `--policy.name` without one value.
    """
    bare, given = _paired(argv)
    first = [Given("--recipe", (word,)) for word in bare] + [each for each in given if each.flag in FIRST]
    found: dict[str, str] = {}
    for each in first:
        if each.flag == "--recipe" and "--recipe" in found:
            raise ConfigError(f"--recipe = {' '.join(each.values)!r}: is given twice; choose one recipe")
        found[each.flag] = _single(each, "FILE or NAME" if each.flag == "--recipe" else "NAME")
    left = tuple(each for each in given if each.flag not in FIRST)
    return Words(found.get("--recipe"), found.get("--policy.name"), left)


def _paired(argv: Sequence[str]) -> tuple[list[str], list[Given]]:
    """The words before the first flag, and each flag with the words up to the next."""
    bare: list[str] = []
    pairs: list[tuple[str, list[str]]] = []
    for word in argv:
        if re.match(r"--?[A-Za-z]", word):
            flag, equals, value = word.partition("=")
            pairs.append((flag.replace("_", "-") if flag.startswith("--") else flag, [value] if equals else []))
            if pairs[-1][0] == "--policy-name":
                pairs[-1] = ("--policy.name", pairs[-1][1])
        elif pairs:
            pairs[-1][1].append(word)
        else:
            bare.append(word)
    return bare, [Given(flag, tuple(values)) for flag, values in pairs]


def table(section: Any, prefix: str = "--") -> dict[str, Any]:
    """The flags of a configuration, each with its field's type."""
    found: dict[str, Any] = {}
    kind: Any = type(section)
    hints = hints_of(kind)
    for field in fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name.replace('_', '-')}"
        if is_flat(field):
            found |= table(value, prefix)
        elif is_dataclass(value):
            found |= table(value, f"{name}.")
        else:
            found[name] = hints.get(field.name, Any)
    return found


def mended(given: Iterable[Given], config: Config) -> list[str]:
    """These flags in the one form that the parser takes; `config` says which flags there are.

    Raises:
        ConfigError: no such flag, no value, too many, or one of another type; its text is one line.
    """
    known = table(config)
    words: list[str] = []
    for each in given:
        if each.flag in ("-h", "--help"):
            words.append(each.flag)
            continue
        positive = re.sub(r"(^--|\.)no-(?=[^.]*$)", r"\1", each.flag)
        if each.flag in known:
            words += _words(each, known[each.flag])
        elif known.get(positive) is bool:
            words.append(_truth(Given(positive, each.values), negated=True))
        else:
            _unknown(each, known, config)
    return words


def _words(given: Given, hint: Any) -> list[str]:
    if hint is bool:
        return [_truth(given, negated=False)]
    if get_origin(hint) is tuple:
        items = [item for value in given.values for item in re.split(r"[,\s]+", value.strip("[]() ")) if item]
        kind = get_args(hint)[0]
        return [given.flag, *(_text(given.flag, kind, item) for item in items)]
    value = _single(given, _in_words(hint))
    return [f"{given.flag}={_text(given.flag, hint, value)}"]


def _single(given: Given, words: str) -> str:
    if not given.values:
        raise ConfigError(f"{given.flag}: needs a value ({words})")
    if len(given.values) > 1:
        surplus = " ".join(given.values[1:])
        raise ConfigError(f"{given.flag} = {' '.join(given.values)!r}: takes one value; leave out {surplus!r}")
    return given.values[0]


def _truth(given: Given, *, negated: bool) -> str:
    """A switch in the parser's own form: --data.flip or --data.no-flip."""
    word = _single(given, "true or false").lower() if given.values else "true"
    if word not in TRUE + FALSE:
        raise ConfigError(f"{given.flag} = {given.values[0]!r}: must be true or false")
    on = (word in TRUE) != negated
    head, dot, name = given.flag.rpartition(".")
    return given.flag if on else f"{head}{dot}no-{name}"


def _text(flag: str, hint: Any, text: str) -> str:
    """A value's text, as the parser reads it; numbers may be written 1e5 or 120_000.

    Raises:
        ConfigError: it is not of the flag's type.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in kinds and text == "None":
        return text
    for kind in kinds:
        if kind not in (int, float, str) and get_origin(kind) is not Literal:
            return text  # the parser knows better
        try:
            value = fitted(flag, kind, _number(text) if kind in (int, float) else text)
        except ConfigError:
            continue
        return str(value)
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    raise ConfigError(f"{flag} = {text!r}: must be {_in_words(hint)}{nearest(text, choices)}")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _in_words(hint: Any) -> str:
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return or_words(kinds) if all(kind in WORDS or get_args(kind) or kind is type(None) for kind in kinds) else "VALUE"


def _unknown(given: Given, known: Mapping[str, Any], config: Config) -> NoReturn:
    """Refuse a flag that is not there: it belongs to another policy, or another was meant."""
    owners = [name for name, kind in POLICIES.items() if given.flag in table(kind(), "--policy.")]
    if owners:
        others = ", ".join(sorted(owners))
        raise ConfigError(f"{given.flag}: is no flag of this policy; it goes with --policy.name {others}")
    meant = nearest_flag(given.flag, [*known, *FIRST])
    raise ConfigError(f"{given.flag}: no such flag{f'; did you mean {meant}?' if meant else ', --help lists them'}")


def nearest_flag(flag: str, known: Sequence[str]) -> str | None:
    """The flag that was probably meant: of the same name, of these initials, or spelled alike."""
    name = flag.rpartition(".")[2].lstrip("-")
    initials = "".join(word[:1] for word in name.split("-"))
    for word in (name, initials):
        same = [each for each in known if each.rpartition(".")[2].lstrip("-") == word]
        if same and len(word) > 1:
            return max(same, key=lambda each: _likeness(flag, each))
    best = max(known, key=lambda each: _likeness(flag, each))
    return best if _likeness(flag, best) >= 0.6 else None


def _likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()
