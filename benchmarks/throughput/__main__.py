"""Samples/s by model, batch, period, wire format and world size, with waits, memory, scaling and a cost model.

    torchrun --nproc-per-node=2 -m benchmarks.throughput --out FOLDER [--quick] [--models resnet18 my.module:model] ...

On any number of ranks, with NCCL where CUDA is, else Gloo. Every case is a record of its own in FOLDER/runs; what is
there is not measured again, so a suite that was broken off goes on. At the end FOLDER has `report.html`, pictures, and
`cost.json`. A case that does not fit in memory is recorded as such, the rest goes on, and the command ends with 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import tyro

from benchmarks.provenance import provenance
from benchmarks.throughput.links import measure_links
from benchmarks.throughput.measure import measure, task_of
from benchmarks.throughput.records import Run, has_links, is_done, keep_links, keep_run, refuse_other_task
from benchmarks.throughput.suite import Case, Suite
from trainer.cli import guarded
from trainer.config.config import WorldConfig
from trainer.distributed.board import Board
from trainer.distributed.collectives import Collectives
from trainer.distributed.launcher import read_launch
from trainer.distributed.world import World, open_world
from trainer.errors import ConfigError
from trainer.tasks import check_model

TIMEOUT_S = 1_800.0
"""Seconds that ranks of a smaller world's turn are waited for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case that is not there, print a row each, and write the report."""
    suite = tyro.cli(Suite, args=argv, prog="python -m benchmarks.throughput", description=__doc__).settled()
    for model in suite.models:
        check_model(task_of(suite, model))
    cases = suite.cases(read_launch().size)
    if read_launch().rank == 0:
        refuse_other_task(Path(suite.out), suite.task)
    with open_world(WorldConfig(timeout_s=TIMEOUT_S)) as world:
        failed = _measure_all(suite, cases, world)
        if world.rank == 0 and suite.report:
            from benchmarks.throughput.report import write_report  # what is measured does not depend on what draws it

            print(f"report: {write_report(Path(suite.out))}", flush=True)
    if failed:
        case, error = failed[0]
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise ConfigError(
            f"models = {case.model!r}: {error} with {case.batch_per_rank} samples a rank on {case.ranks}{more}; "
            "choose smaller batches, a lower precision, or another device"
        )
    return 0


def _measure_all(suite: Suite, cases: Sequence[Case], world: World) -> list[tuple[Case, str]]:
    """Every case in every repeat, in turns; which could not be measured, and why."""
    folder, failed = Path(suite.out), {}
    everyone = Collectives(world, None, 2**20)
    worlds = _worlds(suite, world)
    # rank 0 alone knows what is done: nodes may not share the folder
    todo = [(r, case) for r in range(suite.repeats) for case in cases if not is_done(folder, case, r)]
    links = [size for size in worlds if suite.links and size > 1 and not has_links(folder, size)][-1:]
    todo, links = everyone.gather_objects((todo, links))[0]
    for size in links:
        found = None if worlds[size] is None else measure_links(worlds[size])
        if world.rank == 0 and found is not None:
            keep_links(folder, size, found)
        everyone.sum_numbers([1.0])  # the others wait here
    for repeat, case in todo:
        mine = worlds[case.world_size]
        # a board a case, which every rank opens: that one loop has ended is no reason to leave the next
        board = Board.open(world.rank, case.world_size) if world.size > 1 else Board()
        if mine is not None and case not in failed:
            figures = measure(suite, case, replace(mine, board=board if mine.size > 1 else Board()))
            if world.rank == 0:
                keep_run(folder, suite.task, Run(case, repeat, figures, provenance()))
                print(row(case, figures), flush=True)
            if "error" in figures:
                failed[case] = figures["error"]
        everyone.sum_numbers([1.0])
    told: dict[Case, str] = everyone.gather_objects(failed)[0]
    return list(told.items())


def _worlds(suite: Suite, world: World) -> dict[int, Any]:
    """This rank's world by world size; None where it is not in it. A smaller world has the first ranks."""
    found: dict[int, Any] = {}
    for size in suite.worlds(world.size):
        if size == world.size:
            found[size] = world
        elif size == 1:
            found[size] = World(device=world.device) if world.rank == 0 else None
        else:
            group = dist.new_group(list(range(size)))
            inside = world.rank < size
            found[size] = replace(World.current(world.device, group), timeout_s=TIMEOUT_S) if inside else None
    return found


def row(case: Case, figures: dict[str, Any]) -> str:
    """A run as people read it."""
    head = (
        f"{case.model:<14} batch {case.batch_per_rank:>5}  period {case.sync_period_steps:>4}  "
        f"{case.wire_format:<7}  {case.world_size:>3} rank{'s' if case.world_size > 1 else ' '}"
    )
    if "error" in figures:
        return f"{head}  {figures['error']}"
    shares = figures["shares"]
    return (
        f"{head}  {figures['samples_per_s']:>10,.0f} samples/s  compute {shares['compute']:>6.1%}  "
        f"network {shares['sync_wait']:>6.1%}  input {shares['input_wait']:>6.1%}  "
        f"{figures['peak_memory_bytes'] / 1e6:>7,.0f} MB"
    )


if __name__ == "__main__":
    sys.exit(guarded("benchmarks.throughput", main))
