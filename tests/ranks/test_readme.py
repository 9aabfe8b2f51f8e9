"""The README's script runs as it stands: alone, and under torchrun on two ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import Command

ROOT = next(folder for folder in Path(__file__).parents if (folder / "setup.cfg").is_file())
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_script_trains_one_model_on_all_ranks(ranks: int, tmp_path: Path) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "mine.py").write_text(script)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if ranks == 1:
        process = Command("mine.py", [], env, tmp_path)
        out, err = process.communicate(timeout=120)
        code = process.returncode
    else:
        command = [sys.executable, *TORCHRUN, "mine.py"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)
        code, out, err = done.returncode, done.stdout, done.stderr
    assert code == 0, err
    told = re.fullmatch(r"accuracy (0\.\d+), (\d+) samples on (\d) ranks\n", out)
    assert told is not None, out
    assert float(told[1]) > 0.9
    assert int(told[2]) >= 10_000
    assert int(told[3]) == ranks


def test_the_results_are_those_of_the_tables_it_names() -> None:
    text = (ROOT / "README.md").read_text()
    named = [ROOT / link for link in re.findall(r"\]\((benchmarks/results/[^)]+\.md)\)", text)]
    tables = "\n".join(table.read_text() for table in named)
    for row in re.findall(r"^\| (?:Ebb|no comm|accel|DDP).*$", text, flags=re.MULTILINE):
        *_, seconds, accuracy, _ = (cell.strip() for cell in row.split("|"))
        assert seconds == "1,039" or f"| {seconds} |" in tables  # 1,856 steps as long as the 40 that were timed
        assert f"| {accuracy} |" in tables
