"""Reads a run's observations and decisions from its records, and has a policy decide on the same observations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trainer.config import recipes
from trainer.config.config import Config
from trainer.control.controller import Controller
from trainer.errors import ConfigError
from trainer.plan import Decision, Observation, Plan
from trainer.policies import Policy
from trainer.records.reader import Line, read_lines

T = TypeVar("T")

NOT_NUMBERS = ("plan", "ran", "phase_name")


@dataclass(frozen=True)
class Replayed:
    """One decision of a run, and what a policy decides on the same observation."""

    round: int
    """Rounds ended when it was taken; 0 at the first."""
    samples: int
    """Samples trained then, over all ranks."""
    recorded: Decision
    decided: Decision

    @property
    def differs(self) -> bool:
        """Whether the Plan or the name of its phase differs; the reasons are not compared."""
        return (self.recorded.phase, self.recorded.plan) != (self.decided.phase, self.decided.plan)


def replay(run_folder: str | Path, policy: Policy | None = None) -> list[Replayed]:
    """Give a run's observations, in order, to a fresh controller: the first decision, and one for every round record.

    Args:
        run_folder: the run's directory, finished or not, resumed or not.
        policy: who decides; None: the run's own, as its config.toml says. What another decides was not trained, so the
            observations after it are not those that it would have made.

    Raises:
        ConfigError: not a run's directory, or one without observations; its text is one line.
    """
    folder = Path(run_folder)
    first, rounds = _recorded(folder / "metrics.jsonl")
    response = rounds[0][0].step_response if rounds else 1.0
    controller = Controller(policy or recipe(folder / "config.toml", "config").policy, response)
    found = [Replayed(0, 0, first, controller.decision)]
    for seen, recorded in rounds:
        controller.observe(seen)
        found.append(Replayed(seen.round, seen.samples, recorded, controller.decision))
    return found


def recipe(path: Path, field: str) -> Config:
    """The Config of a recipe that `field` names."""
    try:
        return recipes.load(path)
    except ConfigError as error:
        told = str(error).removeprefix(f"--recipe = {str(path)!r}: ")
        raise ConfigError(f"{field} = {str(path)!r}: {told}; mend that file, or name another") from error


def _recorded(path: Path) -> tuple[Decision, list[tuple[Observation, Decision]]]:
    """The run's first decision, and what it saw and decided at every round record."""
    lines = list(read_lines(path))
    begins = [line for line in lines if line[1]["kind"] == "phase" and line[1].get("number") == 0]
    if not begins:
        raise ConfigError(f"{path}: phase 0 is missing: name a run that was recorded from its start on")
    where, phase = begins[0]
    first = _parsed(where, "plan", lambda: Decision(Plan(**phase["plan"]), str(phase["name"]), phase["why"]))
    return first, [(_seen(line), _decided(line)) for line in lines if line[1]["kind"] == "round"]


def _seen(line: Line) -> Observation:
    seen = _table(line, "seen")
    for name, value in seen.items():
        if name not in NOT_NUMBERS and not isinstance(value, int | float | None):
            raise ConfigError(f"{line[0]}: seen.{name} = {value!r}: must be a number; mend that line")
    return _parsed(line[0], "seen", lambda: Observation.restored(seen))


def _decided(line: Line) -> Decision:
    decided = _table(line, "decided")
    return _parsed(
        line[0],
        "decided",
        lambda: Decision(Plan(**decided["plan"]), str(decided["phase"]), decided["why"]),
    )


def _table(line: Line, name: str) -> Mapping[str, Any]:
    where, record = line
    if name not in record:
        raise ConfigError(f"{where}: {name} is missing: rounds were recorded without it once; train the run again")
    value = record[name]
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {name} = {value!r}: must be a table; mend that line")
    return value


def _parsed(where: str, name: str, build: Callable[[], T]) -> T:
    """A record's table, built by `build`; a refusal names the place."""
    try:
        return build()
    except KeyError as error:
        raise ConfigError(f"{where}: {name}: {error} is missing; mend that line") from error
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {name}: {error}; mend that line") from error
