"""The throughput suite without ranks: its cases, its records, the cost model, curves, comparisons and refusals."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.intervals import paired_ratio, ratio
from benchmarks.throughput import cost, report
from benchmarks.throughput.records import Run, is_done, keep_links, keep_run, load, path_of, refuse_other_task
from benchmarks.throughput.scaling import curves
from benchmarks.throughput.suite import Case, Suite, Task
from trainer.cli import guarded
from trainer.errors import ConfigError

START_S, SAMPLE_S, LATENCY_S, BYTES_PER_S = 0.01, 0.0005, 0.001, 1e8
PARAMETERS = 1_000_000


def step_s(batch: int) -> float:
    return START_S + SAMPLE_S * batch


def figures(case: Case, slow: float = 1.0) -> dict[str, Any]:
    """What a machine of these costs would give, `slow` times as slow."""
    wait = LATENCY_S + 4 * PARAMETERS / BYTES_PER_S if case.world_size > 1 else 0.0
    compute = step_s(case.batch_per_rank) * slow
    took = compute + wait / case.sync_period_steps
    shares = {"compute": compute / took, "sync_wait": 1 - compute / took, "input_wait": 0.0}
    return {
        "samples_per_s": case.batch_per_rank * case.world_size / took,
        "step_s": took,
        "compute_step_s": compute,
        "shares": shares,
        "peak_memory_bytes": 10**9,
        "sent_bytes_per_step": 0.0,
        "local_steps": 16,
        "elapsed_s": 1.0,
        "parameters": PARAMETERS,
    }


def folder_of(
    folder: Path,
    task: Task | None = None,
    slow: float = 1.0,
    models: tuple[str, ...] = ("cnn",),
    batches: tuple[int, ...] = (16, 32, 64),
) -> Path:
    """Measurements of worlds of 1, 2 and 4 ranks, two repeats a percent apart."""
    suite = Suite(models=models, batches=batches, periods=(1, 8), repeats=2)
    for case in suite.cases(4):
        for repeat in range(2):
            found = figures(case, slow * (1 + 0.01 * repeat))
            keep_run(folder, task or suite.task, Run(case, repeat, found, {"commit": "abc", "torch": "2"}))
    points = [(float(size), LATENCY_S + size / BYTES_PER_S) for size in (10**3, 10**5, 10**7)]
    keep_links(folder, 4, {"node": {"ranks": 2, "points": points}})
    return folder


def refusal(work: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says when it refuses: one line."""
    assert guarded("bench", work) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    return said


def test_cases_are_each_measured_once() -> None:
    suite = Suite(("a",), (32,), (64,), (1, 16), ("float32", "int4"))
    assert suite.worlds(6) == (1, 2, 4, 6)
    assert suite.worlds(1) == (1,)
    told = [(c.world_size, c.batch_per_rank, c.sync_period_steps, c.wire_format) for c in suite.cases(2)]
    assert told == [
        *((1, batch, 16, "float32") for batch in (32, 64)),  # one rank alone sends nothing
        *((2, 32, *way) for way in ((1, "float32"), (16, "float32"), (16, "int4"))),  # 64 / 2 is 32 too
    ]


def test_what_cannot_be_measured_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(lambda: Suite(world_sizes=(1, 8)).cases(2), capsys)
    assert "world_sizes = 8: the launcher gave 2 ranks; start 8 (torchrun --nproc-per-node" in said
    assert "global_batches = 10: must be a multiple" in refusal(lambda: Suite(global_batches=(10,)).cases(4), capsys)
    assert "precision = 'int8': choose one of" in refusal(lambda: Suite(precision="int8"), capsys)  # type: ignore[arg-type]


def test_the_cost_model_is_found_again_and_promises_what_was_measured(tmp_path: Path) -> None:
    measured = load(folder_of(tmp_path))
    model = cost.fit(measured)
    compute, link = model.compute["cnn"], model.links["node"]
    assert compute.start_s == pytest.approx(START_S, rel=0.02)
    assert compute.per_sample_s == pytest.approx(SAMPLE_S, rel=0.02)
    assert compute.batches == (16, 32, 64)
    assert compute.error < 0.01
    assert (link.latency_s, link.bytes_per_s) == pytest.approx((LATENCY_S, BYTES_PER_S), rel=1e-6)
    promised = model.samples_per_s("cnn", 32, 8, "float32", 2)
    assert promised == pytest.approx(figures(Case("cnn", 32, 8, "float32", 2))["samples_per_s"], rel=0.02)
    assert model.samples_per_s("another", 32, 8, "float32", 2) is None
    path = tmp_path / "cost.json"
    model.save(path)
    assert cost.CostModel.load(path) == model


def test_a_line_through_one_batch_promises_nothing_of_others() -> None:
    assert cost.line([(32.0, 1.0), (32.0, 1.2)])[0] == 0
    start, slope, _ = cost.line([(1.0, 1.0), (2.0, 0.5)])  # larger and sooner: noise
    assert start > 0
    assert slope == 0


def test_a_cost_file_of_another_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "a")
    cost.fit(load(folder)).save(folder / "cost.json")
    table = json.loads((folder / "cost.json").read_text())
    (folder / "cost.json").write_text(json.dumps(table | {"format": 7}))
    said = refusal(lambda: compare.main([str(folder), str(folder)]), capsys)
    assert "cost.json: is a ebbtide cost model of format 7, and this version reads format 1; make it anew with" in said
    (folder / "cost.json").write_text("[]")
    assert "is no cost model" in refusal(lambda: compare.main([str(folder), str(folder)]), capsys)


def test_scaling_is_weak_at_equal_batches_and_strong_at_equal_sums(tmp_path: Path) -> None:
    measured = load(folder_of(tmp_path))
    weak = {curve.label: curve for curve in curves(measured, "weak")}
    assert [point.ranks for point in weak["batch 32 a rank, period 8, float32"].points] == [1, 2, 4]
    assert weak["batch 32 a rank, period 8, float32"].points[0].efficiency == 1
    assert weak["batch 32 a rank, period 1, float32"].points[2].efficiency < 0.5
    strong = {curve.label: curve for curve in curves(measured, "strong")}
    points = strong["batch 64 in all, period 8, float32"].points
    assert [point.ranks for point in points] == [1, 2, 4]
    assert points[2].samples_per_s < 4 * points[0].samples_per_s


def test_the_report_is_one_page_with_pictures_beside_it(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, models=("cnn", "mine.nets:net"), batches=(16, 32))
    failed = Case("cnn", 512, 8, "float32", 4)
    keep_run(folder, Suite().task, Run(failed, 0, {"error": "does not fit in memory"}, {}))
    page = report.write_report(folder).read_text()
    assert not re.search(r"https?://|src=\"(?!data:)|href=|@import|url\(", page)
    for words in ("Weak scaling", "Strong scaling", "Cost model", "mine.nets:net", "does not fit in memory", "1 GB"):
        assert words in page
    assert page.count("<img") == len(list((folder / "pictures").glob("*.png"))) == 6
    assert cost.CostModel.load(folder / "cost.json").compute.keys() == {"cnn", "mine.nets:net"}


def test_a_folder_goes_on_with_its_own_task_and_tries_again_what_failed(tmp_path: Path) -> None:
    folder, case = folder_of(tmp_path), Case("cnn", 16, 8, "float32", 2)
    assert is_done(folder, case, 0)
    keep_run(folder, Suite().task, Run(case, 0, {"error": "does not fit in memory"}, {}))
    assert not is_done(folder, case, 0)
    refuse_other_task(folder, Suite().task)
    with pytest.raises(ConfigError, match=r"image_size 32 against 28.*name another folder"):
        refuse_other_task(folder, Suite(image_size=28).task)


def test_what_is_no_record_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no measurements; run torchrun"):
        load(tmp_path)
    folder = folder_of(tmp_path / "a")
    path = path_of(folder, Case("cnn", 16, 8, "float32", 2), 0)
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"format": 0}))
    with pytest.raises(ConfigError, match="is of format 0, and this version reads 1"):
        load(folder)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is no record"):
        load(folder)


def test_two_machines_are_compared_case_by_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder_of(tmp_path / "a"), folder_of(tmp_path / "b", slow=1.5)
    assert compare.main([str(a), str(b)]) == 0
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("cnn, ")]
    assert len(rows) == 3 + 2 * 3 * 2
    assert all(row.endswith("faster") for row in rows if ", 1 rank" in row)
    assert "a step of cnn: 10.0" in said
    assert compare.main([str(a), str(a)]) == 0
    assert "faster" not in capsys.readouterr().out


def test_different_tasks_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = folder_of(tmp_path / "a"), folder_of(tmp_path / "b", Suite(precision="bf16").task)
    said = refusal(lambda: compare.main([str(a), str(b)]), capsys)
    assert "measured another task than" in said
    assert "(precision bf16 against fp32); measure both with the same flags" in said
    other = folder_of(tmp_path / "c", models=("another",))
    assert "has no case in common" in refusal(lambda: compare.main([str(a), str(other)]), capsys)
    assert "write A B" in refusal(lambda: compare.main([str(a)]), capsys)


def test_intervals_are_students_and_welchs() -> None:
    found = ratio([110.0, 110.0 * math.e**0.02], [100.0, 100.0 * math.e**0.02])
    assert found.value == pytest.approx(1.1)
    half = 4.303 * math.sqrt(2 * 0.0002 / 2)  # two degrees of freedom, variance 0.0002 each
    assert math.log(found.high / found.value) == pytest.approx(half, rel=1e-3)
    assert found.verdict() == "faster"
    assert ratio([1.0], [2.0]).verdict() == "not known"
    pairs = paired_ratio([90.0, 45.0, 181.0], [100.0, 50.0, 200.0])
    assert pairs.value == pytest.approx(0.9017, rel=1e-3)
    assert pairs.verdict(0.03) == "slower"
    assert paired_ratio([90.0, 50.0], [100.0, 45.0]).verdict(0.03) == "no difference shown"
