"""The report against truth by hand: small run directories with known evaluations."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.records.reader import Eval
from trainer.report import load_run, write_report
from trainer.report.__main__ import main, table
from trainer.report.page import OWN_PICTURES, html
from trainer.report.seeds import band, lines_of
from trainer.report.speedups import Crossing, speedups, time_to_accuracy, with_distinct_labels
from trainer.report.style import SORT_HASH

SLOW = ((10.0, 0.5), (20.0, 0.7), (40.0, 0.9))
FAST = ((5.0, 0.5), (10.0, 0.7), (15.0, 0.6), (25.0, 0.9))
PLAN = {"batch_per_rank": 32, "sync_period_steps": 16, "lr_scale": 1.0}
CONFIG = '[run]\nname = "NAME"\nsamples = 8000\n\n[policy]\nname = "alternating"\n'


def run_folder(
    folder: Path,
    evals: Sequence[tuple[float, float]] = SLOW,
    *,
    finished: bool = True,
    loss: float | None = 0.5,
    **summary: Any,
) -> Path:
    """A run of 100 samples/s on 2 ranks with these (seconds, accuracy), and a phase for every evaluation."""
    folder.mkdir(parents=True)
    lines: list[Mapping[str, Any]] = []
    for number, (seconds, accuracy) in enumerate(evals):
        place = {"local_step": int(seconds), "samples": int(100 * seconds), "elapsed_s": seconds}
        times = {"compute_s": 0.7 * seconds, "sync_wait_s": 0.2 * seconds, "input_wait_s": 0.1 * seconds}
        why = {"phase_samples": 1_234 * number, "gain": None}
        lines += [
            {"kind": "phase", "number": number, "name": ("small", "large")[number % 2], "plan": PLAN, "why": why},
            {"kind": "round", "round": number + 1, "phase": number, "train_loss": loss, "wire_bytes": 10}
            | place
            | times,
            {"kind": "eval", "test_loss": 0.4, "test_accuracy": accuracy} | place,
            {"kind": "event", "what": "checkpoint", "local_step": int(seconds)},
        ]
    if finished:
        seconds = evals[-1][0]
        figures = {"name": folder.name, "policy": "alternating", "world_size": 2, "local_steps": int(seconds)}
        figures |= {"samples": int(100 * seconds), "elapsed_s": seconds, "compute_s": 0.7 * seconds}
        figures |= {"sync_wait_s": 0.2 * seconds, "input_wait_s": 0.1 * seconds, "eval_s": 3.0, "samples_per_s": 100.0}
        figures |= {"scaling_speedup": 1.75, "test_accuracy": evals[-1][1], "versions": {"torch": "2"}} | summary
        lines.append({"kind": "end"} | figures)
        (folder / "summary.json").write_text(json.dumps(figures))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.toml").write_text(CONFIG.replace("NAME", folder.name))
    return folder


def looks(*pairs: tuple[float, float | None]) -> list[Eval]:
    return [Eval(i, i, seconds, accuracy, None) for i, (seconds, accuracy) in enumerate(pairs)]


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What the command says when it refuses: one line."""
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_time_to_accuracy_is_linear_between_evaluations_of_the_best_so_far() -> None:
    evals = looks((10.0, 0.5), (20.0, 0.75), (30.0, 0.625), (35.0, None), (40.0, 1.0))
    assert time_to_accuracy(evals, 0.5) == Crossing(10.0, exact=True)
    assert time_to_accuracy(evals, 0.625) == Crossing(15.0, exact=True)
    assert time_to_accuracy(evals, 0.75) == Crossing(20.0, exact=True)
    # 0.75 still was the best at 30 s: half of the way to 1 is at 35 s
    assert time_to_accuracy(evals, 0.875) == Crossing(35.0, exact=True)
    assert time_to_accuracy(evals, 0.3) == Crossing(10.0, exact=False)
    assert time_to_accuracy(evals, 1.1) is None
    assert time_to_accuracy([], 0.1) is None


def test_speedups_at_every_accuracy_that_both_reached(tmp_path: Path) -> None:
    slow, fast = load_run(run_folder(tmp_path / "slow")), load_run(run_folder(tmp_path / "fast", FAST))
    found = {each.accuracy: each for each in speedups(slow, fast)}
    assert min(found) == 0.5
    assert max(found) == 0.9
    assert all(each.bound == "=" for each in found.values())
    assert found[0.5].ratio == pytest.approx(10 / 5)
    assert found[0.6].ratio == pytest.approx(15 / 7.5)
    assert found[0.7].ratio == pytest.approx(20 / 10)
    assert found[0.8].ratio == pytest.approx(30 / 20)  # from (15 s, best 0.7) to (25 s, 0.9)
    assert found[0.9].ratio == pytest.approx(40 / 25)
    assert {each.ratio for each in speedups(slow, slow)} == {1.0}


def test_speedups_beyond_what_was_looked_at_are_bounds(tmp_path: Path) -> None:
    slow = load_run(run_folder(tmp_path / "slow"))
    late = load_run(run_folder(tmp_path / "late", ((12.0, 0.7), (16.0, 0.75))))
    found = {each.accuracy: each for each in speedups(slow, late)}
    assert [found[accuracy].bound for accuracy in (0.5, 0.6, 0.7, 0.75)] == ["≥", "≥", "=", "="]
    assert [found[accuracy].ratio for accuracy in (0.6, 0.7, 0.75)] == pytest.approx([15 / 12, 20 / 12, 25 / 16])
    poor = load_run(run_folder(tmp_path / "poor", ((4.0, 0.3), (8.0, 0.4))))
    assert [(each.accuracy, each.ratio, each.bound) for each in speedups(slow, poor)] == [(0.4, 10 / 8, "≤")]
    assert speedups(slow, load_run(run_folder(tmp_path / "blind", ((0.0, 0.4),)))) == ()


def test_a_page_of_one_run_holds_all_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_folder(tmp_path / "a<b>&")
    assert main([str(folder)]) == 0
    told = capsys.readouterr().out
    assert "0.9000" in told
    assert "1.75" in told
    page = (folder / "report.html").read_text()
    for words in ("0.9000", "1.75", "40.0 s", "a&lt;b&gt;&amp;", "phase_samples 1,234", "checkpoint", "[policy]"):
        assert words in page
    assert "<b>&" not in page
    assert_alone(page, sorted((folder / "report").glob("*.png")), pictures=7)


def assert_alone(page: str, files: Sequence[Path], pictures: int) -> None:
    """The page asks for nothing from elsewhere, and holds the pictures that lie beside it."""
    assert not re.search(r"https?://|src=\"(?!data:)|href=|@import|url\(", page)
    held = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(held) == pictures
    assert sorted(held) == sorted(file.read_bytes() for file in files)
    assert all(png.startswith(b"\x89PNG") for png in held)


def test_a_page_of_several_runs_lies_beside_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run_folder(tmp_path / "slow"), run_folder(tmp_path / "fast", FAST, scaling_speedup=None)]
    assert main([*map(str, folders)]) == 0
    assert "fast: 2.00 at 0.5, " in (told := capsys.readouterr().out)
    assert "1.60 at 0.9\n" in told
    page = (tmp_path / "report" / "report.html").read_text()
    assert "1.60 at 0.9000" in page
    assert "Not measured: fast" in page
    assert_alone(page, sorted((tmp_path / "report").glob("*.png")), pictures=9)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / parent / "a") for parent in ("x", "y")]
    runs = with_distinct_labels([load_run(folder) for folder in (*folders, folders[0])])
    assert [run.label for run in runs] == ["x/a (1)", "y/a", "x/a (2)"]


def test_phases_begin_where_the_records_before_them_end(tmp_path: Path) -> None:
    phases = load_run(run_folder(tmp_path / "a")).phases
    assert [(each.name, each.begin_samples, each.end_samples) for each in phases] == [
        ("small", 0, 1_000),
        ("large", 1_000, 2_000),
        ("small", 2_000, 4_000),
    ]


def test_an_unfinished_run_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    run = load_run(run_folder(tmp_path / "a", finished=False))
    assert not run.finished
    assert run.state() == "unfinished, 4,000 of 8,000"
    expected = {"samples": 4_000, "local_steps": 40, "elapsed_s": 40.0, "sync_wait_s": 8.0, "samples_per_s": 100.0}
    assert expected.items() <= run.figures.items()
    assert run.number("best_test_accuracy") == 0.9
    assert "unfinished, 4,000 of 8,000 samples" in html([run], [], [None])


def test_a_run_that_went_on_past_its_end_is_unfinished(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", finished=False)
    (folder / "summary.json").write_text(json.dumps({"local_steps": 20, "samples": 2_000}))
    assert load_run(folder).number("samples") == 4_000
    assert not load_run(folder).finished


@pytest.mark.parametrize("text", ["", '{"kind": "phase", "number": 0, "name": "small", "plan": {}, "why": {}}\n'])
def test_a_run_that_has_only_begun_is_reported(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text)
    assert main([str(tmp_path), "--out", str(tmp_path / "else where")]) == 0
    assert "No round and no evaluation" in (tmp_path / "else where" / "report.html").read_text()
    assert not (tmp_path / "report.html").exists()


def test_null_figures_are_dashes(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", loss=None, scaling_speedup=None, wire_bytes=None, versions=None)
    page = write_report([load_run(folder)]).read_text()
    assert "<b>—</b><span>scaling speedup</span>" in page
    names = {file.stem for file in (folder / "report").iterdir()}
    assert names == {"accuracy_seconds", "accuracy_samples", "accuracy_local_steps", "phases_a", "time"}


def test_runs_with_no_accuracy_in_common_say_so(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", finished=False)]
    records = folders[1] / "metrics.jsonl"
    records.write_text("".join(line for line in records.read_text().splitlines(True) if '"eval"' not in line))
    runs = [load_run(folder) for folder in folders]
    assert "b: none was reached by both" in table(runs)
    assert "No accuracy was reached by both a and another run" in html(runs, [], [None, None])


def test_a_half_written_last_line_is_ignored(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", finished=False)
    whole = load_run(folder)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "eval", "elapsed_s": 41.0, "te\xc3')
    assert load_run(folder) == whole


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"kind": "eval", "sam', "is not JSON"),
        ("[1, 2]", "is not a record"),
        ('{"kind": "eval", "local_step": 1, "samples": 10}', "elapsed_s = None"),
        ('{"kind": "eval", "local_step": 1, "samples": 10, "elapsed_s": "9"}', "elapsed_s = '9'"),
    ],
)
def test_a_corrupt_line_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, said: str) -> None:
    records = run_folder(tmp_path / "a") / "metrics.jsonl"
    lines = records.read_text().splitlines()
    records.write_text("\n".join([*lines[:2], line, *lines[2:]]))
    told = refusal(capsys, str(tmp_path / "a"))
    assert f"{records} line 3" in told
    assert said in told
    assert "mend or delete that line" in told


def test_what_is_not_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "name a run's directory" in refusal(capsys, str(tmp_path))
    assert str(tmp_path / "none") in refusal(capsys, str(tmp_path / "none"))
    folder = run_folder(tmp_path / "a")
    assert "--out" in refusal(capsys, str(folder), "--out", str(folder / "metrics.jsonl"))
    (folder / "summary.json").write_text("{")
    assert "summary.json: cannot be read" in refusal(capsys, str(folder))
    assert "command line" in refusal(capsys)
    with pytest.raises(ConfigError, match="one run's directory or more"):
        write_report([])


def seeded(root: Path, way: str, seed: int, last: float) -> Path:
    """A run of one way of training and one seed, which ends at this accuracy."""
    folder = run_folder(root / f"{way}-{seed}", (*SLOW[:2], (40.0, last)), scaling_speedup=1.5 + (way == "b"))
    own = f'[run]\nname = "{way}-{seed}"\nseed = {seed}\nsamples = 8000\n\n[policy]\nname = "{way}"\n'
    (folder / "config.toml").write_text(own)
    return folder


def test_runs_that_differ_in_their_seed_are_one_line_with_its_spread(tmp_path: Path) -> None:
    folders = [seeded(tmp_path, way, seed, 0.9 + 0.01 * seed) for way in ("a", "b") for seed in (0, 1, 2)]
    runs = [load_run(folder) for folder in (*folders, seeded(tmp_path / "again", "a", 0, 0.5))]
    lines = lines_of(with_distinct_labels(runs))
    assert [line.label for line in lines] == ["a (3 seeds)", "b (3 seeds)", "again/a-0"], "a seed twice is another run"
    assert lines[0].mean("test_accuracy") == pytest.approx(0.91)
    assert lines[0].spread("test_accuracy") == pytest.approx(0.01)
    page = html(runs[:6], [], [None] * 6)
    assert page.count("0.9100 ± 0.0100") == 2
    assert page.count("★</b>") == 1, "of the speedup; the rest is equal"
    assert re.search(r'<b class="best">2\.50 ± 0\.00 ★</b>', page)
    assert f"script-src '{SORT_HASH}'" in page
    at, mean, spread = band([[(e.elapsed_s, e.accuracy) for e in run.evals] for run in runs[:3]])
    assert (at[0], at[-1], mean[-1], spread[0]) == pytest.approx((10.0, 40.0, 0.91, 0.0))
    assert spread[-1] == pytest.approx(0.01)


def test_many_runs_are_compared_and_few_are_drawn_one_by_one(tmp_path: Path) -> None:
    folders = [seeded(tmp_path, f"way{way}", seed, 0.9) for way in range(8) for seed in (0, 1)]
    page = write_report([load_run(folder) for folder in folders]).read_text()
    assert page.count("Drawn by a report of its own: python -m trainer.report") == 16 - OWN_PICTURES
    assert len(list((tmp_path / "report").glob("phases_*.png"))) == OWN_PICTURES
