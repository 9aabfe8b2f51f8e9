"""Every collective of training: counted in bytes, timed, and an error that names itself when a peer is gone."""

from __future__ import annotations

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
        self.group = group
        self.size = dist.get_world_size(group) if world.size > 1 else 1
        self.rank = dist.get_rank(group) if world.size > 1 else 0
        self.within: Collectives | None = None
        """The ranks of this rank's node, where averages have two levels."""
        self.between: Collectives | None = None
        """The ranks of this rank's place on every node."""
        self._sent_bytes = 0.0

    def add_levels(self, within: dist.ProcessGroup, between: dist.ProcessGroup) -> None:
        """Have averages in two levels."""
        self.within, self.between = (
            Collectives(self.world, self.clock, self.bucket_bytes, group) for group in (within, between)
        )

    @property
    def sent_bytes(self) -> float:
        """Bytes that this rank has sent, in all levels."""
        return self._sent_bytes + sum(level.sent_bytes for level in (self.within, self.between) if level is not None)

    @sent_bytes.setter
    def sent_bytes(self, total: float) -> None:
        self._sent_bytes += total - self.sent_bytes

    def mean_(self, tensors: Sequence[torch.Tensor], weight: float) -> None:
        """Replace each tensor by its mean over the ranks, in place; `weight` is this rank's share (they sum to 1)."""
        self._exchange(
            "averaging", tensors, lambda flat: dist.all_reduce(flat.mul_(weight), group=self.group, async_op=True)
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
                work.wait()
                for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                    if tensor.data_ptr() != part.data_ptr():
                        tensor.copy_(part.view(tensor.shape))

    def gather(self, numbers: Mapping[str, float]) -> list[dict[str, float]]:
        """Every rank's numbers, by rank; exact for whole numbers below 2**53. All ranks pass the same names."""
        if self.size == 1:
            return [{name: float(number) for name, number in numbers.items()}]
        with self._waiting(), self.world.collective("comparing ranks"):
            mine = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.world.device)
            everyone = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(everyone, mine, self.group)
            self._sent_bytes += mine.nbytes * (self.size - 1)
            return [dict(zip(numbers, theirs.tolist(), strict=True)) for theirs in everyone]

    def gather_objects(self, thing: Any) -> list[Any]:
        """Every rank's object, by rank: for rare and small ones."""
        if self.size == 1:
            return [thing]
        everyone = [None] * self.size
        with self._waiting(), self.world.collective("comparing layouts"):
            dist.all_gather_object(everyone, thing, self.group)
        return everyone

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
            with self.world.collective("summing the loss"):
                work.wait()
        return float(total.item())

    def begin_sum_(self, values: torch.Tensor) -> Any:
        """Start replacing a flat tensor by its sum over the ranks, in place; `wait` for it before it is read."""
        if self.size == 1:
            return None
        self.count_ring(values.nbytes)
        with self.world.collective("averaging"):
            return dist.all_reduce(values, group=self.group, async_op=True)

    def begin_all_to_all(self, received: torch.Tensor, sent: torch.Tensor) -> Any:
        """Start sending row k of `sent` (N, bytes) to rank k, and receiving its row for this rank in `received`."""
        if self.size == 1:
            received.copy_(sent)
            return None
        self._sent_bytes += sent.nbytes * (self.size - 1) / self.size
        with self.world.collective("averaging"):
            return dist.all_to_all_single(received, sent, group=self.group, async_op=True)

    def begin_all_gather(self, gathered: torch.Tensor, mine: torch.Tensor) -> Any:
        """Start collecting every rank's `mine` (1, bytes) as the rows of `gathered` (N, bytes)."""
        if self.size == 1:
            gathered.copy_(mine)
            return None
        self._sent_bytes += mine.nbytes * (self.size - 1)
        with self.world.collective("averaging"):
            return dist.all_gather(list(gathered.tensor_split(self.size)), mine, self.group, async_op=True)

    def begin_swap(self, received: torch.Tensor, sent: torch.Tensor) -> Any:
        """Start sending `sent` (bytes,) to the other of two ranks, and receiving the other's in `received`."""
        assert self.size == 2
        self._sent_bytes += sent.nbytes
        sizes = [0, 0]
        sizes[1 - self.rank] = len(sent)
        with self.world.collective("averaging"):
            return dist.all_to_all_single(received, sent, sizes, sizes, group=self.group, async_op=True)

    def wait(self, work: Any) -> None:
        """Wait for what one of the `begin_` calls above started."""
        if work is not None:
            with self.world.collective("averaging"):
                work.wait()

    def begin_overlap(self) -> None:
        """The compute that hides communication is over: what is waited from here on is exposed."""
        if self.clock is not None:
            self.clock.overlap_begins()

    def count_ring(self, nbytes: float) -> None:
        """Count a buffer that a ring all-reduces."""
        self._sent_bytes += 2 * (self.size - 1) / self.size * nbytes

    def _waiting(self) -> AbstractContextManager[None]:
        return nullcontext() if self.clock is None else self.clock.waiting("sync_wait")

    def _buckets(self, tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Tensors in order, in lists of one dtype and device and of at most `bucket_bytes` (or one larger tensor)."""
        filling: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
        for tensor in tensors:
            kind = (tensor.dtype, tensor.device)
            bucket = filling.setdefault(kind, [])
            if bucket and sum(held.nbytes for held in bucket) + tensor.nbytes > self.bucket_bytes:
                yield filling.pop(kind)
                bucket = filling.setdefault(kind, [])
            bucket.append(tensor)
        yield from filling.values()

    def _flat(self, bucket: Sequence[torch.Tensor]) -> torch.Tensor:
        """One buffer that NCCL or Gloo can send, the tensor itself where that is flat: also of state on the CPU."""
        if len(bucket) == 1 and bucket[0].dim() == 1 and bucket[0].is_contiguous():
            return bucket[0].to(self.world.device)
        return torch.cat([tensor.reshape(-1) for tensor in bucket]).to(self.world.device)
