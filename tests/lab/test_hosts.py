"""Several hosts by torchrun: network namespaces, as launch/lab/hosts.sh lays them, one torchrun and one rank a host."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_run import RECIPE, assert_same_model, records

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ROOT / "launch" / "lab" / "hosts.sh"
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    "HOSTS_PREFIX": f"ebt{os.getpid()}",
    "LAB_OWNER": str(os.getpid()),
}
# torchrun's two ways to bring hosts together. In the second it asks nothing of host 1 while it runs, so that on a host
# that is cut off it ends with its workers; in the first it waits for an answer that never comes.
C10D = "--rdzv-backend=c10d --rdzv-endpoint=host1:29400 --rdzv-id=hosts"
STATIC = "--master-addr=host1 --master-port=29400 --node-rank={rank}"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
WAIT_S = 100.0
TIMEOUT_S = 5.0
# the trainer, after a word about the place that its launcher gave it
TRAINER = """
import sys
from trainer.__main__ import main
from trainer.distributed.launcher import read_launch
print(read_launch(), flush=True)
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Work:
    """A folder with a recipe and the trainer's script."""

    folder: Path

    def command(self, name: str, *flags: str) -> tuple[str, ...]:
        """What torchrun is to start for a run of this name."""
        run = ("--run.root", str(self.folder), "--run.name", name)
        return (str(self.folder / "trainer_here.py"), "--recipe", str(self.folder / "small.toml"), *run, *flags)

    def loopback(self, name: str, *flags: str) -> Path:
        """A run of two ranks on this machine's own loopback; its directory."""
        words = (*TORCHRUN, "--standalone", "--nproc-per-node=2", *self.command(name, *flags))
        done = subprocess.run(words, cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 0, done.stderr
        return self.folder / name


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "small.toml").write_text(RECIPE)
    (folder / "trainer_here.py").write_text(TRAINER)
    return Work(folder)


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two hosts, of one test alone: it may cut their cable, and to lay another takes less than a second."""
    with two_hosts():
        yield


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Two hosts at 1 Gbit/s."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if not (shutil.which("ip") and shutil.which("tc")):
        if os.environ.get("CI") != "true":
            pytest.skip(
                "iproute2 is not installed; apt-get install iproute2 does it, and so does this test where CI=true"
            )
        install_iproute2()
    try:
        done = hosts_sh("up", "2", "1gbit")
        if done.returncode:
            pytest.skip(f"no network namespaces here: {' '.join(done.stderr.split())[-200:]}")
        yield
    finally:
        hosts_sh("down")


@pytest.mark.usefixtures("hosts")
def test_two_hosts_equal_loopback(work: Work, plain: Path) -> None:
    with torchruns(C10D, work.command("two")) as processes:
        outputs = [process.communicate(timeout=WAIT_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    places = {output.splitlines()[0] for output, _ in outputs}
    assert places == {f"Launch(rank={n}, size=2, local_rank=0, local_size=1, node={n})" for n in (0, 1)}
    assert_same_model(work.folder / "two", plain)


@pytest.mark.usefixtures("hosts")
def test_cut_cable_ends_every_process_and_leaves_a_whole_checkpoint(work: Work, plain: Path) -> None:
    run = work.folder / "cut"
    with torchruns(STATIC, work.command("cut", "--world.timeout_s", f"{TIMEOUT_S:g}")) as processes:
        await_record(run, "checkpoint")
        await_checkpoint(run)  # it is written beside training
        hosts_sh("cut", "2")
        # a round's compute before it, two interpreters' end after it, beside other tests
        ended_by = time.monotonic() + TIMEOUT_S + 25
        errors = [process.communicate(timeout=max(0.1, ended_by - time.monotonic()))[1] for process in processes]
    assert all(process.returncode for process in processes)
    for error in errors:
        assert error.count("a peer went away, or did not answer in 5 s") == 1, error
    assert {rank for rank in (0, 1) for error in errors if f" failed on rank {rank} of 2: " in error} == {0, 1}
    # what is there is enough to end as if nothing had happened
    work.loopback("cut", "--run.resume", "auto")
    assert [event["what"] for event in records(run, "event")].count("resumed") == 1
    assert_same_model(run, plain)


COUNTED = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from trainer import Constant, LocalSGD, Plan, SyncConfig
from trainer.config.config import WorldConfig
from trainer.distributed.world import open_world
def interface():
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())
def train(world, wire_format, delay_steps, period):
    model = torch.nn.Linear(1000, 1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = SyncConfig(wire_format=wire_format, delay_steps=int(delay_steps))
    with LocalSGD(model, optimizer, Constant(Plan(8, int(period))), settings=settings, world=world) as sync:
        dist.barrier()
        before, counted = interface(), sync.collectives.sent_bytes
        for _ in range(16):
            sync.optimizer.zero_grad()
            loss = sync.model(torch.randn(8, 1000)).square().mean()
            loss.backward()
            sync.optimizer.step()
            sync.step(loss, samples=8)
        sync.finish()
        dist.barrier()
        return interface() - before, sync.collectives.sent_bytes - counted
with open_world(WorldConfig(backend="gloo")) as world:
    for way in sys.argv[1:]:
        print("sent", way, *train(world, *way.split("/")), flush=True)
"""
WAYS = [("float32", "0", "4"), ("int8", "2", "4"), ("int4", "0", "2"), ("float32", "0", "1")]


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    """By way of averaging, the bytes that each host's interface sent, and those that its rank counted."""
    script = tmp_path_factory.mktemp("counted") / "counted.py"
    script.write_text(COUNTED)
    found: dict[str, list[tuple[float, float]]] = {}
    with two_hosts(), torchruns(STATIC, (str(script), *("/".join(way) for way in WAYS))) as processes:
        outputs = [process.communicate(timeout=WAIT_S) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    for output, _ in outputs:
        for line in output.splitlines():
            if line.startswith("sent "):
                _, way, sent, counted = line.split()
                found.setdefault(way, []).append((float(sent), float(counted)))
    return found


@pytest.mark.parametrize("way", WAYS)
def test_bytes_counted_are_bytes_sent(traffic: dict[str, list[tuple[float, float]]], way: tuple[str, ...]) -> None:
    assert len(traffic["/".join(way)]) == 2
    for sent, counted in traffic["/".join(way)]:
        # headers of a frame take 4.4 %, acknowledgements and the hosts' own talk a little more
        assert 1.0 <= sent / counted <= 1.12, (sent, counted)


def hosts_sh(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(HOSTS), *words], env=ENV, capture_output=True, text=True, timeout=30)


def install_iproute2() -> None:
    for words in (("update",), ("install", "--yes", "--no-install-recommends", "iproute2")):
        done = subprocess.run(("apt-get", "-qq", *words), capture_output=True, text=True, timeout=180)
        if done.returncode:
            pytest.skip(f"iproute2 cannot be installed: {' '.join(done.stderr.split())[-200:]}")


@contextlib.contextmanager
def torchruns(meeting: str, command: Sequence[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """One torchrun a host, all in one run; killed at the end if they still live."""
    processes = [
        subprocess.Popen(
            (
                *(str(HOSTS), "exec", str(rank + 1), *TORCHRUN, "--nnodes=2", "--nproc-per-node=1"),
                *(*meeting.format(rank=rank).split(), *command),
            ),
            cwd=ROOT,
            env=ENV | {"GLOO_SOCKET_IFNAME": "eth0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in (0, 1)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def await_record(run: Path, what: str) -> None:
    """Wait until the run has recorded an event, and a round after it."""
    end = time.monotonic() + WAIT_S
    while True:
        kinds = [line.get("what", line["kind"]) for line in records(run)]
        if what in kinds and "round" in kinds[kinds.index(what) :]:
            return
        assert time.monotonic() < end, f"waited {WAIT_S:g} s for {what}"
        time.sleep(0.05)


def await_checkpoint(run: Path) -> None:
    """Wait until a checkpoint is whole."""
    end = time.monotonic() + WAIT_S
    while not any((run / "checkpoints").glob("step-*[0-9]")):
        assert time.monotonic() < end, f"waited {WAIT_S:g} s for a checkpoint"
        time.sleep(0.05)
