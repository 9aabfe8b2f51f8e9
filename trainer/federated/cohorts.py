"""Who trains in which round, who is heard, and the virtual clock: pure functions of the seed, the Plan and the profile.

Every rank computes the same rounds, so that nobody has to be told of them.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.config.federated import FederatedConfig
from trainer.errors import ConfigError
from trainer.federated.profiles import Profile
from trainer.plan import Plan

UP_BYTES = {"float32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}
"""Bytes of a parameter on a device's way up; on its way down it is a float32."""


@dataclass(frozen=True)
class Visit:
    """One device's part in a round."""

    device: int
    draw: int
    """What its order of samples and its random numbers are drawn by, beside seed and device: no two visits share it."""
    batch: int
    """Samples of a local step."""
    steps: int
    """Local steps."""
    samples: int
    """Trained in all."""
    takes_s: float
    """Virtual seconds, transfers included."""


@dataclass(frozen=True)
class Heard:
    """A device's model that a round's average takes."""

    device: int
    draw: int
    """Of its visit."""
    weight: float
    """Its share of the average is this over all weights."""
    scale: float = 1.0
    """Factor on its displacement: what staleness leaves of it."""
    staleness: int = 0
    """Updates since the model that it began from."""


@dataclass(frozen=True)
class DeviceRound:
    """What devices do in one round."""

    number: int
    visits: tuple[Visit, ...]
    """To be trained from the round's first model, in order of device."""
    heard: tuple[Heard, ...]
    """What the average at its end takes; none where too few reported, and the model is kept."""
    dropped: tuple[int, ...] = ()
    """Devices that were drawn and not heard."""
    left_out: tuple[int, ...] = ()
    """Devices whose models were not finite, and did not count."""
    began_s: float = 0.0
    """Virtual seconds since the run began."""
    ended_s: float = 0.0
    compute_s: float = 0.0
    """Mean virtual seconds of the visits' compute."""
    slowest_compute_s: float = 0.0
    transfer_s: float = 0.0
    """Most virtual seconds of a visit's transfers."""

    @property
    def steps(self) -> int:
        """The most local steps of any device."""
        return max((visit.steps for visit in self.visits), default=0)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> DeviceRound:
        """The round whose `asdict` this is."""
        visits = tuple(Visit(**each) for each in state["visits"])
        heard = tuple(Heard(**each) for each in state["heard"])
        return cls(
            **{
                **state,
                "visits": visits,
                "heard": heard,
                "dropped": tuple(state["dropped"]),
                "left_out": tuple(state["left_out"]),
            }
        )


@dataclass(frozen=True)
class Fleet:
    """All that every rank knows of the devices."""

    config: FederatedConfig
    sizes: tuple[int, ...]
    """Samples that each device trains with."""
    profile: Profile
    seed: int
    parameters: int
    """Of the model."""

    def __post_init__(self) -> None:
        empty = [device for device, size in enumerate(self.sizes) if not size]
        if empty:
            raise ConfigError(f"device {empty[0]} has no samples to train with: give it some, or have fewer devices")

    def visit(self, device: int, draw: int, plan: Plan, speed: float) -> Visit:
        """A device's work by this Plan, in a cohort of this mean speed."""
        size = self.sizes[device]
        planned = plan.batch_per_rank
        if self.config.batch == "speed":
            faster = self.profile.samples_per_s[device] / speed
            planned = max(round(planned * faster), min(planned, 2))  # a BatchNorm takes no single sample
        batch, epochs = min(planned, size), self.config.local_epochs
        steps = plan.sync_period_steps if epochs is None else epochs * len(batch_sizes(size, batch))
        return self._timed(Visit(device, draw, batch, steps, 0, 0.0), plan)

    def cut(self, visit: Visit, plan: Plan, deadline_s: float) -> Visit | None:
        """As much of this visit as ends by the deadline; None where that is no local step."""
        compute_s = deadline_s - self.transfer_s(visit.device, plan)
        steps = int(compute_s * self.profile.samples_per_s[visit.device] // visit.batch)
        found = None
        if steps >= 1:
            kept = Visit(visit.device, visit.draw, visit.batch, min(steps, visit.steps), 0, 0.0)
            found = self._timed(kept, plan)
        return found

    def _timed(self, visit: Visit, plan: Plan) -> Visit:
        samples = samples_in(self.sizes[visit.device], visit.batch, visit.steps)
        takes_s = samples / self.profile.samples_per_s[visit.device] + self.transfer_s(visit.device, plan)
        return Visit(visit.device, visit.draw, visit.batch, visit.steps, samples, float(takes_s))

    def transfer_s(self, device: int, plan: Plan) -> float:
        """Virtual seconds to fetch the model and to send what came of it; scaffold sends twice as much both ways."""
        times = 8 * self.parameters * (2 if self.config.rule == "scaffold" else 1)
        up = UP_BYTES[plan.wire_format or "float32"]
        down_s = 4.0 * times / self.profile.down_bits_per_s[device]
        return float(down_s + up * times / self.profile.up_bits_per_s[device])

    def weight(self, visit: Visit) -> float:
        """What a device weighs in an average."""
        if self.config.weights == "uniform":
            return 1.0
        return float(visit.samples if self.config.batch == "speed" else self.sizes[visit.device])

    def share(self, device: int) -> float:
        """A device's share in the objective, over all devices."""
        if self.config.weights == "uniform":
            return 1 / len(self.sizes)
        return self.sizes[device] / sum(self.sizes)

    def available(self, draw: int) -> npt.NDArray[np.int64]:
        """The devices that are there."""
        chances = np.random.default_rng([self.seed, 8, draw]).random(len(self.sizes))
        return np.flatnonzero(chances < self.profile.availability)

    def check_deadline(self, plan: Plan) -> None:
        """Refuse a deadline that too few devices can meet.

        Raises:
            ConfigError: with the soonest that would do.
        """
        deadline_s = self.config.deadline_s
        if deadline_s is None:
            return
        speed = float(self.profile.samples_per_s.mean())
        visits = [self.visit(device, 0, plan, speed) for device in range(len(self.sizes))]
        if self.config.late == "partial":
            soonest = sorted(self._first_step_s(visit, plan) for visit in visits)
        else:
            soonest = sorted(visit.takes_s for visit in visits)
        needed = soonest[self.config.min_reports - 1]
        if needed > deadline_s:
            raise ConfigError(
                f"federated.deadline_s = {deadline_s}: too few devices meet it; {self.config.min_reports} would report "
                f"after {math.ceil(needed * 100) / 100} s"
            )

    def _first_step_s(self, visit: Visit, plan: Plan) -> float:
        return float(visit.batch / self.profile.samples_per_s[visit.device]) + self.transfer_s(visit.device, plan)


@lru_cache(maxsize=4096)
def batch_sizes(size: int, batch: int) -> tuple[int, ...]:
    """Samples of each batch in one pass over a shard. The last may be smaller, but is no single sample, which a
    BatchNorm cannot take: then the last two share what is left, or of batches of two the last has three."""
    whole, rest = divmod(size, batch)
    if rest == 1 and whole and batch == 2:
        return (*(batch for _ in range(whole - 1)), 3)
    if rest == 1 and whole and batch > 1:
        return (*(batch for _ in range(whole - 1)), (batch + 2) // 2, (batch + 1) // 2)
    return (*(batch for _ in range(whole)), *((rest,) if rest else ()))


def samples_in(size: int, batch: int, steps: int) -> int:
    """Samples in so many batches of a shard, each pass cut by itself."""
    sizes = batch_sizes(size, batch)
    whole, rest = divmod(steps, len(sizes))
    return whole * size + sum(sizes[:rest])


class Cohorts(ABC):
    """The rounds of a run, one after another."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.number = 0
        """Rounds so far."""
        self.now_s = 0.0
        """Virtual seconds so far."""

    @abstractmethod
    def next(self, plan: Plan) -> DeviceRound:
        """The next round, by this Plan."""

    def _round(self, plan: Plan, visits: Sequence[Visit], **known: Any) -> DeviceRound:
        """A round whose virtual times follow from its visits."""
        speeds = self.fleet.profile.samples_per_s
        compute = [visit.samples / float(speeds[visit.device]) for visit in visits] or [0.0]
        transfer = [self.fleet.transfer_s(visit.device, plan) for visit in visits] or [0.0]
        self.number += 1
        return DeviceRound(
            number=self.number,
            visits=tuple(sorted(visits, key=lambda visit: (visit.device, visit.draw))),
            ended_s=self.now_s,
            compute_s=sum(compute) / len(compute),
            slowest_compute_s=max(compute),
            transfer_s=max(transfer),
            **known,
        )

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; JSON values."""
        return {"number": self.number, "now_s": self.now_s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.number, self.now_s = state["number"], state["now_s"]


class InTurn(Cohorts):
    """Rounds that all who take part begin together: a cohort is drawn, and those who finish in time are heard."""

    def next(self, plan: Plan) -> DeviceRound:
        fleet, config, began_s = self.fleet, self.fleet.config, self.now_s
        there = fleet.available(self.number)
        draw = np.random.default_rng([fleet.seed, 9, self.number])
        drawn = draw.permutation(there)[: config.drawn].tolist()
        speed = float(fleet.profile.samples_per_s[drawn].mean()) if drawn else 1.0
        visits = [fleet.visit(device, self.number, plan, speed) for device in drawn]
        in_time = self._in_time(visits, plan)
        in_time.sort(key=lambda visit: visit.takes_s)  # stable: who was drawn first
        heard = in_time[: config.cohort or config.devices]
        takes_s = max((visit.takes_s for visit in heard), default=0.0)
        if config.deadline_s is not None and len(heard) < min(len(drawn), config.cohort or len(drawn)):
            takes_s = config.deadline_s
        if len(heard) < config.min_reports:
            takes_s = config.deadline_s or takes_s
            heard = []
        self.now_s += takes_s
        taken = {visit.device for visit in heard}
        return self._round(
            plan,
            heard,
            heard=tuple(
                Heard(visit.device, visit.draw, fleet.weight(visit))
                for visit in sorted(heard, key=lambda each: each.device)
            ),
            dropped=tuple(sorted(device for device in drawn if device not in taken)),
            began_s=began_s,
        )

    def _in_time(self, visits: Sequence[Visit], plan: Plan) -> list[Visit]:
        config = self.fleet.config
        if config.deadline_s is None:
            return list(visits)
        if config.late == "drop":
            return [visit for visit in visits if visit.takes_s <= config.deadline_s]
        cut = (
            visit if visit.takes_s <= config.deadline_s else self.fleet.cut(visit, plan, config.deadline_s)
            for visit in visits
        )
        return [visit for visit in cut if visit is not None]


@dataclass(order=True)
class Flight:
    """A device that trains."""

    arrives_s: float
    draw: int
    device: int = field(compare=False)
    version: int = field(compare=False)
    """Updates made when it began."""
    weight: float = field(compare=False)


class Buffered(Cohorts):
    """Updates that wait for no device: as soon as `buffer` models have arrived, whichever they are (FedBuff, Nguyen et
    al. 2022; with a buffer of one FedAsync, Xie et al. 2019). Whoever arrives is replaced at once by another device."""

    def __init__(self, fleet: Fleet) -> None:
        super().__init__(fleet)
        self._buffer = 1 if fleet.config.rule == "fedasync" else fleet.config.buffer
        self._flights: list[Flight] = []
        self._started = 0

    def next(self, plan: Plan) -> DeviceRound:
        config, began_s = self.fleet.config, self.now_s
        visits: list[Visit] = []
        arrived: list[Flight] = []
        while len(self._flights) < (config.cohort or len(self.fleet.sizes)):
            self._start(plan, visits)
        while True:
            flight = heapq.heappop(self._flights)
            self.now_s = flight.arrives_s
            arrived.append(flight)
            if len(arrived) == self._buffer:
                break
            self._start(plan, visits)
        heard = tuple(self._heard(flight) for flight in sorted(arrived, key=lambda each: each.draw))
        return self._round(plan, visits, heard=heard, began_s=began_s)

    def _heard(self, flight: Flight) -> Heard:
        staleness = self.number - flight.version
        scale = (1 + staleness) ** -self.fleet.config.staleness
        if self.fleet.config.rule == "fedasync":
            return Heard(flight.device, flight.draw, 1.0, self.fleet.config.async_lr * scale, staleness)
        return Heard(flight.device, flight.draw, flight.weight, scale, staleness)

    def _start(self, plan: Plan, visits: list[Visit]) -> None:
        """Begin with a device that does not train, drawn at random of those that are there."""
        busy = {flight.device for flight in self._flights}
        draw = np.random.default_rng([self.fleet.seed, 9, self._started])
        idle = [device for device in range(len(self.fleet.sizes)) if device not in busy]
        there = set(self.fleet.available(self._started).tolist())
        device = int(draw.choice([each for each in idle if each in there] or idle))
        speed = float(self.fleet.profile.samples_per_s.mean())
        visit = self.fleet.visit(device, self._started, plan, speed)
        flight = Flight(self.now_s + visit.takes_s, visit.draw, device, self.number, self.fleet.weight(visit))
        heapq.heappush(self._flights, flight)
        self._started += 1
        visits.append(visit)

    def state_dict(self) -> dict[str, Any]:
        flights = [[each.arrives_s, each.draw, each.device, each.version, each.weight] for each in self._flights]
        return {**super().state_dict(), "flights": flights, "started": self._started}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._flights = [Flight(*flight) for flight in state["flights"]]
        heapq.heapify(self._flights)
        self._started = state["started"]


def open_cohorts(fleet: Fleet) -> Cohorts:
    """The rounds that the rule asks for."""
    return Buffered(fleet) if fleet.config.is_async else InTurn(fleet)
