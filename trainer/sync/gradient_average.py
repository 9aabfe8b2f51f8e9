"""Period 1: gradients averaged while the backward pass goes on, as DistributedDataParallel does.

Hooks sit on the parameters, not on the forward pass. So it does not matter how the loss was computed: by the model, by
a method of it, in several passes, or not at all on this rank. A parameter that got no gradient joins in with zeros.
"""

from __future__ import annotations

import copy
import sys
import threading
import zlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.autograd import Variable
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from trainer.config.sync import GradientFormat
from trainer.distributed.collectives import Collectives
from trainer.errors import MismatchError, PeerError
from trainer.sync.gradient_notes import GradientNotes
from trainer.sync.replica import Replica
from trainer.wire.flat import real_view

POWERSGD_RANK = 2
POWERSGD_FROM_STEP = 10  # early gradients compress badly
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # DistributedDataParallel's own defaults
OPERATION = "averaging gradients"
HEAD = ("share", "changed", "new", "at", "at_squared")
"""What ranks sum beside their gradients: a rank's share of N equal ones, whether its layers have changed, a fingerprint
of those that are new, and the backward pass that it is at, also squared, so that any difference shows."""


@dataclass(eq=False)
class Bucket:
    """Gradients that travel together; PowerSGD's hook reads it as a `torch.distributed.GradBucket`."""

    number: int
    last: bool
    parameters: list[torch.Tensor]
    flat: torch.Tensor
    """Real, 1-d; between backward passes the parameters' `.grad` lie in it."""
    views: list[torch.Tensor]
    """A place of `flat` a parameter, of its shape and strides."""
    parts: list[torch.Tensor]
    """These places, flat and real."""
    waiting: set[int] = field(default_factory=set)
    """Numbers of the parameters whose gradient has not come in this backward pass."""
    without: list[int] = field(default_factory=list)
    """Numbers of the parameters that have none."""
    work: Any = None
    own: torch.Tensor | None = None
    new_references: tuple[int, ...] = ()
    """References to the views, and to their memory, before anybody else had one."""

    def references(self) -> tuple[int, ...]:
        """How often each view is referred to, and their memory."""
        return (*map(sys.getrefcount, self.views), torch._C._storage_Use_Count(self.flat.untyped_storage()._cdata))

    def renew(self) -> None:
        """Where the loop has kept a gradient of an earlier step, leave it to it, and take other memory."""
        now = self.references()
        given = [int(p.grad is view) for p, view in zip(self.parameters, self.views, strict=True)]
        allowed = (first + more for first, more in zip(self.new_references, (*given, 0), strict=True))
        if any(count > most for count, most in zip(now, allowed, strict=True)):
            fresh = _bucket(self.number, self.last, self.parameters)
            self.flat, self.views, self.parts = fresh.flat, fresh.views, fresh.parts

    def buffer(self) -> torch.Tensor:
        return self.flat

    def index(self) -> int:
        return self.number

    def is_last(self) -> bool:
        return self.last

    def gradients(self) -> list[torch.Tensor]:
        return self.parts

    def pack(self) -> None:
        """Take the gradients in; `.grad` is then a place of the bucket. Sparse ones become dense."""
        self.without, into, taken = [], [], []
        for number, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            gradient = parameter.grad
            if gradient is None:
                view.zero_()
                self.without.append(number)
            elif gradient.layout != torch.strided:
                view.copy_(gradient.to_dense())
            elif gradient.data_ptr() != view.data_ptr():
                into.append(view)
                taken.append(gradient.detach())
        if into:
            torch._foreach_copy_(into, taken)

    def hand_out(self, used: Sequence[bool], sparse: Container[int]) -> None:
        """Give every parameter its mean gradient; one that no rank has a gradient for has none here."""
        for number, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            before = parameter.grad
            if before is not None and before.layout != torch.strided:
                parameter.grad = view.to_sparse(before.sparse_dim())
            elif before is not view and used[number]:
                parameter.grad = view.to_sparse(1) if id(parameter) in sparse else view


class GradientAverage:
    """Averages the gradients of a fixed list of parameters over ranks, put on and taken off."""

    def __init__(self, gradient_format: GradientFormat, replica: Replica) -> None:
        self.gradient_format = gradient_format
        self._replica = replica
        self._notes: GradientNotes | None = None
        self._via: Collectives | None = None
        self._powersgd: PowerSGDState | None = None
        self._buckets: list[Bucket] = []
        self._hooks: list[Any] = []
        self._places: dict[int, int] = {}
        self._owed: dict[int, torch.Tensor] = {}
        """Loss of compressed gradients (flat, by the parameter's place) that nothing has made good yet."""
        self._compressed: set[int] = set()
        self._restored: dict[str, Any] | None = None
        self._flags = torch.empty(0)
        """The numbers that are summed where nothing is odd: `HEAD`, and a 1 a parameter."""
        self._step = self._pass = 0
        self._quiet = False
        self._open = self._outermost = False
        self._next = 0
        self._averaged = False
        """Gradients were averaged since the last step's end."""
        self._new: list[torch.Tensor] = []
        self._share: float | None = None
        self.more: Callable[[Collectives], float] = lambda _: 0.0
        """What this rank's gradient counts more in a mean than its share; over all ranks 0."""
        self._more = 0.0
        self.weight: float | None = None
        """Weight of this rank's gradient in the latest mean; None: one of N."""
        self.on_failure: Callable[[PeerError], None] | None = None
        """Mends what fails because a peer has gone; None: it is raised."""
        self._failed: PeerError | None = None
        self._lock = threading.RLock()  # backward passes of several devices run hooks on several threads

    @property
    def on(self) -> bool:
        """Whether gradients are averaged now."""
        return self._via is not None

    @property
    def collectives(self) -> Collectives:
        """Of the ranks that gradients are averaged over."""
        assert self._via is not None
        return self._via

    def put_on(
        self, parameters: Sequence[torch.Tensor], via: Collectives | None, notes: GradientNotes | None = None
    ) -> None:
        """Average these parameters' gradients from now on, over these ranks; None ends it.

        `notes` is shown every bucket before and after its average.

        A compressor begins with nothing but what it owes, wherever this is called; so a run that calls it at a
        checkpoint goes on bit for bit as one that is resumed from it.
        """
        owed = self._all_owed()
        self.take_off()
        self._owed = owed if via is not None else {}  # a local phase leaves old gradients behind
        if via is None or via.size == 1 or not parameters:
            return
        self._via, self._notes = via, notes
        self._buckets = _buckets(parameters)
        self._flags = torch.ones(len(HEAD) + len(parameters), dtype=torch.float64, device=self._buckets[0].flat.device)
        self._step = self._pass = 0
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        for bucket in self._buckets:
            for number, parameter in enumerate(bucket.parameters):
                hook = partial(self._arrived, bucket, number)
                register: Any = parameter.register_post_accumulate_grad_hook
                self._hooks.append(register(hook))
        if self.gradient_format == "powersgd":
            self._powersgd = PowerSGDState(
                via.group,
                matrix_approximation_rank=POWERSGD_RANK,
                start_powerSGD_iter=POWERSGD_FROM_STEP,
                orthogonalization_epsilon=1e-8,
            )
            self._go_on(self._powersgd)

    def _go_on(self, powersgd: PowerSGDState) -> None:
        """Give a compressor what a checkpoint holds of the one before it."""
        kept, self._restored = self._restored, None
        if kept is None:
            return
        device = self._buckets[0].flat.device
        for name, value in kept.items():
            if name == "rng":
                powersgd.rng.set_state(value)
            elif isinstance(value, dict):
                setattr(powersgd, name, {number: tensor.to(device) for number, tensor in value.items()})
            else:
                setattr(powersgd, name, value)
        self._compressed = set(powersgd.error_dict)
        for number in self._compressed:  # it owes itself what they lost
            for parameter in self._buckets[number].parameters:
                self._owed.pop(self._places[id(parameter)], None)

    def take_off(self) -> None:
        """End averaging; gradients keep what they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._buckets, self._compressed = [], [], set()
        self._powersgd = self._via = self._notes = None
        self._open = self._averaged = self._outermost = False

    def forget(self) -> None:
        """Drop what compression owes: a step was skipped, whose gradients were not finite on some rank."""
        if self._powersgd is not None:
            for kept in (self._powersgd.error_dict, self._powersgd.p_memory_dict, self._powersgd.q_memory_dict):
                kept.clear()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Gradients stay on this rank."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def set_weight(self, weight: float | None) -> None:
        """Weigh this rank's gradient in the next mean by this share of all; None: as all others, one of N."""
        self._share = weight

    # ---- a backward pass

    def outermost_begins(self) -> None:
        """A backward pass through the model's outputs has begun: gradients are averaged at its end, if any come.

        Inside re-entrant checkpoints others begin and end; they must not end the averaging.
        """
        if self.on and not self._quiet and not self._outermost:
            self._outermost = True
            Variable._execution_engine.queue_callback(self._end)

    def _begin(self) -> None:
        """The first gradient of a backward pass has come."""
        if not self._open:
            self._start()
            if not self._outermost:
                Variable._execution_engine.queue_callback(self._end)

    @property
    def _counts(self) -> float | None:
        """What this rank's gradient counts in the mean; None: one of N. Nothing stays nothing."""
        if self._more == 0 or self._share == 0:
            return self._share
        return (1 / self.collectives.size if self._share is None else self._share) + self._more

    def _start(self) -> None:
        self._open, self._next = True, 0
        self._more = self.more(self.collectives)
        for bucket in self._buckets:
            bucket.renew()
            bucket.waiting = set(range(len(bucket.parameters)))
            bucket.work = bucket.own = None

    def _arrived(self, bucket: Bucket, number: int, parameter: torch.Tensor) -> None:
        """A parameter's gradient is there; buckets leave in one order on every rank."""
        if self._quiet or self._failed is not None:
            return
        with self._lock:
            self._begin()
            if number not in bucket.waiting and bucket.number < self._next:
                shape = tuple(parameter.shape)
                raise RuntimeError(
                    f"a parameter of shape {shape} got a second gradient in one backward pass, after the first was "
                    "sent: use checkpoint(..., use_reentrant=False), or sync.no_sync() round all passes but the last"
                )
            bucket.waiting.discard(number)
            with self._survivable():
                while self._next < len(self._buckets) and not self._buckets[self._next].waiting:
                    self._send_next()

    def _send_next(self) -> None:
        bucket = self._buckets[self._next]
        self._next += 1
        with torch.no_grad():
            bucket.pack()
            bucket.own = self._notes.bucket(bucket.flat) if self._notes is not None else None
            self._send(bucket)

    def _weigh(self, flat: torch.Tensor) -> None:
        """Multiply by this rank's share of N equal ones; a share of zero adds nothing, whatever the values are."""
        counts = self._counts
        if counts == 0:
            flat.zero_()
        elif counts is not None:
            flat.mul_(counts * self.collectives.size)

    def _send(self, bucket: Bucket) -> None:
        via, flat = self.collectives, bucket.flat
        if bucket.last:
            via.begin_overlap()
        if self.on_failure is not None:
            flat = flat.clone()  # this rank's own gradient is kept, to be averaged with those who are left
        self._weigh(flat)
        if self._powersgd is not None:
            self._send_compressed(self._powersgd, bucket)
        elif self.gradient_format == "bf16":
            half = flat.to(torch.bfloat16).div_(via.size)
            bucket.work = half, via.begin_sum_(half, OPERATION)
        else:
            bucket.work = flat, via.begin_sum_(flat.div_(via.size), OPERATION)

    def _send_compressed(self, powersgd: PowerSGDState, bucket: Bucket) -> None:
        via = self.collectives
        before = powersgd.total_numel_after_compression
        compressed = powersgd.iter >= POWERSGD_FROM_STEP
        if compressed:
            bucket.own = None  # what the mean lost would pass for noise
            self._hand_over(powersgd, bucket)
        with via.world.collective(OPERATION):
            # its later collectives begin when its earlier ones end, on Gloo's own threads: with two buckets under way
            # each rank would begin them in an order of its own
            mean = powerSGD_hook(powersgd, bucket).wait()
        if mean.data_ptr() != bucket.flat.data_ptr():
            bucket.flat.copy_(mean)
        sent = powersgd.total_numel_after_compression - before if compressed else bucket.flat.numel()
        via.count_ring(sent * bucket.flat.element_size())

    @torch.no_grad()
    def _end(self) -> None:
        """The backward pass is over: send what is left, wait for all, and hand the means out."""
        with self._lock:
            self._outermost = False
            if not self._open:
                return
            with self._survivable():
                self._exchange()
            failed, self._failed = self._failed, None
            if failed is not None and self.on_failure is not None:
                self._open = False
                self.on_failure(failed)

    def _exchange(self) -> None:
        if self._failed is not None:
            return
        while self._next < len(self._buckets):
            self._send_next()
        total, work = self._used()
        for bucket in self._buckets:
            if bucket.work is not None:
                self.collectives.wait(bucket.work[1], OPERATION)
        self.collectives.wait(work, OPERATION)
        for bucket in self._buckets:
            if bucket.work is not None and bucket.work[0] is not bucket.flat:
                bucket.flat.copy_(bucket.work[0])
        self._finish(total)

    @contextmanager
    def _survivable(self) -> Iterator[None]:
        """Where somebody mends it, a failure is kept to the pass's end: autograd must not be broken off."""
        try:
            yield
        except PeerError as error:
            if self.on_failure is None:
                raise
            self._failed = error

    def again(self) -> None:
        """Average the gradients that are there, once more, with those who are left."""
        with self._lock:
            if self.on:
                self._start()
                self._end()

    def _used(self) -> tuple[torch.Tensor, Any]:
        """Begin to sum `HEAD` over the ranks, and how many have a gradient for each parameter."""
        total = self._flags.clone()
        at = float(16 * self._step + self._pass)
        self._new = self._replica.new_parameters()
        share = 1.0 if self._counts is None else self._counts * self.collectives.size
        head = share, float(self._replica.changed()), float(_fingerprint(self._new)), at, at * at
        total[: len(HEAD)] = torch.tensor(head, dtype=torch.float64)
        start = len(HEAD)
        for bucket in self._buckets:
            if bucket.without:
                total[[start + number for number in bucket.without]] = 0.0
            start += len(bucket.parameters)
        return total, self.collectives.begin_sum_(total, OPERATION)

    def _finish(self, total: torch.Tensor) -> None:
        via = self.collectives
        on_host = total.device.type == "cpu"
        if on_host:  # reading it would make a GPU wait
            self._compare(total)
        if not on_host or float(total[0]) not in (0.0, float(via.size)):
            scale = via.size / total[0].clamp_min(torch.finfo(torch.float32).tiny)
            for bucket in self._buckets:
                bucket.flat.mul_(scale.to(bucket.flat.dtype))
        counts = self._counts
        self.weight = None if counts is None or not on_host else counts * via.size / (float(total[0]) or 1.0)
        self._hand_out(total)
        self._average_new(total)
        self._open, self._averaged = False, True
        self._pass += 1
        if via.clock is not None:
            via.clock.overlap_ends()

    def _compare(self, total: torch.Tensor) -> None:
        """Make sure that all ranks are at one backward pass of one step.

        Raises:
            MismatchError: names every rank's place.
        """
        at, size = float(16 * self._step + self._pass), self.collectives.size
        if total[3:5].tolist() == [size * at, size * at * at]:
            return
        self._open = False
        places = self.collectives.gather({"step": self._step, "pass": self._pass})
        sides = "; ".join(
            f"rank {rank} is at pass {place['pass'] + 1:.0f} of step {place['step'] + 1:.0f} of this phase"
            for rank, place in enumerate(places)
        )
        raise MismatchError(
            f"ranks averaged gradients unequally often: {sides}; run as many backward passes a step on every rank, or "
            "put all but the last inside sync.no_sync()"
        )

    def _hand_out(self, total: torch.Tensor) -> None:
        missing = any(bucket.without for bucket in self._buckets)
        count = len(total) - len(HEAD)
        used = (total[len(HEAD) :] > 0).tolist() if missing else [True] * count
        sparse, start = self._replica.sparse, 0
        for bucket in self._buckets:
            if bucket.own is not None and self._notes is not None:
                self._notes.averaged(bucket.own, bucket.flat)
            bucket.hand_out(used[start : start + len(bucket.parameters)], sparse)
            start += len(bucket.parameters)

    def _average_new(self, total: torch.Tensor) -> None:
        """Average the gradients of parameters that came into the model since, where all ranks have the same ones."""
        if not self._new:
            return
        size = self.collectives.size
        _, changed, new = total[:3].tolist()
        if changed != size or new != size * _fingerprint(self._new):
            return  # they are averaged once the ranks have agreed on them
        for parameter in self._new:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
            self._weigh(gradient)
            parameter.grad = gradient
        self.collectives.mean_(
            [real_view(parameter.grad) for parameter in self._new if parameter.grad is not None], 1 / size
        )

    def join(self) -> bool:
        """Before an update: where no backward pass of this step averaged gradients, take part with what is there.

        Returns:
            Whether this rank only joined in.
        """
        self.recover()
        if not self.on or self._averaged or self._quiet:
            return False
        self._start()
        self._end()
        return True

    def recover(self) -> None:
        """Outside a backward pass: end what one began that was broken off by an error, since the others wait for it."""
        if torch._C._current_graph_task_id() == -1:
            self._outermost = False
            if self._open:
                self._end()

    def end_step(self) -> None:
        """A local step is over."""
        self.recover()
        self._averaged, self._share = False, None
        self._step, self._pass = self._step + 1, 0

    # ---- what compression owes

    def _hand_over(self, powersgd: PowerSGDState, bucket: Bucket) -> None:
        """Let the compressor make good what one before it owed of this bucket, as it first compresses it."""
        if bucket.number in self._compressed:
            return
        self._compressed.add(bucket.number)
        owed = [self._owed.pop(self._places[id(parameter)], None) for parameter in bucket.parameters]
        if any(part is not None for part in owed):
            zeros = (torch.zeros_like(part) for part in bucket.parts)
            error = torch.zeros_like(bucket.flat)
            for place, part, zero in zip(_offsets(bucket), owed, zeros, strict=True):
                error[place] = zero.view(-1) if part is None else part
            powersgd.error_dict[bucket.number] = error

    def _all_owed(self) -> dict[int, torch.Tensor]:
        """Loss of compressed gradients so far, flat, by the parameter's place."""
        owed = dict(self._owed)
        for number, lost in self._powersgd.error_dict.items() if self._powersgd is not None else ():
            bucket = self._buckets[number]
            places = _offsets(bucket)
            owed |= {self._places[id(p)]: lost[place] for p, place in zip(bucket.parameters, places, strict=True)}
        return owed

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, between two steps."""
        kept = None
        if self._powersgd is not None:
            names = set(PowerSGDState.__slots__) - {"rng", "process_group"}
            kept = {name: getattr(self._powersgd, name) for name in sorted(names)}
            kept["rng"] = self._powersgd.rng.get_state()
        return {"owed": self._all_owed(), "powersgd": copy.deepcopy(kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; it is put on afresh after this."""
        self.take_off()
        self._owed, self._restored = dict(state["owed"]), state["powersgd"]


def _fingerprint(parameters: Sequence[torch.Tensor]) -> int:
    """Of their shapes and types; a whole number that a sum over many ranks keeps exactly."""
    return zlib.crc32(repr([(tuple(each.shape), str(each.dtype)) for each in parameters]).encode()) % 2**24


def _offsets(bucket: Bucket) -> list[slice]:
    start, found = 0, []
    for part in bucket.parts:
        found.append(slice(start, start + part.numel()))
        start += part.numel()
    return found


def _buckets(parameters: Sequence[torch.Tensor]) -> list[Bucket]:
    """Parameters from the last to the first, as their gradients come, in buckets of one type and device."""
    groups: list[list[torch.Tensor]] = []
    filling: dict[Any, tuple[list[torch.Tensor], int]] = {}
    for parameter in reversed(parameters):
        kind = (parameter.dtype, parameter.device)
        group, held = filling.get(kind, ([], 0))
        most = FIRST_BUCKET_BYTES if len(groups) <= len(filling) else BUCKET_BYTES
        if not group or held + parameter.nbytes > most:
            group, held = [], 0
            groups.append(group)
        group.append(parameter)
        filling[kind] = (group, held + parameter.nbytes)
    return [_bucket(number, number == len(groups) - 1, group) for number, group in enumerate(groups)]


def _bucket(number: int, last: bool, parameters: list[torch.Tensor]) -> Bucket:
    flat = torch.zeros(
        sum(parameter.numel() for parameter in parameters), dtype=parameters[0].dtype, device=parameters[0].device
    )
    views, parts, start = [], [], 0
    for parameter in parameters:
        part = flat[start : start + parameter.numel()]
        strides = torch.empty_like(parameter, device="meta").stride()
        views.append(flat.as_strided(parameter.shape, strides, start))
        # PowerSGD looks for rows and columns, and knows no numbers without a dimension
        parts.append(part.view(parameter.shape or (1,)) if not part.is_complex() else real_view(part).view(-1))
        start += parameter.numel()
    del part
    bucket = Bucket(number, last, parameters, real_view(flat).view(-1), views, parts)
    del flat, views, parts
    bucket.new_references = bucket.references()
    return bucket
