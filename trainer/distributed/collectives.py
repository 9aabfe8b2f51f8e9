"""Every collective of training: counted in bytes, timed, and an error that names itself when a peer is gone."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.clock import Clock
from trainer.distributed.world import World

Vote = tuple[torch.Tensor, Any]


class Collectives:
    """Collectives of one world. In a world of one each is the identity and sends nothing.

    `sent_bytes` counts what this rank sends: 2 (N - 1) / N of an all-reduced buffer (a ring), N - 1 of a gathered one.

    Args:
        world: this rank among all.
        clock: where waits are counted; None: nowhere, they are hidden.
        bucket_bytes: of one collective at most, unless a tensor is larger.
        group: the ranks that take part; by default all of the world.
    """

    def __init__(
        self, world: World, clock: Clock | None, bucket_bytes: int, group: dist.ProcessGroup | None = None
    ) -> None:
        self.world = world
        self.clock = clock
        self.bucket_bytes = bucket_bytes
        self._take(world, group)
        self.within: Collectives | None = None
        """The ranks of this rank's node, where averages have two levels."""
        self.between: Collectives | None = None
        """The ranks of this rank's place on every node."""
        self._for_gradients: Collectives | None = None
        self._sent_nths = 0
        """Bytes sent, in parts of 1 / `size` of one: whole numbers, whose sums are exact in any order."""

    def _take(self, world: World, group: dist.ProcessGroup | None) -> None:
        self.world = world
        self.group = group if group is not None else world.group
        alone = world.size == 1
        if world.members is not None:  # its groups are none that torch has a register of
            self.size, self.rank = world.size, world.rank
        else:
            self.size = 1 if alone else dist.get_world_size(self.group)
            self.rank = 0 if alone else dist.get_rank(self.group)

    def regroup(self, world: World) -> None:
        """Go on in another world, in groups of its own."""
        sent_bytes, self._for_gradients = self.sent_bytes, None
        self._take(world, None)
        self._sent_nths = round(sent_bytes * self.size)

    def add_levels(self, within: dist.ProcessGroup, between: dist.ProcessGroup) -> None:
        """Have averages in two levels."""
        self.within, self.between = (
            Collectives(self.world, self.clock, self.bucket_bytes, group) for group in (within, between)
        )

    def for_gradients(self) -> Collectives:
        """Collectives of the same ranks in a group of their own; every rank calls it.

        A rank that ends its loop early then never meets another's gradients with a message of another size: both wait,
        and what it says on the board ends that.
        """
        if self.size > 1 and self._for_gradients is None:
            self._for_gradients = Collectives(self.world, self.clock, self.bucket_bytes, self.world.new_group())
        return self._for_gradients or self

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank has sent, in all levels."""
        nths = self._sent_nths + (0 if self._for_gradients is None else self._for_gradients._sent_nths)
        return nths / self.size + sum(level.sent_bytes for level in (self.within, self.between) if level is not None)

    @sent_bytes.setter
    def sent_bytes(self, total: float) -> None:
        self._sent_nths += round((total - self.sent_bytes) * self.size)

    def mean_(self, tensors: Sequence[torch.Tensor], weight: float) -> None:
        """Replace each tensor by its mean over the ranks, in place; `weight` is this rank's share (they sum to 1)."""
        self._exchange(
            "averaging",
            tensors,
            lambda flat: dist.all_reduce(
                flat.mul_(weight) if weight else flat.zero_(),  # whatever the values are, nothing is added
                group=self.group,
                async_op=True,
            ),
        )

    def max_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its elementwise largest over the ranks, in place (integer counters)."""
        self._exchange(
            "comparing counters",
            tensors,
            lambda flat: dist.all_reduce(flat, dist.ReduceOp.MAX, self.group, async_op=True),
        )

    def broadcast_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every rank rank 0's values, in place; counted as a ring's share on every rank."""
        self._exchange(
            "broadcast", tensors, lambda flat: dist.broadcast(flat, group=self.group, async_op=True, group_src=0)
        )

    def _exchange(self, operation: str, tensors: Sequence[torch.Tensor], send: Callable[[torch.Tensor], Any]) -> None:
        """Send tensors in flat buckets of one dtype, and take what comes of them, in place.

        All ranks pass the same shapes in the same order. While one bucket is under way the next is packed.
        """
        if self.size == 1:
            return
        with self._waiting(), self.world.collective(operation), torch.no_grad():
            sent = []
            for bucket in self._buckets(tensors):
                flat = self._flat(bucket)
                self.count_ring(flat.nbytes)
                sent.append((bucket, flat, send(flat)))
            for bucket, flat, work in sent:
                self.world.wait(work, operation)
                for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                    if tensor.data_ptr() != part.data_ptr():
                        tensor.copy_(part.view(tensor.shape))

    def share(self, sums: Sequence[float], mosts: Sequence[float], own: float) -> tuple[list[float], list[float], Any]:
        """The sums and the largest of all ranks' numbers, and every rank's `own`, by rank; one message.

        All ranks pass as many numbers. What it costs does not grow with the ranks, but for `own`.
        """
        if self.size == 1:
            return [*map(float, sums)], [*map(float, mosts)], [float(own)]
        total, most, mine = (self._numbers(each) for each in (sums, mosts, [own]))
        everyone = mine.new_empty(self.size)
        operation = "comparing rounds"
        with self._waiting(), self.world.collective(operation):
            works = [
                dist.all_reduce(total, group=self.group, async_op=True),
                dist.all_reduce(most, dist.ReduceOp.MAX, self.group, async_op=True),
                dist.all_gather(list(everyone.tensor_split(self.size)), mine, self.group, async_op=True),
            ]
            for work in works:
                self.world.wait(work, operation)
        self.count_ring(total.nbytes + most.nbytes)
        self._sent_nths += mine.nbytes * (self.size - 1) * self.size
        return total.tolist(), most.tolist(), everyone.cpu().numpy()

    def _numbers(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=self.world.device)

    def sum_numbers(self, numbers: Sequence[float]) -> list[float]:
        """The sums of all ranks' numbers."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def most_numbers(self, numbers: Sequence[float]) -> list[float]:
        """The largest of all ranks' numbers, one by one."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def _reduced(self, numbers: Sequence[float], by: Any) -> list[float]:
        if self.size == 1:
            return [*map(float, numbers)]
        total, operation = self._numbers(numbers), "comparing numbers"
        with self._waiting(), self.world.collective(operation):
            self.world.wait(dist.all_reduce(total, by, self.group, async_op=True), operation)
        self.count_ring(total.nbytes)
        return total.tolist()

    def gather(self, numbers: Mapping[str, float]) -> list[dict[str, float]]:
        """Every rank's numbers, by rank; exact for whole numbers below 2**53. All ranks pass the same names."""
        if self.size == 1:
            return [{name: float(number) for name, number in numbers.items()}]
        mine = self._numbers(list(numbers.values()))
        rows = self._gathered(mine, "gathering numbers")
        self._sent_nths += mine.nbytes * (self.size - 1) * self.size
        return [dict(zip(numbers, row, strict=True)) for row in rows.tolist()]

    def gather_objects(self, thing: Any) -> list[Any]:
        """Every rank's object, by rank: for rare and small ones, whose bytes are not counted."""
        if self.size == 1:
            return [thing]
        packed = torch.frombuffer(bytearray(pickle.dumps(thing)), dtype=torch.uint8).to(self.world.device)
        operation = "gathering layouts"
        sizes = self._gathered(torch.tensor([len(packed)], device=self.world.device), operation).view(-1).tolist()
        padded = packed.new_zeros(max(sizes))
        padded[: len(packed)] = packed
        rows = self._gathered(padded, operation).cpu()
        return [pickle.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]

    def object_of_first(self, make: Callable[[], Any]) -> Any:
        """What rank 0 makes, on every rank; its bytes are not counted."""
        if self.size == 1:
            return make()
        first, operation = self.rank == 0, "sending state"
        packed = torch.frombuffer(bytearray(pickle.dumps(make() if first else None)), dtype=torch.uint8)
        size = torch.tensor([len(packed)])
        with self._waiting(), self.world.collective(operation):
            self.world.wait(dist.broadcast(size, group=self.group, async_op=True, group_src=0), operation)
            taken = packed if first else torch.empty(int(size), dtype=torch.uint8)
            self.world.wait(dist.broadcast(taken, group=self.group, async_op=True, group_src=0), operation)
        return pickle.loads(taken.numpy().tobytes())

    def _gathered(self, mine: torch.Tensor, operation: str) -> torch.Tensor:
        """Every rank's 1-d tensor, as rows."""
        rows = mine.new_empty(self.size, len(mine))
        with self._waiting(), self.world.collective(operation):
            self.world.wait(dist.all_gather([*rows], mine, self.group, async_op=True), operation)
        return rows

    def begin_sum(self, number: torch.Tensor) -> Vote:
        """Start summing a scalar over the ranks while this rank goes on; `end_sum` has the result."""
        total = number.detach().clone()
        if self.size == 1:
            return total, None
        self.count_ring(total.nbytes)
        with self.world.collective("summing the loss"):
            return total, dist.all_reduce(total, group=self.group, async_op=True)

    def end_sum(self, vote: Vote) -> float:
        """The sum that `begin_sum` started."""
        total, work = vote
        if work is not None:
            self.world.wait(work, "summing the loss")
        return float(total.item())

    def begin_sum_(self, values: torch.Tensor, operation: str = "averaging") -> Any:
        """Start replacing a flat tensor by its sum over the ranks, in place; `wait` for it before it is read."""
        if self.size == 1:
            return None
        self.count_ring(values.nbytes)
        with self.world.collective(operation):
            return dist.all_reduce(values, group=self.group, async_op=True)

    def begin_all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> Any:
        """Start sending row k of `sent` (N, bytes) to rank k, and receiving its row for this rank in `received`."""
        if self.size == 1:
            received.copy_(sent)
            return None
        self._sent_nths += sent.nbytes * (self.size - 1)
        with self.world.collective("averaging"):
            return dist.all_to_all_single(received, sent, group=self.group, async_op=True)

    def begin_all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> Any:
        """Start collecting every rank's `mine` (1, bytes) as the rows of `gathered` (N, bytes)."""
        if self.size == 1:
            gathered.copy_(mine)
            return None
        self._sent_nths += mine.nbytes * (self.size - 1) * self.size
        with self.world.collective("averaging"):
            return dist.all_gather(list(gathered.tensor_split(self.size)), mine, self.group, async_op=True)

    def begin_swap(self, received: torch.Tensor, sent: torch.Tensor) -> Any:
        """Start sending `sent` (bytes,) to the other of two ranks, and receiving the other's in `received`."""
        assert self.size == 2
        self._sent_nths += sent.nbytes * self.size
        sizes = [0, 0]
        sizes[1 - self.rank] = len(sent)
        with self.world.collective("averaging"):
            return dist.all_to_all_single(received, sent, sizes, sizes, group=self.group, async_op=True)

    def wait(self, work: Any, operation: str = "averaging") -> None:
        """Wait for what one of the `begin_` calls above started."""
        if work is not None:
            self.world.wait(work, operation)

    def begin_overlap(self) -> None:
        """The compute that hides communication is over: what is waited from here on is exposed."""
        if self.clock is not None:
            self.clock.overlap_begins()

    def count_ring(self, nbytes: float) -> None:
        """Count a buffer that a ring all-reduces."""
        self._sent_nths += 2 * (self.size - 1) * round(nbytes)

    def _waiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.clock is None else self.clock.waiting("sync_wait")

    def _buckets(self, tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Tensors in order, in lists of one dtype and device and of at most `bucket_bytes` (or one larger tensor)."""
        filling: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        filled: dict[tuple[torch.dtype, torch.device], int] = {}
        for tensor in tensors:
            kind = (tensor.dtype, tensor.device)
            if filling.get(kind) and filled[kind] + tensor.nbytes > self.bucket_bytes:
                yield filling.pop(kind)
            bucket = filling.setdefault(kind, [])
            filled[kind] = tensor.nbytes + (filled[kind] if bucket else 0)
            bucket.append(tensor)
        yield from filling.values()

    def _flat(self, bucket: Sequence[torch.Tensor]) -> torch.Tensor:
        """One buffer that NCCL or Gloo can send, the tensor itself where that is flat: also of state on the CPU."""
        if len(bucket) == 1 and bucket[0].dim() == 1 and bucket[0].is_contiguous():
            return bucket[0].to(self.world.device)
        return torch.cat([tensor.reshape(-1) for tensor in bucket]).to(self.world.device)
