"""From run directories to a report: accuracy against speedup as pictures and one HTML page.

runs = [load_run("runs/a"), load_run("runs/b")]
page = write_report(runs)
"""

from trainer.records.reader import load_run
from trainer.report.page import write_report

__all__ = ["load_run", "write_report"]
