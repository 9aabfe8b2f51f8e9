"""What devices have sent, and what it has added up to on one rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from trainer.federated.cohorts import Visit
from trainer.sync.drift import Flats
from trainer.sync.rests import Named


class Reached(NamedTuple):
    """How far a device's optimizer reached."""

    far: float
    """The rate times the steps below, of the group that reached farthest."""
    steps: float


@dataclass
class Sent:
    """What a device has sent whose model is taken in a later round."""

    visit: Visit
    moved: Flats
    rests: Named
    reached: Reached


@dataclass
class Gathered:
    """What this rank's devices have added up for one average."""

    sums: Flats
    """Of displacements, each times its weight and scale; of models under fedasync."""
    weight: float = 0.0
    scaled: float = 0.0
    """Of weights times scales."""
    sq_norms: float = 0.0
    """Of the squared norms of what was added, times the weights."""
    share: float = 0.0
    """Of the devices' shares in the objective."""
    reach: float = 0.0
    """Of how far optimizers reached, times the weights."""
    steps: float = 0.0
    """Of the same in steps, times the weights."""

    def add(self, weight: float, scale: float, sq_norm: float, share: float, reached: Reached) -> None:
        """One device more."""
        self.weight += weight
        self.scaled += weight * scale
        self.sq_norms += weight * scale**2 * sq_norm
        self.share += share
        self.reach += weight * reached.far
        self.steps += weight * reached.steps
