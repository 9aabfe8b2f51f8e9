"""Every collective of training: counted in bytes, timed, and an error that names itself when a peer is gone."""

# Annotations are evaluated in this file: DDP checks those of its communication hook.

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # compiled, and not listed

from trainer.clock import Clock
from trainer.world import World

Vote = tuple[torch.Tensor, Any]


class Collectives:
    """Collectives of one world. In a world of one each is the identity and sends nothing.

    `sent_bytes` counts what this rank sends: 2 (N - 1) / N of an all-reduced buffer (a ring), N - 1 of a gathered one.
    """

    def __init__(self, world: World, clock: Clock, bucket_bytes: int) -> None:
        self.world = world
        self.clock = clock
        self.bucket_bytes = bucket_bytes
        self.sent_bytes = 0.0

    def mean_(self, tensors: Sequence[torch.Tensor], weight: float) -> None:
        """Replace each tensor by its mean over the ranks, in place; `weight` is this rank's share (they sum to 1)."""
        self._exchange("averaging", tensors, lambda flat: dist.all_reduce(flat.mul_(weight), async_op=True))

    def max_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its elementwise largest over the ranks, in place (integer counters)."""
        self._exchange(
            "comparing counters", tensors, lambda flat: dist.all_reduce(flat, dist.ReduceOp.MAX, async_op=True)
        )

    def broadcast_(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give every rank rank 0's values, in place; counted as a ring's share on every rank."""
        self._exchange("broadcast", tensors, lambda flat: dist.broadcast(flat, src=0, async_op=True))

    def _exchange(self, operation: str, tensors: Sequence[torch.Tensor], send: Callable[[torch.Tensor], Any]) -> None:
        """Send tensors in flat buckets of one dtype, and take what comes of them, in place.

        All ranks pass the same shapes in the same order. While one bucket is under way the next is packed.
        """
        if self.world.size == 1:
            return
        with self.clock.waiting("sync_wait"), self.world.collective(operation), torch.no_grad():
            sent = []
            for bucket in self._buckets(tensors):
                flat = self._flat(bucket)
                self.sent_bytes += self._ring(flat)
                sent.append((bucket, flat, send(flat)))
            for bucket, flat, work in sent:
                work.wait()
                for tensor, part in zip(bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def gather(self, numbers: Mapping[str, float]) -> list[dict[str, float]]:
        """Every rank's numbers, by rank; exact for whole numbers below 2**53. All ranks pass the same names."""
        if self.world.size == 1:
            return [{name: float(number) for name, number in numbers.items()}]
        with self.clock.waiting("sync_wait"), self.world.collective("comparing ranks"):
            mine = torch.tensor(list(numbers.values()), dtype=torch.float64, device=self.world.device)
            everyone = [torch.empty_like(mine) for _ in range(self.world.size)]
            dist.all_gather(everyone, mine)
            self.sent_bytes += mine.nbytes * (self.world.size - 1)
            return [dict(zip(numbers, theirs.tolist(), strict=True)) for theirs in everyone]

    def gather_objects(self, thing: Any) -> list[Any]:
        """Every rank's object, by rank: for rare and small ones."""
        if self.world.size == 1:
            return [thing]
        everyone = [None] * self.world.size
        with self.clock.waiting("sync_wait"), self.world.collective("comparing layouts"):
            dist.all_gather_object(everyone, thing)
        return everyone

    def begin_sum(self, number: torch.Tensor) -> Vote:
        """Start summing a scalar over the ranks while this rank goes on; `end_sum` has the result."""
        total = number.detach().clone()
        if self.world.size == 1:
            return total, None
        self.sent_bytes += self._ring(total)
        with self.world.collective("summing the loss"):
            return total, dist.all_reduce(total, async_op=True)

    def end_sum(self, vote: Vote) -> float:
        """The sum that `begin_sum` started."""
        total, work = vote
        if work is not None:
            with self.world.collective("summing the loss"):
                work.wait()
        return float(total.item())

    def gradient_hook(self, _: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's communication hook: DDP's own average, with its bytes counted and the end of the compute noted."""
        self.sent_bytes += self._ring(bucket.buffer())
        if bucket.is_last():
            self.clock.overlap_begins()
        buffer = bucket.buffer().div_(self.world.size)
        return dist.all_reduce(buffer, async_op=True).get_future().then(self._averaged)

    def _averaged(self, reduced: torch.futures.Future[list[torch.Tensor]]) -> torch.Tensor:
        with self.world.collective("averaging gradients"):
            return reduced.value()[0]

    def _ring(self, buffer: torch.Tensor) -> float:
        return 2 * (self.world.size - 1) / self.world.size * buffer.nbytes

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
        """One buffer that NCCL or Gloo can send: also of state that an optimizer keeps on the CPU."""
        return torch.cat([tensor.reshape(-1) for tensor in bucket]).to(self.world.device)
