"""Checkpoints that can be trusted: what is in them, what becomes of bad ones, and who may write them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, run
from torch import nn
from whole_runs import end, in_process, lines, settings, start, told, weights

from trainer.config import recipes
from trainer.config.config import Config, to_dict
from trainer.distributed.world import World
from trainer.errors import ConfigError
from trainer.loop import lock as locks
from trainer.loop.lock import RunLock
from trainer.loop.manifest import Manifest, load_rank
from trainer.loop.tensor_file import read_tensors

OFTEN = {"every_samples": 200, "keep": 100}
Damage = Callable[[Path], object]


def small(root: Path, name: str, **sections: Any) -> Config:
    """Two rounds a checkpoint, and few steps."""
    return settings(root, name, **{"run": {"samples": 700}, "checkpoint": OFTEN} | sections)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an uninterrupted run, `one`, of two ranks."""
    root = tmp_path_factory.mktemp("checkpointed")
    run(2, in_process, small(root, "one"))
    return root


def steps(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def copied(runs: Path, root: Path, drop: int = 1) -> Path:
    """A copy of the run without its end: so many of its newest checkpoints are gone."""
    cut = shutil.copytree(runs / "one", root / "one")
    for path in steps(cut)[len(steps(cut)) - drop :]:
        shutil.rmtree(path)
    for name in ("model.pt", "summary.json"):
        (cut / name).unlink()
    return cut


def warnings(folder: Path) -> list[str]:
    return [line["message"] for line in lines(folder) if line.get("what") == "warning"]


# ---- what is in a checkpoint


def test_a_checkpoint_says_what_it_is_and_holds_what_is_one_once(runs: Path) -> None:
    *_, at_large, last = [(path, Manifest.read(path)) for path in steps(runs / "one")]
    path, manifest = last
    assert (manifest.ranks, manifest.samples, manifest.config["policy"]["name"]) == (2, 700, "alternating")
    assert manifest.run == at_large[1].run
    assert ["0.weight", [4, 1, 5, 5], "torch.float32"] in manifest.parameters
    assert sorted(manifest.files) == sorted(each.name for each in path.iterdir() if each.name != "manifest.json")
    model = torch.load(runs / "one" / "model.pt", weights_only=True)
    states = [load_rank(path, rank) for rank in (0, 1)]
    for name, value in model.items():  # at the end replicas are one
        assert all(torch.equal(state["model"][name], value) for state in states), name
    held = [read_tensors(path / f"rank-000{rank}.safetensors") for rank in (0, 1)]
    assert {f"model.{name}" for name in model} - {*held[0]} <= {"model.1.num_batches_tracked"}  # as another tensor is
    assert not [name for name in held[1] if name.startswith("model.")]
    exported = read_tensors(runs / "one" / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in model.items())


def test_nothing_that_runs_is_read_back(runs: Path) -> None:
    for path in steps(runs / "one"):
        for file in path.iterdir():
            assert file.suffix == ".safetensors" or json.loads(file.read_text())


def test_seconds_between_checkpoints_are_rank_0s_and_all_ranks_write_at_one_step(runs: Path, tmp_path: Path) -> None:
    run(2, in_process, small(tmp_path, "timed", checkpoint={"every_s": 1e-6, "every_samples": None, "keep": 99}))
    assert torch.equal(weights(tmp_path / "timed"), weights(runs / "one"))
    found = steps(tmp_path / "timed")
    assert len(found) > 3
    again = small(tmp_path, "again", checkpoint=OFTEN, run={"samples": 700, "resume": str(found[1])})
    run(2, in_process, again)
    assert torch.equal(weights(tmp_path / "again"), weights(runs / "one"))


# ---- bad ones


def flip(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def newer(path: Path) -> None:
    table = json.loads((path / "manifest.json").read_text())
    table["manifest"] |= {"format": 99, "version": "9.0"}
    (path / "manifest.json").write_text(json.dumps(table))


def middle_of_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"local_step": ', '"local_step": 1'))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "flipped": (lambda path: flip(path / "rank-0001.safetensors"), "rank-0001.safetensors has another checksum than"),
    "truncated": (lambda path: os.truncate(path / "rank-0000.safetensors", 999), "rank-0000.safetensors has 999 bytes"),
    "zeroed": (lambda path: (path / "rank-0001.json").write_bytes(b""), "rank-0001.json has 0 bytes where"),
    "missing": (lambda path: (path / "rank-0001.safetensors").unlink(), "rank-0001.safetensors cannot be read"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "manifest": (middle_of_manifest, "manifest.json has another checksum than it says"),
    "newer": (newer, "is of format 99, written by version 9.0: this is version"),
}


def test_bad_checkpoints_are_named_kept_aside_and_the_one_before_is_used(runs: Path, tmp_path: Path) -> None:
    """All kinds at once: every checkpoint but the oldest is bad in a way of its own."""
    cut = copied(runs, tmp_path, drop=0)
    oldest, *bad = steps(cut)
    for number in range(len(DAMAGES) - len(bad)):
        bad.append(shutil.copytree(bad[0], oldest.with_name(f"step-{10**6 + number:010d}")))
    for path, (damage, _) in zip(bad, DAMAGES.values(), strict=True):
        damage(path)
    run(2, in_process, small(tmp_path, "one", run={"samples": 700, "resume": "auto"}))
    said = warnings(cut)
    assert len(said) == len(DAMAGES)
    for path, (_, why) in zip(bad, DAMAGES.values(), strict=True):
        (line,) = [each for each in said if each.startswith(f"{path}: ")]
        assert why in line
        assert f"it is now bad-{path.name}" in line
        assert (path.parent / f"bad-{path.name}").is_dir()
    assert sum(f"{oldest.name} is used instead" in each for each in said) == 1
    assert torch.equal(weights(cut), weights(runs / "one"))
    assert [line for line in told(cut) if line.get("what") != "warning"] == told(runs / "one")


@pytest.mark.parametrize("name", ["flipped", "no manifest"])
def test_a_bad_path_is_refused_in_one_line_and_left_alone(runs: Path, tmp_path: Path, name: str) -> None:
    cut = copied(runs, tmp_path)
    newest, before = steps(cut)[-1], (cut / "metrics.jsonl").read_bytes()
    DAMAGES[name][0](newest)
    config = small(tmp_path, "one", run={"samples": 700, "resume": str(newest)})
    codes, said = end(start(config, tmp_path))
    assert codes == [2, 2]
    assert said.count("\n") == 1, said
    assert f"run.resume = {str(newest)!r}: {DAMAGES[name][1]}" in said
    assert newest.is_dir()
    assert (cut / "metrics.jsonl").read_bytes() == before


class Poisoned(nn.Module):
    """On rank 1 a finite loss in the 18th step, and a value that is not finite in its gradient or in a parameter."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.inner, self.calls, self.what = nn.Linear(784, 10), 0, what

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x.flatten(1))
        self.calls += self.training
        if self.training and self.calls == 18 and os.environ["RANK"] == "1":
            if self.what == "gradient":
                out.register_hook(lambda gradient: gradient * float("nan"))
            else:
                self.inner.bias.data[3] = float("inf")
        return out


def poisoned_gradient(num_classes: int, channels: int) -> nn.Module:
    return Poisoned("gradient")


def poisoned_parameter(num_classes: int, channels: int) -> nn.Module:
    return Poisoned("parameter")


@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("what", ["gradient", "parameter"])
def test_values_that_are_not_finite_never_reach_a_checkpoint(tmp_path: Path, what: str, period: int) -> None:
    policy = {"name": "constant", "batch_per_rank": 8, "sync_period_steps": period}
    table = {"task": {"model": f"test_checkpoints:poisoned_{what}"}, "run": {"samples": 640}}
    table |= {"checkpoint": {"every_samples": 16, "keep": 99}}
    config = recipes.from_dict(to_dict(settings(tmp_path, "poisoned", **table)) | {"policy": policy})
    codes, said = end(start(config, tmp_path))
    folder = tmp_path / "poisoned"
    found = steps(folder)
    states = [load_rank(path, rank) for path in found for rank in (0, 1)]
    assert all(bool(value.isfinite().all()) for state in states for value in state["model"].values())
    refused = [line for line in warnings(folder) if "inner.bias holds values that are not finite" in line]
    if what == "gradient":  # costs one step
        assert (codes, refused) == ([0, 0], []), said
        assert json.loads((folder / "summary.json").read_text())["skipped_steps"] == (2 if period == 1 else 1)
    elif period == 1:  # is in every replica by the next step
        assert codes == [1, 1], said
        assert int(found[-1].name[5:]) < 18
    else:  # is left out of the next average
        assert codes == [0, 0], said
        assert refused
        assert int(found[-1].name[5:]) == 40


# ---- what a checkpoint that cannot be written costs


def test_a_checkpoint_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    run(2, with_a_full_disk, small(tmp_path, "full"))
    folder = tmp_path / "full"
    (warning,) = warnings(folder)
    assert "the checkpoint of step 25 was not written, the one before it stays: rank 1: No space left" in warning
    assert [path.name[-4:] for path in steps(folder)] == ["0013", "0030", "0032"]
    assert not list((folder / "checkpoints").glob("*.partial"))
    assert json.loads((folder / "summary.json").read_text())["samples"] == 700


def with_a_full_disk(world: World, config: Config) -> None:
    from trainer.loop import saving

    write, calls = saving.write_tensors, []

    def limited(path: Path, *arguments: Any) -> Any:
        calls.append(path)
        if len(calls) == 2 and world.rank == 1:
            raise OSError(28, "No space left on device")
        return write(path, *arguments)

    saving.write_tensors = limited
    try:
        in_process(world, config)
    finally:
        saving.write_tensors = write


# ---- lineage


def test_going_on_from_an_older_one_moves_what_follows_aside(runs: Path, tmp_path: Path) -> None:
    cut = copied(runs, tmp_path)
    first, second, *later = steps(cut)
    faster = {"lr": 0.04}
    config = small(tmp_path, "one", run={"samples": 500, "resume": str(second)}, optim=faster)
    run(2, in_process, config)
    assert [path.name for path in steps(cut)[:2]] == [first.name, second.name]
    assert {path.name for path in later} <= {path.name for path in (cut / "abandoned.1").iterdir()}
    tail = (cut / "abandoned.1" / "metrics.jsonl").read_bytes()
    assert (runs / "one" / "metrics.jsonl").read_bytes().endswith(tail)
    (resumed,) = [line for line in lines(cut) if line.get("what") == "resumed"]
    changed = [line["message"] for line in lines(cut) if line.get("what") == "changed"]
    assert changed == ["run.samples is 500 now, and was 700", "optim.lr is 0.04 now, and was 0.02"]
    assert (cut / f"config-before-step-{resumed['local_step']}.toml").read_text().count("lr = 0.02") == 1
    assert Manifest.read(steps(cut)[-1]).run == Manifest.read(first).run
    ended = steps(cut)[-1].name
    run(2, in_process, small(tmp_path, "one", run={"samples": 700, "resume": "auto"}, optim=faster))
    assert [line["local_step"] for line in lines(cut) if line.get("what") == "resumed"][1] == int(ended[5:])


def test_a_path_in_another_run_leaves_an_old_run_of_this_name_whole(runs: Path, tmp_path: Path) -> None:
    cut = copied(runs, tmp_path)
    old = tmp_path / "two"
    old.mkdir()
    (old / "metrics.jsonl").write_text('{"kind": "event", "what": "old"}\n' * 99)
    run(2, in_process, small(tmp_path, "two", run={"samples": 700, "resume": str(steps(cut)[0])}))
    assert (tmp_path / "two.1" / "metrics.jsonl").read_text().count("old") == 99
    assert torch.equal(weights(old), weights(runs / "one"))
    assert told(old)[:-1] == told(runs / "one")[:-1]  # the records up to the checkpoint were copied; the name differs


def test_records_that_are_missing_are_a_warning_and_never_filled_up(runs: Path, tmp_path: Path) -> None:
    cut = copied(runs, tmp_path)
    os.truncate(cut / "metrics.jsonl", 1_000)  # in the middle of a line
    run(2, in_process, small(tmp_path, "one", run={"samples": 700, "resume": "auto"}))
    assert b"\0" not in (cut / "metrics.jsonl").read_bytes()
    (warning,) = warnings(cut)
    assert "records are missing" in warning
    assert torch.equal(weights(cut), weights(runs / "one"))


# ---- what changes the state's meaning


@pytest.mark.parametrize(
    ("section", "changed", "said"),
    [
        ("optim", {"name": "adamw"}, r"optim\.name = 'adamw': the checkpoint of step \d+ is of 'sgd'"),
        ("sync", {"outer": "diloco"}, r"sync\.outer = 'diloco': the checkpoint of step \d+ is of 'none'"),
        ("task", {"model": "fedavg_cnn"}, r"holds 0\.weight \[4, 1, 5, 5\] torch\.float32 where this has"),
    ],
)
def test_what_changes_the_meaning_is_refused(
    runs: Path, tmp_path: Path, section: str, changed: dict[str, Any], said: str
) -> None:
    cut = copied(runs, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()}
    config = small(tmp_path, "one", run={"samples": 700, "resume": "auto"}, **{section: changed})
    with pytest.raises(RankError, match=said):
        run(2, in_process, config)
    assert {path: path.stat().st_mtime_ns for path in cut.rglob("*") if path.is_file()} == before


# ---- one run at a time


def test_a_second_run_of_the_name_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path: Path) -> None:
    config = settings(tmp_path, "locked", run={"samples": 10**6}, checkpoint={"every_samples": 200})
    processes = start(config, tmp_path)
    folder, deadline = tmp_path / "locked", time.monotonic() + 60
    while time.monotonic() < deadline and not steps(folder):
        time.sleep(0.01)
    codes, said = end(start(config, tmp_path))
    assert codes == [2, 2]
    pid = json.loads((folder / "lock").read_text())["pid"]
    assert f"run.name = 'locked': {folder} is in use by process {pid} on " in said
    assert said.count("\n") == 1
    assert not (tmp_path / "locked.1").exists()
    for process in processes:
        process.send_signal(signal.SIGKILL)
    end(processes)
    assert (folder / "lock").exists(), "a kill leaves its text"
    done = max(lines(folder)[-2:], key=lambda line: line.get("samples", 0)).get("samples", 0)
    run(2, in_process, settings(tmp_path, "locked", run={"samples": done + 200, "resume": "auto"}))
    assert not (folder / "lock").exists()


def test_another_hosts_lock_is_held_while_it_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "WATCH_S", 0.4)
    monkeypatch.setattr(locks, "BEAT_S", 0.05)
    theirs = {"host": "elsewhere", "pid": os.getpid(), "started": "x", "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "lock").write_text(json.dumps(theirs))
    mine = RunLock(tmp_path)  # no sign of life
    assert mine.is_held
    beats = (tmp_path / "lock").stat().st_mtime_ns
    (tmp_path / "lock").write_text(json.dumps(theirs))  # as by another host, which this kernel's lock does not stop
    assert not mine.is_held
    time.sleep(0.2)
    assert (tmp_path / "lock").stat().st_mtime_ns > beats
    mine.release()  # leaves what is not its own, and beats no more
    assert json.loads((tmp_path / "lock").read_text()) == theirs


def test_a_pid_that_is_used_anew_does_not_hold_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_here(*arguments: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", none_here)
    theirs = {"host": os.uname().nodename, "pid": 1, "started": "long ago", "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / "lock").write_text(json.dumps(theirs))
    RunLock(tmp_path).release()
    (tmp_path / "lock").write_text(json.dumps(theirs | {"started": locks._started(1)}))
    with pytest.raises(ConfigError, match="is in use by process 1 on"):
        RunLock(tmp_path)
