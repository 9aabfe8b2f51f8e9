"""The numbers that the autopilot judges by, in one place, each with its source and its error.

They are fixed before a run. What a run measures is in `goodput.Costs`, and what a user sets is in the fields of
`autopilot.Autopilot`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.plan import WireFormat

GRADIENTS = "gradients"
"""Names what period 1 averages, beside the wire formats that parameters are averaged in."""


@dataclass(frozen=True)
class Constants:
    """Numbers that no run measures.

    Each says where it comes from and how far it may be off. "Judgement" means that somebody chose it; "not measured"
    means that nobody has tried how much another value changes. All that was measured is of the FedAvg CNN on
    Fashion-MNIST, on shared machines with two cores and no GPU; tables and records are in benchmarks/.
    """

    # ---- seconds

    bytes_of_float32: Mapping[str, float] = field(
        default_factory=lambda: {GRADIENTS: 1.0, "float32": 1.0, "bf16": 0.5, "int8": 0.266, "int4": 0.141}
    )
    """Bytes that a transfer sends, over those of float32.
    Source: 8 bytes a block of 128 values, beside the values' own. A block has 4; the rest is a judgement.
    Error: 2 to 4 % too high for int8 and 3 to 7 % for int4, by an interface's counter (results/sync_cost)."""
    hiding_share: float = 0.5
    """Share of a local step beside which averaged gradients travel: about the backward pass.
    Source: judgement. Pollux fits an exponent instead. Error: not measured."""
    fragment_cost: float = 0.25
    """Time and cores that each further fragment of an average takes, over those of the whole average.
    Source: 1.7 million parameters, where thirds took 1.6 times as long as the whole, and quarters 1.9 times.
    Error: those two alone give 0.3; larger models have less."""
    waited_cost: float = 0.5
    """Time that an average which is waited for takes from the steps around it, over that of a hidden one: caches have
    gone cold. Source: measured on two machines. Error: 0.25 on one of them and 0.75 on the other."""
    mean_decay: float = 0.9
    """Share of a running mean that the next value leaves. Source: judgement. Error: not measured."""
    cohorts: int = 64
    """Rounds of federated devices that the mean seconds of their slowest is taken over, since every round has others.
    Source: judgement. Error: not measured."""
    known_rounds: int = 16
    """Rounds after which a kind of local step is known well enough to tell how fast the machine is.
    Source: judgement. Error: not measured."""

    # ---- learning

    drift_power: float = 1.5
    """Power of the local steps that the squared distance of replicas grows by; the same power of N - 1 is what N ranks
    add to it. Source: between 1 (a random walk) and 3 (within a momentum's memory). Four ranks were measured at 0.085,
    0.19, 0.55 and 1.6 after 2, 4, 8 and 16 steps. Error: these give 1.2, 1.5 and 1.5. For ranks the power makes periods
    go by 1 / (N - 1), which the bound of Yu, Yang and Zhu 2019 (arXiv 1807.06629) gives for as many samples."""
    format_worth: Mapping[str, float] = field(
        default_factory=lambda: {"float32": 1.0, "bf16": 1.0, "int8": 0.998, "int4": 0.99}
    )
    """How much a sample teaches behind averages in a wire format, over float32.
    Source: judgement; int4 at period 4 ended 0.1 points below averaged gradients (benchmarks/README.md).
    Error: that difference is within the spread of three seeds; int8 is not measured."""
    care: Mapping[str, float] = field(default_factory=lambda: {"time": 2.0, "bytes": 2.0, "accuracy": 16.0})
    """Power of efficiency in a candidate's score, by target.
    Source: at 4, whole averages that are waited for scored as hidden fragments do; at 2 fragments lead by a tenth.
    For "accuracy": judgement. Error: not measured."""
    late_care: float = 4.0
    """Factor on `care` in the late part of a run. Source: judgement. Error: not measured."""

    # ---- candidates

    formats: tuple[WireFormat, ...] = ("float32", "int8", "int4")
    """Wire formats that are compared. Source: judgement; bf16 lies between two of them. Error: not measured."""
    fragments: tuple[int, ...] = (1, 2, 3, 4)
    """Numbers of fragments that are compared. Source: judgement. Error: not measured; at 10 Mbit/s eighths were of use
    (benchmarks/README.md)."""
    reach: int = 4
    """Longest candidate period, over the present one, because replicas' parting was measured near that.
    Source: ResNet-50 went from period 2 to 32 by a divergence that proved five times as large. Error: not measured."""
    full_memory: float = 0.9
    """Share of memory that a larger batch may fill. Source: judgement. Error: not measured."""
    tie: float = 0.03
    """Scores so near the best count as the best; the fewest averages and fragments decide between them.
    Source: judgement; seconds repeat to a few percent. Error: not measured."""
    slack: float = 1.5
    """Divergence over its bound at which a Plan must end. Source: judgement. Error: not measured."""

    # ---- probes

    probe_period: int = 2
    """Local steps of a round while the start is measured.
    Source: four ranks, two seeds. With period 2 first, runs ended at 0.9047 to 0.9065; with 2,048 samples of period 8
    first, at 0.9022 to 0.9033. Error: the spread of the two seeds is within these."""
    probe_steps: int = 32
    """Local steps of a probe, at least. Source: judgement; 16 served too. Error: not measured."""
    larger_period: int = 8
    """Longest period of a larger batch's probe, so that it ends soon. Source: judgement. Error: not measured."""


CONSTANTS = Constants()
