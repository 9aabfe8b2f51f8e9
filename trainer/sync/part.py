"""A part of the replica: what it sends at an averaging, and what it takes from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from trainer.config.sync import SyncConfig
from trainer.distributed.collectives import Collectives
from trainer.distributed.world import World
from trainer.sync.outer_optimizer import Outer
from trainer.wire.choose import NodesExchange, make_exchange, share_of
from trainer.wire.exchange import OWED, Exchange
from trainer.wire.flat import piece_values, pieces

T = TypeVar("T")


class Beside:
    """Memory of an average that goes on beside training: a snapshot, and in its place the correction that replaces it.

    Both are of what the part sends: its parameters, or their displacement from the base.
    """

    def __init__(self, values: torch.Tensor, *, is_correction: bool = False) -> None:
        self.values = values
        self.is_correction = is_correction

    @property
    def snapshot(self) -> torch.Tensor:
        """This rank's contribution, as it was when the average began."""
        assert not self.is_correction
        return self.values

    @property
    def correction(self) -> torch.Tensor:
        """The average minus the snapshot."""
        assert self.is_correction
        return self.values

    def correct(self, place: slice, mean: torch.Tensor) -> None:
        """A place's mean has arrived: its correction takes the place of its snapshot."""
        torch.sub(mean, self.values[place], out=self.values[place])


class Part:
    """A fragment's stretch of one buffer, averaged by itself.

    Where the wire format loses something, an outer optimizer moves the model, or only a share of the average is
    taken, ranks send displacements from `base`, the last model that they agreed on; else they send their parameters.
    """

    def __init__(self, values: torch.Tensor, settings: SyncConfig, world: World, outer: Outer | None) -> None:
        self.values = values
        self._world = world
        self._keeps_values = world.members is not None
        """Where a collective may be broken off, none works in the replica's own memory."""
        self._mixing = settings.mixing
        self._base: torch.Tensor | None = None
        self._outer = outer
        self.agreed_sq_norm = 0.0
        """Squared norm of the latest average."""
        self._owed: torch.Tensor | None = None
        """Loss of a lossy wire format; it is sent the next time."""
        self._mean: torch.Tensor | None = None
        """Where a lossless exchange makes the mean from what is sent. A blocking average of parameters needs none: the
        values become the mean."""
        self._owed_within: torch.Tensor | None = None
        """Loss of the wire format inside the node."""
        self._beside: Beside | None = None
        """Kept where averages may be delayed."""
        self._moved_sq: torch.Tensor | None = None
        """Squared norm of the snapshot minus the base."""
        self.use(settings)

    def use(self, settings: SyncConfig) -> None:
        """Exchange as these settings say from now on; the replicas are one, and nothing is under way."""
        self._exchange, self._within = self._exchanges(settings)
        self._owed = self._mean = self._owed_within = self._beside = None
        lossy = self._exchange.lossy or (self._within is not None and self._within.lossy)
        if not (lossy or settings.outer != "none" or settings.mixing < 1):
            self._base = None
        elif self._base is None:
            self._base = self.values.to(torch.promote_types(self.values.dtype, torch.float32), copy=True)
        if settings.delay_steps != 0 and self._world.size > 1:
            # taken now, for good: taken in the midst of training it would break up the memory that a local step needs
            self._make_room()
            self._beside = Beside(torch.zeros_like(self._sent_like))

    @property
    def _sent_like(self) -> torch.Tensor:
        """A tensor of what is sent: displacements are never of less than float32."""
        return self.values if self._base is None else self._base

    def _make_room(self) -> None:
        """Have what an exchange consumes besides the values themselves."""
        if self._exchange.lossy and self._owed is None:
            self._owed = torch.zeros_like(self._sent_like, dtype=OWED)
        elif not self._exchange.lossy and self._mean is None:
            self._mean = torch.zeros_like(self._sent_like)

    def _exchanges(self, settings: SyncConfig) -> tuple[Exchange, Exchange | None]:
        """Between all ranks or nodes, and inside a node where that is another level."""
        world = self._world
        values, count, chunk_bytes = self.values, len(self.values), settings.bucket_bytes
        hidden = settings.delay_steps != 0
        if settings.node_period_steps is None or world.size == 1:
            return make_exchange(settings.wire_format, values, count, world.size, chunk_bytes, hidden=hidden), None
        nodes = world.size // world.local_size
        share = share_of(count, world)
        between = make_exchange(settings.wire_format, values, share, nodes, chunk_bytes, hidden=hidden)
        within = make_exchange(settings.node_wire_format, values, count, world.local_size, chunk_bytes)
        return NodesExchange(between, count, world), within

    def average_within(self, weights: Sequence[float], via: Collectives) -> None:
        """Make the node's replicas one, at once; `weights` and `via` are the node's."""
        assert self._within is not None
        if not self._within.lossy:
            for chunk, mean in self._within.means(self.values, weights, via):
                self.values[chunk] = mean
            return
        base = _present(self._base)
        if self._owed_within is None:
            self._owed_within = torch.zeros_like(base, dtype=OWED)
        for chunk, mean in self._within.means(self._owed_within, weights, via, self._has_moved):
            self.values[chunk] = base[chunk] + mean

    def rebase(self) -> None:
        """The replicas were made one by other means: displacements count from here, nothing is owed, and an outer
        optimizer begins anew."""
        if self._base is not None:
            self._base.copy_(self.values)
            self._owed = self._mean = self._owed_within = None
        if self._outer is not None:
            self._outer.forget()
        for exchange in (self._exchange, self._within):
            if exchange is not None:
                exchange.forget()

    def snapshot(self) -> None:
        """Remember the replica as it is now, so that training may change it while it is averaged; `pack` follows."""
        beside = _present(self._beside)
        beside.is_correction = False
        if self._base is None:
            beside.snapshot.copy_(self.values)
            return
        self._moved_sq = torch.zeros((), dtype=torch.float64, device=self.values.device)
        for piece in pieces(len(self.values), self.values.device):
            moved = torch.sub(self.values[piece], self._base[piece], out=beside.snapshot[piece])
            self._moved_sq += torch.dot(moved, moved)

    def pack(self, *, delayed: bool) -> float:
        """Make ready what is sent; the squared norm of this rank's share of the divergence."""
        if self._base is None:
            if delayed or self._keeps_values:
                self._make_room()
                _present(self._mean).copy_(_present(self._beside).snapshot if delayed else self.values)
            return _squared(self._consumed(delayed=delayed)).item()
        self._make_room()
        if delayed:
            return _present(self._moved_sq).item()
        norm = torch.zeros((), dtype=torch.float64, device=self.values.device)
        for piece in pieces(len(self.values), self.values.device):
            moved = self._has_moved(piece)
            norm += torch.dot(moved, moved)  # of displacements, so that few digits cancel
        return norm.item()

    def _consumed(self, *, delayed: bool) -> torch.Tensor:
        """The tensor that the exchange consumes: it becomes the mean, or the loss."""
        if self._exchange.lossy:
            return _present(self._owed)
        in_place = self._base is None and not delayed and not self._keeps_values
        return self.values if in_place else _present(self._mean)

    def _agreed(self, *, delayed: bool) -> torch.Tensor:
        """The model that the ranks agreed on: the same bits on every rank."""
        return self._consumed(delayed=delayed) if self._base is None else self._base

    def _has_moved(self, place: slice) -> torch.Tensor:
        """How far a place of the replica is from the base now."""
        return self.values[place] - _present(self._base)[place]

    def _had_moved(self, place: slice) -> torch.Tensor:
        """How far it was."""
        return _present(self._beside).snapshot[place]

    def exchange(
        self,
        weights: Sequence[float],
        local_lr: float,
        via: Collectives,
        *,
        delayed: bool,
        plainly: bool,
    ) -> float:
        """Average with the other ranks; the squared norm of the mean. `plainly` passes the outer optimizer by."""
        consumed, outer = self._consumed(delayed=delayed), None if plainly else self._outer
        beside = _present(self._beside) if delayed else None
        norm = torch.zeros((), dtype=torch.float64, device=self.values.device)
        agreed_norm = torch.zeros_like(norm)
        fresh = None if self._base is None else self._had_moved if delayed else self._has_moved
        for place, mean in self._exchange.means(consumed, weights, via, fresh):
            norm += _squared(mean) if self._base is None else torch.dot(mean, mean)
            if outer is not None:
                outer.direct_(mean, place, local_lr)
            if self._base is None:
                consumed[place] = mean
            else:
                self._base[place] += mean
                agreed_norm += torch.dot(self._base[place], self._base[place])
            if beside is not None:
                beside.correct(place, mean)
        if beside is not None:
            beside.is_correction = True
        if self._base is not None and not self._exchange.lossy:
            self._mean = consumed.zero_() if delayed else None
        self.agreed_sq_norm = (norm if self._base is None else agreed_norm).item()
        return norm.item()

    def replace(self, *, delayed: bool) -> None:
        """Take the average in place of values that are not finite."""
        agreed = self._agreed(delayed=delayed)
        if agreed is not self.values:
            self.values.copy_(agreed)

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite, and their squares too."""
        return math.isfinite(_squared(self.values).item())

    def land(self, *, delayed: bool, progressed: bool, wholly: bool) -> None:
        """Take the average, or as much of it as `mixing` says, and keep the progress made since the snapshot."""
        share = 1.0 if wholly else self._mixing
        if delayed and (progressed or share < 1):
            self.values.add_(_present(self._beside).correction, alpha=share)
            return
        agreed = self._agreed(delayed=delayed)
        if share < 1:
            self.values.lerp_(agreed.to(self.values.dtype), share)
        elif agreed is not self.values:
            self.values.copy_(agreed)

    def state_dict(self) -> dict[str, Any]:
        """State that later averages depend on, a transfer under way included (once it has arrived)."""
        kept = {"base": self._base, "owed": self._owed, "mean": self._mean, "owed_within": self._owed_within}
        kept["correction"] = None if self._beside is None else self._beside.values
        return {
            **{name: tensor for name, tensor in kept.items() if tensor is not None},
            "exchange": self._exchange.state_dict(),
            "within": None if self._within is None else self._within.state_dict(),
            "outer": None if self._outer is None else self._outer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        device = self.values.device
        if self._base is not None:
            self._base.copy_(state.get("base", self.values))  # without one, the replicas are one
        if "owed" in state:
            self._owed = state["owed"].to(device)
        if "mean" in state:
            self._mean = state["mean"].to(device)
        if "correction" in state:
            self._beside = Beside(state["correction"].to(device), is_correction=True)
        self._owed_within = state["owed_within"].to(device) if "owed_within" in state else None
        self._exchange.load_state_dict(state["exchange"])
        if self._within is not None:
            self._within.load_state_dict(state["within"])
        if self._outer is not None:
            self._outer.load_state_dict(state["outer"])


def _squared(values: torch.Tensor) -> torch.Tensor:
    """Squared norm, 0-dim float64; in small pieces, since each is copied to float64 for it."""
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    size = piece_values(values.device) // 8
    wide = values.new_empty(min(len(values), size), dtype=torch.float64)
    for start in range(0, len(values), size):
        some = values[start : start + size]
        copied = wide[: len(some)].copy_(some)
        total += torch.dot(copied, copied)
    return total


def _present(kept: T | None) -> T:
    assert kept is not None
    return kept
