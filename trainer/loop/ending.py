"""Draws a run's page at its end."""

from __future__ import annotations

from trainer.log import LOG
from trainer.loop.job import Job
from trainer.records.writer import append_event


def draw_report(job: Job) -> None:
    """Write report.html into the run's folder; a page that cannot be drawn is a warning among the run's events."""
    try:
        from trainer.report import load_run, write_report  # imports matplotlib, which training does not need

        LOG.debug("page: %s", write_report([load_run(job.folder)]))
    except Exception as error:
        append_event(job.folder, "warning", message=f"no report.html: {type(error).__name__}: {error}")
