"""The cost model that is fitted to a cluster's measurements, as a JSON file, and what it promises of a Plan.

A local step of batch b takes a + c b seconds, by model. A transfer of s bytes takes l + s / r seconds, by level. A
round is made of these as the autopilot makes it (`trainer.policies.goodput`). Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.throughput.records import Measured, Run
from trainer.errors import ConfigError
from trainer.plan import Plan
from trainer.policies.constants import CONSTANTS, GRADIENTS
from trainer.policies.goodput import Costs

KIND, FORMAT = "ebbtide cost model", 1
LEAST_SLOPE_S = 1e-15
"""Seconds a byte, so that a rate is a number where size made no difference."""


@dataclass(frozen=True)
class Compute:
    """A local step of one model: `start_s + per_sample_s * batch` seconds."""

    start_s: float
    per_sample_s: float
    parameters: int
    error: float
    """Root mean square of the fit's relative misses."""
    batches: tuple[int, ...]
    """That were measured; beyond them the line is a guess."""

    def step_s(self, batch: int) -> float:
        """Seconds of a local step."""
        return self.start_s + self.per_sample_s * batch


@dataclass(frozen=True)
class Link:
    """A transfer on one level: `latency_s + sent bytes / bytes_per_s` seconds."""

    ranks: int
    """That were measured."""
    latency_s: float
    bytes_per_s: float
    error: float
    """Root mean square of the fit's relative misses."""

    def all_reduce_s(self, nbytes: float, ranks: int) -> float:
        """Seconds of averaging a buffer on so many ranks: a ring sends 2 (N - 1) / N of it in 2 (N - 1) hops."""
        hops = (ranks - 1) / max(self.ranks - 1, 1)
        return hops * self.latency_s + 2 * (ranks - 1) / ranks * nbytes / self.bytes_per_s


@dataclass(frozen=True)
class CostModel:
    """What a cluster's steps and transfers take."""

    compute: dict[str, Compute]
    """By model."""
    links: dict[str, Link]
    """By level: node, network."""
    provenance: dict[str, Any] = field(default_factory=dict)

    def samples_per_s(self, model: str, batch: int, period: int, wire: str, ranks: int) -> float | None:
        """The samples/s of all ranks that these costs promise; None where the model or a link was not measured.

        Transfers are taken to go by the slowest level there is.
        """
        compute = self.compute.get(model)
        if compute is None or (ranks > 1 and not self.links):
            return None
        nbytes = 4 * compute.parameters
        whole_s = max((link.all_reduce_s(nbytes, ranks) for link in self.links.values()), default=0.0)
        name = GRADIENTS if period == 1 else wire
        share = CONSTANTS.bytes_of_float32[wire]
        costs = Costs(step_s={f"{batch} 0 0": compute.step_s(batch)}, transfer_s={name: whole_s * share})
        round_s = costs.round(Plan(batch, period, wire_format=None if period == 1 else _wire(wire)), ranks)
        return ranks * batch * period / round_s if math.isfinite(round_s) and round_s > 0 else None

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        table = {"kind": KIND, "format": FORMAT, **asdict(self)}
        path.write_text(json.dumps(table, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> CostModel:
        """Read it.

        Raises:
            ConfigError: no such file, or another kind or format.
        """
        try:
            table = json.loads(path.read_text())
            kind, found = table.pop("kind"), table.pop("format")
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{path}: is no cost model ({error}); python -m benchmarks.throughput writes one"
            ) from None
        if (kind, found) != (KIND, FORMAT):
            raise ConfigError(
                f"{path}: is a {kind} of format {found}, and this version reads format {FORMAT}; "
                "make it anew with python -m benchmarks.throughput.report FOLDER"
            )
        compute = {
            name: Compute(**{**each, "batches": tuple(each["batches"])}) for name, each in table["compute"].items()
        }
        links = {name: Link(**each) for name, each in table["links"].items()}
        return cls(compute, links, table["provenance"])


def fit(measured: Measured) -> CostModel:
    """The cost model of a folder's measurements."""
    by_model: dict[str, list[Run]] = {}
    for run in measured.good:
        by_model.setdefault(run.case.model, []).append(run)
    compute = {model: _compute(runs) for model, runs in by_model.items()}
    links = {name: _link(level) for name, level in measured.links.items() if level["ranks"] > 1}
    provenance = dict(measured.good[-1].provenance) if measured.good else {}
    return CostModel(compute, links, provenance)


def _compute(runs: Sequence[Run]) -> Compute:
    """From the slowest rank's compute. Where there are periods above 1, of those alone: at period 1 a part of the
    averaging goes on inside the backward pass."""
    longer = [run for run in runs if run.case.sync_period_steps > 1] or runs
    points = [(float(run.case.batch_per_rank), float(run.figures["compute_step_s"])) for run in longer]
    start, slope, error = line(points)
    batches = tuple(sorted({run.case.batch_per_rank for run in longer}))
    return Compute(start, slope, runs[0].figures["parameters"], error, batches)


def _link(level: Any) -> Link:
    start, slope, error = line([(float(sent), float(seconds)) for sent, seconds in level["points"]])
    return Link(level["ranks"], start, 1 / max(slope, LEAST_SLOPE_S), error)


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """The a and c, none below 0, of t = a + c x through points (x, t), and the relative error (root mean square).

    Misses count relative to t, since sizes and times span several powers of ten. Of one x alone the line goes through
    the origin.
    """
    x, t = np.array(points, dtype=float).T
    columns = np.stack([1 / t, x / t], axis=1)
    choices = [[1]] if len(set(x)) == 1 else [[0, 1], [1], [0]]
    best = (math.inf, 0.0, 0.0)
    for chosen in choices:
        found = np.zeros(2)
        found[chosen] = np.linalg.lstsq(columns[:, chosen], np.ones(len(t)), rcond=None)[0]
        error = float(np.sqrt(np.mean((columns @ found - 1) ** 2)))
        if found.min() >= 0 and error < best[0] - 1e-12:
            best = (error, float(found[0]), float(found[1]))
    error, start, slope = best
    return start, slope, error


def _wire(name: str) -> Any:
    return name
