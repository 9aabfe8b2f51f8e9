"""What the page says of a run, of one recorded now and of one that recorded less."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.records.reader import load_run
from trainer.report import text, write_report
from trainer.report.page import html

PLACE = {"local_step": 10, "samples": 1_000, "elapsed_s": 5.0}
FACTS = {
    "data": "cifar10",
    "data_samples": 50_000,
    "model": "resnet18",
    "parameters": 11_173_962,
    "world_size": 2,
    "device": "cpu, 1 thread a rank",
    "versions": {"ebbtide": "0.1.0", "torch": "2.14"},
    "started_at": "2026-11-28T14:31:55+01:00",
}
PLAN = {"batch_per_rank": 32, "sync_period_steps": 4, "lr_scale": 1.0}


def write_run(folder: Path, *, facts: bool, ended: bool) -> Path:
    """A run of one round and one evaluation."""
    folder.mkdir()
    lines: list[dict[str, Any]] = [{"kind": "event", "what": "started"} | FACTS] if facts else []
    lines += [
        {"kind": "phase", "number": 0, "name": "small", "plan": PLAN, "why": {}},
        {"kind": "round", "round": 1, "train_loss": 0.5} | PLACE,
        {"kind": "eval", "test_loss": 0.4, "test_accuracy": 0.9} | PLACE,
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = '[run]\nsamples = 1_000\n[data]\nname = "cifar10"\n[task]\nmodel = "resnet18"\n'
    (folder / "config.toml").write_text(config)
    if ended:
        summary = {"name": folder.name, "policy": "constant", "test_accuracy": 0.9, "scaling_speedup": 1.5}
        summary |= {"local_steps": 10, "samples": 1_000, "elapsed_s": 5.0, "wall_s": 3_725.0} | (FACTS if facts else {})
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.mark.parametrize("ended", [True, False])
def test_the_page_says_what_was_trained_with_what_and_when(tmp_path: Path, ended: bool) -> None:
    run = load_run(write_run(tmp_path / "a", facts=True, ended=ended))
    told = dict(text.about(run))
    assert told["trained"] == "cifar10 (50,000 samples), resnet18 (11,173,962 parameters)"
    assert told["on"] == "2 ranks, cpu, 1 thread a rank, ebbtide 0.1.0, torch 2.14"
    assert told["started"] == "2026-11-28 13:31 UTC" + (", 1 h 2 min 5 s in all" if ended else "")
    page = html([run], [], [None])
    for words in told.values():
        assert words in page
    assert page.index("Phases of") < page.index("All figures")
    assert 'name="viewport" content="width=device-width' in page


def test_a_run_that_recorded_less_is_told_as_far_as_it_goes(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / name, facts=name == "new", ended=True)) for name in ("old", "new")]
    assert dict(text.about(runs[0]))["trained"] == "cifar10, resnet18"
    page = write_report(runs, tmp_path / "both").read_text()
    assert "cifar10 (50,000 samples)" in page
    assert page.count("Phases of") == 2 + 2  # a heading and a picture's title each


def test_every_wide_thing_scrolls_in_its_own_box(tmp_path: Path) -> None:
    page = html([load_run(write_run(tmp_path / "a", facts=True, ended=True))], [], [None])
    tables = re.findall(r"(<div class=\"scroll [a-z]+\">)?<table>", page)
    assert tables
    assert all(tables)
    assert re.search(r"\.scroll \{ overflow: auto;[^}]*max-width: 100%", page)
    assert re.search(r"pre \{[^}]*overflow: auto", page)
    assert re.search(r"figure img \{[^}]*width: 100%", page)


def test_the_library_logs_under_its_name_and_is_silent_until_asked() -> None:
    code = "from trainer.log import LOG; LOG.warning('a'); LOG.debug('b')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_folder_that_is_moved_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from trainer.loop.lineage import Prepared, begin_afresh
    from trainer.loop.lock import RunLock

    folder = write_run(tmp_path / "a", facts=False, ended=False)
    with caplog.at_level(logging.DEBUG, logger="ebbtide"):
        lock = RunLock(folder)
        assert begin_afresh(folder, lock) == Prepared(aside=tmp_path / "a.1")
        assert begin_afresh(folder, lock) == Prepared()
        lock.release()
    assert [record.getMessage() for record in caplog.records] == [f"{folder} was moved to {tmp_path / 'a.1'}"]
