"""Ranks that come and go: those that are left go on as one, and lose nothing of what they trained."""

from __future__ import annotations

import collections
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from members import Loop, Member, store, wait_until_begun
from small_run import records

from trainer.distributed.alive import HEART_S, SILENT_BEATS
from trainer.distributed.members import Members
from trainer.errors import ConfigError, MismatchError

LOOPS = {
    "parameters": Loop(plans=((8, 4),)),
    "gradients": Loop(plans=((8, 1),)),
    "both": Loop(plans=((8, 4), (16, 1))),
    "delayed": Loop(plans=((8, 6),), settings={"delay_steps": 2}),
    "fragments": Loop(plans=((8, 6),), settings={"fragments": 2, "delay_steps": 1}),
    "lossy, outer": Loop(plans=((8, 4),), settings={"wire_format": "int8", "outer": "slowmo"}),
    "optimizer averaged": Loop(plans=((8, 4),), settings={"state": "average"}),
    "loader": Loop(plans=((8, 4),), data="loader"),
    "batch sampler": Loop(plans=((8, 4),), data="batch_sampler"),
    "evaluates": Loop(plans=((8, 1),), evaluates=True),
}


def are_one(told: Sequence[Mapping[str, Any]], samples: int) -> None:
    """These members ended well, at one place, with one model, after at least so many samples."""
    assert [(each["exitcode"], each["error"]) for each in told] == [(0, None)] * len(told)
    for fact in ("weights", "samples", "local_step", "ranks", "lr"):
        assert len({json.dumps(each[fact]) for each in told}) == 1, fact
    assert told[0]["samples"] >= samples - 8 * 4


def read_once(told: Sequence[Mapping[str, Any]]) -> None:
    """No sample was read twice in a pass."""
    counts = collections.Counter(number for each in told for number in each["seen"])
    assert max(counts.values()) == 1


@pytest.mark.parametrize("at", [31, 58])
@pytest.mark.parametrize("name", LOOPS)
def test_a_killed_rank_costs_the_others_nothing(tmp_path: Path, name: str, at: int) -> None:
    loop = LOOPS[name]
    with store() as address:
        dying = replace(loop, ends_at_call=at, once_begun=at % 2 == 0)
        members = [Member(address, tmp_path / str(rank), each) for rank, each in enumerate([loop, dying, loop])]
        first, killed, last = (member.end() for member in members)
    assert killed["exitcode"] == -signal.SIGKILL
    are_one([first, last], loop.samples)
    if name != "loader":
        read_once([first, last])
    (change,) = first["heard"]
    assert change["ranks"] == 2
    assert list(change["left"].values()) == ["ended without a word"]
    assert change["took_s"] < 30


def test_the_first_and_another_rank_go_and_a_newcomer_comes(tmp_path: Path) -> None:
    loop = replace(LOOPS["both"], ranks=4, pause_s=0.01, evaluates=True)
    with store() as address:
        loops = [replace(loop, ends_at_call=40), replace(loop, ends_at_call=60, once_begun=True), loop, loop]
        members = [Member(address, tmp_path / str(rank), each) for rank, each in enumerate(loops)]
        time.sleep(0.5)
        members.append(Member(address, tmp_path / "new", loop))
        told = [member.end() for member in members]
    assert [each["exitcode"] for each in told] == [-signal.SIGKILL, -signal.SIGKILL, 0, 0, 0]
    are_one(told[2:], loop.samples)
    read_once(told[2:])
    joined = [change for change in told[2]["heard"] if change["joined"]]
    assert len(joined) == 1
    assert told[4]["heard"][0]["joined"] == joined[0]["joined"]


def test_a_frozen_rank_is_found_within_three_heartbeats_and_comes_back(tmp_path: Path) -> None:
    loop = replace(LOOPS["parameters"], pause_s=0.02, samples=6_000)
    with store() as address:
        frozen = replace(loop, ends_at_call=30, by=signal.SIGSTOP)
        members = [Member(address, tmp_path / str(rank), each) for rank, each in enumerate([loop, loop, frozen])]
        time.sleep(3 + 2 * HEART_S * SILENT_BEATS)
        pid = members[2].process.pid
        assert pid is not None
        os.kill(pid, signal.SIGCONT)
        told = [member.end() for member in members]
    are_one(told, loop.samples)
    gone, back = told[0]["heard"]
    assert list(gone["left"].values()) == [f"gave no sign of life for {SILENT_BEATS * HEART_S:g} s"]
    assert (gone["ranks"], back["ranks"], len(back["joined"])) == (2, 3, 1)


def test_too_few_ranks_end_the_run_and_say_why(tmp_path: Path) -> None:
    loop = replace(LOOPS["parameters"], ranks=2, min_ranks=2)
    with store() as address:
        dying = replace(loop, ends_at_call=30)
        members = [Member(address, tmp_path / str(rank), each) for rank, each in enumerate([loop, dying])]
        told = members[0].end()
    assert "1 of at least 2 ranks are left: rank " in told["error"]
    assert "ended without a word" in told["error"]


def test_a_newcomer_to_a_run_that_is_over_is_told(tmp_path: Path) -> None:
    loop = replace(LOOPS["parameters"], ranks=1, samples=200)
    with store() as address:
        assert Member(address, tmp_path / "first", loop).end()["exitcode"] == 0
        late = Member(address, tmp_path / "late", loop).end()
    assert "has ended: start another store for another run" in late["error"]


def test_newcomers_that_do_not_fit_are_refused_once_and_the_others_go_on(tmp_path: Path) -> None:
    loop = replace(LOOPS["parameters"], ranks=2, pause_s=0.03)
    others = {
        "parameter '0.weight' is (8, 6)": replace(loop, hidden=8),
        "policy of LocalSGD is Constant": replace(loop, plans=((8, 2),)),
        "settings of LocalSGD is SyncConfig": replace(loop, settings={"wire_format": "int8"}),
    }
    with store() as address:
        members = [Member(address, tmp_path / str(rank), loop) for rank in range(2)]
        wait_until_begun(address)
        refused = [Member(address, tmp_path / f"other-{n}", other) for n, other in enumerate(others.values())]
        errors = [member.end()["error"] for member in refused]
        told = [member.end() for member in members]
    for said, error in zip(others, errors, strict=True):
        assert f"MismatchError: the {said}" in error
    are_one(told, loop.samples)
    assert [change["ranks"] for change in told[0]["heard"]] == [2] * len(told[0]["heard"])
    assert len(told[0]["heard"]) <= len(others)


@pytest.mark.parametrize("name", ["parameters", "gradients"])
def test_a_newcomer_takes_the_schedule_and_the_layers_that_are_unfrozen(tmp_path: Path, name: str) -> None:
    loop = replace(LOOPS[name], ranks=2, pause_s=0.03, unfreezes_at=12, samples=1_600)
    with store() as address:
        members = [Member(address, tmp_path / str(rank), loop) for rank in range(2)]
        wait_until_begun(address)
        time.sleep(0.6)
        members.append(Member(address, tmp_path / "new", loop))
        told = [member.end() for member in members]
    are_one(told, loop.samples)
    read_once(told)
    assert [change["ranks"] for change in told[2]["heard"]] == [3]


def test_a_rank_that_dies_as_a_loaders_pass_begins_costs_no_pass(tmp_path: Path) -> None:
    loop = replace(LOOPS["loader"], pause_s=0.03, samples=1_600)
    with store() as address:
        loops = [loop, loop, replace(loop, ends_at_call=7)]  # where ranks first tell what their loaders read
        members = [Member(address, tmp_path / str(rank), each) for rank, each in enumerate(loops)]
        assert members[2].end()["exitcode"] == -signal.SIGKILL
        members[2] = Member(address, tmp_path / "new", loop)
        are_one([member.end() for member in members], loop.samples)


def test_members_meet_for_one_run_after_another(tmp_path: Path) -> None:
    loop = replace(LOOPS["parameters"], samples=480, runs=3)
    with store() as address:
        loops = [loop, replace(loop, ends_at_call=60), loop]
        members = [Member(address, tmp_path / str(rank), each) for rank, each in enumerate(loops)]
        first, killed, last = (member.end() for member in members)
    assert killed["exitcode"] == -signal.SIGKILL
    are_one([first, last], loop.samples)
    assert first["ranks"] == 2


def test_without_its_store_a_run_goes_on_until_the_ranks_change(tmp_path: Path) -> None:
    loop = replace(LOOPS["both"], pause_s=0.02, ranks=2)
    with store() as address, store() as another:
        members = [Member(address, tmp_path / str(rank), loop) for rank in range(2)]
        losing = [Member(another, tmp_path / f"losing-{rank}", replace(loop, pause_s=0.3)) for rank in range(2)]
        wait_until_begun(address)
        wait_until_begun(another)
    time.sleep(0.5)
    losing[1].process.kill()
    are_one([member.end() for member in members], loop.samples)
    assert f"TooFewError: the store at {another} is gone" in losing[0].end()["error"]


def test_what_members_cannot_have_is_said() -> None:
    with pytest.raises(ConfigError, match="elastic = 'nowhere': must be host:port"):
        Members("nowhere")
    with pytest.raises(ConfigError, match=r"min_ranks = 3: must be in 1 \.\. 2"):
        Members("127.0.0.1:1", ranks=2, min_ranks=3)
    with pytest.raises(ConfigError, match="max_ranks = 1: must be at least 2"):
        Members("127.0.0.1:1", ranks=2, max_ranks=1)
    with store() as address:
        first = Members(address, job="this")
        try:
            with pytest.raises(MismatchError, match="run another job"):
                Members(address, job="that")
        finally:
            first.close()
        for again in (first.begin, lambda: first.meet({})):
            with pytest.raises(ConfigError, match="members are closed"):
                again()


def start(folder: Path, address: str, *flags: str) -> Command:
    """A rank of an elastic run of the recipe `quick`."""
    place = ["--run.root", str(folder), "--run.name", "run", "--world.elastic", address, "--world.ranks", "3"]
    longer = ["--run.samples", "24000", "--policy.samples-per-phase", "0.25", "--checkpoint.every-samples", "4000"]
    flags = ("--recipe", "quick", *place, *longer, "--world.timeout-s", "60", *flags)
    return Command("trainer", list(flags), dict(os.environ) | {"OMP_NUM_THREADS": "1"})


def rounds_at_least(folder: Path, count: int) -> None:
    metrics = folder / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() and metrics.read_text().count('"kind": "round"') >= count:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{metrics} has not {count} rounds")


def test_a_run_goes_on_without_its_writer_and_a_newcomer_saves_with_the_others(tmp_path: Path) -> None:
    with store() as address:
        ranks = [start(tmp_path, address) for _ in range(3)]
        rounds_at_least(tmp_path, 3)
        lock = json.loads((tmp_path / "run" / "lock").read_text())
        os.kill(lock["pid"], signal.SIGKILL)
        rounds_at_least(tmp_path, 6)
        ranks.append(start(tmp_path, address))
        codes = [rank.wait(90) for rank in ranks]
        said = [rank.communicate() for rank in ranks]
    assert sorted(codes) == [-signal.SIGKILL, 0, 0, 0], said
    assert sum("done: test accuracy" in out for out, _ in said) == 1
    assert not any("Traceback" in err for _, err in said), said
    found = records(tmp_path / "run")
    changes = [each for each in found if each.get("what") == "regrouped"]
    assert [each["ranks"] for each in changes] == [2, 3]
    assert list(changes[0]["left"].values()) == ["ended without a word"]
    steps = [each["local_step"] for each in found if each["kind"] == "round"]
    assert steps == sorted(set(steps))
    assert found[-1]["test_accuracy"] > 0.9
    assert found[-1]["samples"] >= 24_000
    manifests = [json.loads(path.read_text()) for path in (tmp_path / "run" / "checkpoints").glob("*/manifest.json")]
    assert manifests
    assert max((each["manifest"] for each in manifests), key=lambda each: each["local_step"])["ranks"] == 3
