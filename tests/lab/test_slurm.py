"""launch/slurm on a real Slurm: slurmctld and two slurmd on this machine, as launch/lab/slurm.sh starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_run import assert_same_model, records

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "launch" / "lab" / "slurm.sh"
WAIT_S = 120.0

Env = dict[str, str]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Env]:
    """The environment of a shell that uses a cluster of two nodes, one core each."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm of one's own needs root")
    installed = all(shutil.which(name) for name in ("munged", "slurmctld", "slurmd", "sbatch"))
    if not installed and os.environ.get("CI") != "true":
        pytest.skip("Slurm is not installed; launch/lab/slurm.sh install does it, and so does this test where CI=true")
    folder = tempfile.mkdtemp(prefix="ebbtide-slurm-")  # not pytest's: munged wants a socket that others can reach
    env = plain_env() | {"SLURM_LAB": folder, "LAB_OWNER": str(os.getpid())}
    try:
        if not installed:
            install(env)
        done = command(CLUSTER, "start", "2", "1", env=env)
        assert done.returncode == 0, done.stderr
        yield env | {"SLURM_CONF": f"{folder}/slurm.conf", "EBBTIDE_VENV": str(Path(sys.executable).parents[1])}
    finally:
        command(CLUSTER, "stop", env=env)
        shutil.rmtree(folder, ignore_errors=True)


def test_job_on_two_nodes_equals_plain_torchrun(slurm: Env, recipe: Path, plain: Path, tmp_path: Path) -> None:
    job = submit(slurm, recipe, tmp_path)
    await_end(slurm, job, tmp_path)
    run = tmp_path / f"small-{job}"
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    assert_same_model(run, plain)


def test_signalled_job_requeues_itself_and_resumes_exactly(
    slurm: Env, recipe: Path, plain: Path, tmp_path: Path
) -> None:
    job = submit(slurm, recipe, tmp_path)
    run = tmp_path / f"small-{job}"
    wait_until(lambda: bool(records(run, "phase")[1:]), "the second phase")
    command("scancel", "--batch", "--signal=USR1", job, env=slurm)
    wait_until(lambda: any(event["what"] == "stopped" for event in records(run, "event")), "the stop")
    await_end(slurm, job, tmp_path)
    told = (tmp_path / f"{job}.out").read_text()
    assert f"start 2 of job {job}" in told
    assert f"start 3 of job {job}" not in told
    (resumed,) = [event for event in records(run, "event") if event["what"] == "resumed"]
    assert 0 < resumed["local_step"] < json.loads((run / "summary.json").read_text())["local_steps"]
    assert_same_model(run, plain)


def test_an_elastic_job_goes_on_without_a_rank_that_is_killed(slurm: Env, recipe: Path, tmp_path: Path) -> None:
    script = ("launch/slurm/elastic.sbatch", recipe, "--run.root", tmp_path, "--run.samples", "12000")
    done = command("sbatch", "--parsable", "--nodes=2", f"--output={tmp_path}/%j.out", *script, env=slurm)
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    run = tmp_path / f"small-{job}"
    wait_until(lambda: bool(records(run, "round")[2:]), "the third round")
    os.kill(json.loads((run / "lock").read_text())["pid"], signal.SIGKILL)
    await_end(slurm, job, tmp_path)
    (change,) = [event for event in records(run, "event") if event["what"] == "regrouped"]
    assert change["ranks"] == 1
    assert json.loads((run / "summary.json").read_text())["samples"] >= 12_000


def test_array_over_world_sizes_ends_in_one_report(slurm: Env, tmp_path: Path) -> None:
    script = ("launch/slurm/scaling.sbatch", "--out", tmp_path / "scaling", "--models", "fedavg_cnn", "--batches", "8")
    short = ("--periods", "4", "--image-size", "28", "--repeats", "1", "--seconds", "0.3")
    array = ("--array=1,2", "--nodes=2", f"--output={tmp_path}/%A.out", "--open-mode=append")
    done = command("sbatch", "--parsable", *array, *script, *short, env=slurm)
    assert done.returncode == 0, done.stderr
    await_end(slurm, done.stdout.strip(), tmp_path)
    runs = [json.loads(path.read_text()) for path in sorted((tmp_path / "scaling" / "runs").glob("*.json"))]
    assert sorted(run["case"]["world_size"] for run in runs) == [1, 2]
    page = (tmp_path / "scaling" / "report.html").read_text()
    assert "Weak scaling" in page
    assert json.loads((tmp_path / "scaling" / "cost.json").read_text())["links"]["network"]["ranks"] == 2


def test_head_without_address_is_refused(tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$2" != hostnames ] || echo node7\n')
    scontrol.chmod(0o755)
    env = plain_env() | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]"}
    script = "set -euo pipefail; . launch/slurm/common.sh; find_head; echo went on with $HEAD"
    done = command("bash", "-c", script, env=env)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["ebbtide: Slurm knows no address of node7 (scontrol show node has no NodeAddr)"]


def plain_env() -> Env:
    """This process's environment without what a surrounding job or launcher may have put there."""
    foreign = ("SLURM", "SBATCH", "SRUN", "TORCHELASTIC", "DEVICES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"OMP_NUM_THREADS": "1"}


def command(*words: str | Path, env: Env, timeout_s: float = WAIT_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, words)), cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s)


def install(env: Env) -> None:
    try:
        done = command(CLUSTER, "install", env=env, timeout_s=180)
    except subprocess.TimeoutExpired as late:
        pytest.skip(f"Slurm cannot be installed: not done after {late.timeout:g} s")
    if done.returncode:
        pytest.skip(f"Slurm cannot be installed: {' '.join(done.stderr.split())[-200:]}")


def submit(env: Env, recipe: Path, folder: Path) -> str:
    """Submit a job of two nodes; the job's id."""
    script = ("launch/slurm/train.sbatch", recipe, "--run.root", folder, "--world.timeout_s", "30")
    done = command("sbatch", "--parsable", "--nodes=2", f"--output={folder}/%j.out", *script, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def await_end(env: Env, job: str, folder: Path) -> None:
    """Wait until the job is done for good; `sbatch --wait` would look ever more rarely."""

    def state() -> str:
        return command("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}", env=env).stdout.strip()

    under_way = {"PENDING", "RUNNING", "COMPLETING", ""}
    wait_until(lambda: not under_way & set(state().split("\n")), f"the end of job {job}")
    assert set(state().split("\n")) == {"COMPLETED"}, (folder / f"{job}.out").read_text()  # of an array each task's


def wait_until(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < end, f"waited {WAIT_S:g} s for {what}"
        time.sleep(0.1)
