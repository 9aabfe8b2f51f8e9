"""Leaves the consensus weights and the page at a run's end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from trainer.data.reading import one_line
from trainer.log import LOG
from trainer.loop.job import Job
from trainer.loop.tensor_file import KINDS, write_tensors
from trainer.records.writer import append_event


def draw_report(job: Job) -> None:
    """Write report.html into the run's folder; a page that cannot be drawn is a warning among the run's events."""
    try:
        from trainer.report import load_run, write_report  # imports matplotlib, which training does not need

        LOG.debug("page: %s", write_report([load_run(job.folder)]))
    except Exception as error:
        append_event(job.folder, "warning", message=f"no report.html: {type(error).__name__}: {error}")


def export_weights(model: nn.Module, folder: Path) -> Iterator[str]:
    """Write model.pt and model.safetensors, each whole or not at all; a line for each that cannot be written."""
    state = model.state_dict()
    tensors = {n: each.detach().cpu() for n, each in state.items() if torch.is_tensor(each) and each.dtype in KINDS}
    writers: dict[str, Callable[[Path], object]] = {
        "model.pt": lambda path: torch.save(state, path),
        "model.safetensors": lambda path: write_tensors(path, tensors, {"format": "pt"}),
    }
    for name, write in writers.items():
        partial = folder / f"{name}.partial"
        try:
            write(partial)
            partial.replace(folder / name)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter where a disk is full
            partial.unlink(missing_ok=True)
            yield f"no {name}: {one_line(error)}"
