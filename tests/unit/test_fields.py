"""Values of a wrong type in settings: taken by value, or refused in one line that names field, value and mend."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from trainer.config.config import Config, OptimConfig, RunConfig
from trainer.config.sync import SyncConfig, sync_config_of
from trainer.errors import ConfigError
from trainer.fields import hints_of
from trainer.plan import Plan
from trainer.policies import POLICIES, Alternating, Autopilot, Compose, Constant, NoiseScale, Policy, policy_of

SECTIONS = [Plan(), *(getattr(Config(), field.name) for field in fields(Config) if field.name != "policy")]
SECTIONS += [kind() for kind in POLICIES.values()]


def numeric_fields() -> list[Any]:
    """(section, field) for every field of every section that holds a number."""
    found = []
    for section in SECTIONS:
        kind: Any = type(section)
        for name, hint in hints_of(kind).items():
            if {int, float} & {hint, *get_args(hint)} and get_origin(hint) is not tuple:
                found.append(pytest.param(section, name, id=f"{kind.__name__}.{name}"))
    return found


@pytest.mark.parametrize(("section", "name"), numeric_fields())
@pytest.mark.parametrize("value", ["16", "many", True, [4], math.nan, math.inf, -math.inf, 1j, b"4"], ids=repr)
def test_what_is_no_number_is_refused_in_one_line(section: Any, name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as refused:
        type(section)(**{name: value})
    told = str(refused.value)
    assert told.startswith(f"{name} = {value!r}: ")
    assert "\n" not in told


@pytest.mark.parametrize(("section", "name"), numeric_fields())
def test_numbers_are_taken_by_value(section: Any, name: str) -> None:
    value = getattr(section, name)
    if not isinstance(value, int | float):
        pytest.skip("has no default of its own")
    others = [np.float64(value), *([np.int64(value), float(value)] if float(value).is_integer() else [])]
    for other in others:
        taken = getattr(replace(section, **{name: other}), name)
        assert taken == value
        assert type(taken) in (int, float)


def test_every_section_has_hints_that_can_be_read() -> None:
    for section in SECTIONS:
        kind: Any = type(section)
        assert set(hints_of(kind)) == {field.name for field in fields(kind)}
        assert hints_of(kind).items() <= get_type_hints(kind).items()


def test_other_kinds_are_taken_by_value_too() -> None:
    assert RunConfig(root=Path("a/b")).root == "a/b"  # type: ignore[arg-type]
    assert SyncConfig(find_unused_parameters=np.True_).find_unused_parameters is True  # type: ignore[arg-type]
    assert OptimConfig(schedule="step", milestones=[3, 9.0]).milestones == (3, 9)  # type: ignore[arg-type]
    small: Any = {"batch_per_rank": 8, "sync_period_steps": 2}
    assert Alternating(small, (64, 1)) == Alternating(Plan(8, 2), Plan(64, 1))  # type: ignore[arg-type]
    run: Any = {"samples": 1e5}
    assert Config(run=run).run.samples == 100_000
    policy: Any = "constant"
    assert Config(policy=policy).policy == Constant()


def test_a_constant_plan_is_written_in_three_ways() -> None:
    expected = Constant(Plan(16, 4))
    assert Constant(16, 4) == Constant(batch_per_rank=16, sync_period_steps=4) == expected
    assert Constant(plan=Plan(16, 4)) == Constant(16, sync_period_steps=4) == Constant((16, 4)) == expected  # type: ignore[arg-type]
    assert Constant(16, 4, fragments=2, lr_scaling="sqrt").plan == Plan(16, 4, fragments=2)
    assert replace(expected, lr_scaling="linear") == Constant(16, 4, lr_scaling="linear")
    assert Constant() == Constant(Plan())


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "plan twice": (lambda: Constant(Plan(16, 4), 4), "give sync_period_steps inside it"),
    "batch twice": (lambda: Constant(16, batch_per_rank=4), "plan = 16: give batch_per_rank inside it"),
    "misspelled": (lambda: Constant(batch_per_rnk=4), "batch_per_rnk = 4: unknown; .*did you mean batch_per_rank"),
    "swapped": (lambda: Alternating(Plan(256, 1), Plan(8, 2)), "small.batch_per_rank = 256: is above .*swap the two"),
    "numbers": (lambda: Alternating(8, 64), r"small = 8: must be a Plan, such as Plan\("),  # type: ignore[arg-type]
    "no part": (lambda: Alternating(None), "small = None: must be a Plan"),  # type: ignore[arg-type]
    "too long": (lambda: Alternating((1,) * 10), r"small = \(1, 1, .*must be a Plan"),  # type: ignore[arg-type]
    "key": (lambda: Alternating({"batch": 8}), "small.batch = 8: unknown"),  # type: ignore[arg-type]
    "inside": (lambda: Alternating({"batch_per_rank": "8"}), "small.batch_per_rank = '8': must be a whole"),  # type: ignore[arg-type]
    "choice": (lambda: Plan(8, wire_format="int5"), "wire_format = 'int5': choose one of .*did you mean int"),  # type: ignore[arg-type]
    "or auto": (lambda: Plan(8, delay_steps="atuo"), "delay_steps = 'atuo': must be a whole number or auto"),  # type: ignore[arg-type]
    "batch rule": (lambda: Compose(batch=3), "batch = 3: must be a policy"),  # type: ignore[arg-type]
    "no list": (lambda: OptimConfig(milestones=3), "milestones = 3: must be a list"),  # type: ignore[arg-type]
    "policy's name": (lambda: policy_of("autopilt"), "did you mean autopilot"),
    "a Plan": (lambda: policy_of(Plan()), r"is a Plan: write Constant\(plan\)"),
    "no policy": (lambda: policy_of(3), "policy = 3: must be a policy"),
    "no policy class": (lambda: policy_of(int), "must be a policy"),
    "abstract": (lambda: policy_of(Policy), "cannot be built with defaults"),
    "settings' key": (lambda: sync_config_of({"wire_fromat": "int8"}), "sync.wire_fromat.*did you mean wire_format"),
    "settings' value": (lambda: sync_config_of({"mixing": "1"}), "sync.mixing = '1': must be a number"),
    "no settings": (lambda: sync_config_of(3), "settings = 3: must be a SyncConfig"),
}


@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_slips_are_refused_in_one_line(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_policies_and_settings_may_be_named() -> None:
    assert policy_of("autopilot") == policy_of(Autopilot) == policy_of("trainer.policies:Autopilot") == Autopilot()
    mine = Constant(16, 4)
    assert policy_of(mine) is mine
    assert Compose(batch="noise_scale").batch == NoiseScale()  # type: ignore[arg-type]
    settings = SyncConfig(wire_format="int8")
    assert sync_config_of(settings) is settings
    assert sync_config_of({"wire_format": "int8"}) == settings
    assert sync_config_of(None) == SyncConfig()
