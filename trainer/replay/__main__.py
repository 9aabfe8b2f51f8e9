"""`python -m trainer.replay RUN`: whether a run's policy decides again as it did, or what another would have decided.

Exit codes: 0 done, and no decision differs from the recorded one; 1 some do; 2 what was asked cannot be.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

from trainer.cli import guarded
from trainer.config import recipes
from trainer.errors import ConfigError
from trainer.plan import Decision, Plan
from trainer.policies import Policy, policy_name
from trainer.replay.decisions import Replayed, recipe, replay
from trainer.replay.drawing import picture
from trainer.report import text

SHOWN = 20
HEAD = ("phase", "batch", "period", "delay", "wire", "lr scale", "fragments", "early end")


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as every command of the trainer does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; write RUN [--policy NAME_OR_RECIPE] [--out DIR]")


def main(argv: Sequence[str]) -> int:
    """Replay the run that the command line names."""
    return guarded("trainer.replay", lambda: _replay(argv))


def _replay(argv: Sequence[str]) -> int:
    parser = _Parser(
        prog="python -m trainer.replay",
        description="Give a run's recorded observations to its policy once more, or to another.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's directory")
    words = "another policy: its name, module:Class, or a recipe FILE.toml whose policy is used"
    parser.add_argument("--policy", metavar="NAME_OR_RECIPE", help=words)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the picture; without it, RUN")
    asked = parser.parse_args(list(argv))
    if asked.policy is not None:
        return _compare(asked.run, _policy(asked.policy), asked.out or asked.run)
    if asked.out is not None:
        raise ConfigError(f"--out = {str(asked.out)!r}: there is a picture only with --policy; give it, or leave --out")
    return _check(asked.run)


def _policy(name: str) -> Policy:
    """The policy that `--policy` means."""
    if name.endswith(".toml"):
        return recipe(Path(name), "--policy").policy
    try:
        return recipes.from_dict({"policy": {"name": name}}).policy
    except ConfigError as error:
        told = str(error).removeprefix(f"policy.name = {name!r}: ")
        raise ConfigError(f"--policy = {name!r}: {told}, or a recipe FILE.toml") from error


def _check(run: Path) -> int:
    """Say which decisions of the run's own policy differ from the recorded ones."""
    decisions = replay(run)
    wrong = [each for each in decisions if each.differs]
    count = f"{len(decisions):,} decision{'s' * (len(decisions) != 1)}"
    if not wrong:
        print(f"{count}, none differs")
        return 0
    print(f"{count}, {len(wrong):,} differ{'s' * (len(wrong) == 1)} from the recorded:")
    print(differences(wrong))
    print(
        "The policy, its settings or the records have changed since. From the first difference on, phase and memory are"
    )
    print("those of the replayed decisions.")
    return 1


def _compare(run: Path, policy: Policy, out: Path) -> int:
    """Say what another policy decides on the run's observations, and draw it."""
    decisions = replay(run, policy)
    names = [policy_name(recipe(run / "config.toml", "config").policy), policy_name(policy)]
    drawn = picture(decisions, *names)
    print(phases(decisions, *names))
    print(drawn.note)
    path = out / f"{drawn.name}.png"
    try:
        out.mkdir(parents=True, exist_ok=True)
        path.write_bytes(drawn.png)
    except OSError as error:
        raise ConfigError(f"--out = {str(out)!r}: cannot be written ({error.strerror}); choose another") from error
    print(f"picture: {path}")
    return 0


def differences(wrong: Sequence[Replayed]) -> str:
    """A row a decision that differs, with what differs of it; the first ones where there are many."""
    rows = [["round", "samples", "recorded", "replayed"]]
    for each in wrong[:SHOWN]:
        sides = _told(each.recorded), _told(each.decided)
        names = [name for name in sides[0] if sides[0][name] != sides[1][name]]
        rows.append([f"{each.round:,}", f"{each.samples:,}"])
        rows[-1] += [", ".join(f"{name} {side[name]}" for name in names) for side in sides]
    left = [f"and {len(wrong) - SHOWN:,} more"] if len(wrong) > SHOWN else []
    return "\n".join([text.columns(rows, words=(2, 3)), *left])


def _told(decision: Decision) -> dict[str, str]:
    """The phase and every field of the Plan, in full."""
    return {"phase": decision.phase} | {each.name: str(getattr(decision.plan, each.name)) for each in fields(Plan)}


def phases(decisions: Sequence[Replayed], recorded: str, other: str) -> str:
    """A row wherever a phase begins on either side; blank is the side whose phase goes on."""
    sides = [each.recorded for each in decisions], [each.decided for each in decisions]
    plans = [decision.plan for side in sides for decision in side]
    used = {"fragments": any(plan.fragments for plan in plans)}
    used["early end"] = any(plan.early_end != "never" for plan in plans)
    columns = [i for i, name in enumerate(HEAD) if used.get(name, True)]
    head, blank = [HEAD[i] for i in columns], [""] * len(columns)
    names = f"recorded: {recorded}", f"replayed: {other}"
    rows = [["", "", *(cell for name in names for cell in [name, *blank[1:]])], ["round", "samples", *head, *head]]
    for i, each in enumerate(decisions):
        cells = [_cells(side[i]) for side in sides]
        pair = [[cells[j][k] for k in columns] if _begins(side, i) else blank for j, side in enumerate(sides)]
        if pair != [blank, blank]:
            rows.append([f"{each.round:,}", f"{each.samples:,}", *pair[0], *pair[1]])
    unsaid = any(text.NONE in row for row in rows)
    legend = [f"({text.NONE}: as sync.delay_steps and sync.wire_format say)"] if unsaid else []
    return "\n".join([text.columns(rows, words=(2, 2 + len(head))), *legend])


def _begins(side: Sequence[Decision], i: int) -> bool:
    """Whether the i-th decision begins a phase."""
    return i == 0 or (side[i].phase, side[i].plan) != (side[i - 1].phase, side[i - 1].plan)


def _cells(decision: Decision) -> list[str]:
    plan = decision.plan
    early = "" if plan.early_end == "never" else f"{plan.early_end} {plan.early_end_above:g}"
    delay, wire = (text.NONE if value is None else str(value) for value in (plan.delay_steps, plan.wire_format))
    return [
        decision.phase,
        f"{plan.batch_per_rank:,}",
        f"{plan.sync_period_steps:,}",
        delay,
        wire,
        f"{plan.lr_scale:.4g}",
        "" if plan.fragments is None else f"{plan.fragments}",
        early,
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
