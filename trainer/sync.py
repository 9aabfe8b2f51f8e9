"""LocalSGD: local steps between averagings, as the controller plans them. The library's front door."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainer.clock import Clock
from trainer.collectives import Collectives
from trainer.config import SyncConfig
from trainer.controller import Controller, Phase
from trainer.data import ShardStream
from trainer.ledger import Ledger, compare, reduce
from trainer.plan import Observation, Plan
from trainer.policies import Policy
from trainer.replica import Replica, recalibrate
from trainer.world import World


@dataclass(frozen=True)
class Round:
    """What the ranks told one another at a round's end."""

    seen: Observation
    phase: Phase
    """The phase that this round belonged to."""
    next_phase: Phase | None
    """The phase that begins after it, where one does."""
    skipped_in_a_row: int
    """The most local steps that any rank has now skipped one after another."""


class LocalSGD:
    """Local SGD under a synchronization controller, in a loop of the user's own.

    Inside the `with` block every rank starts from rank 0's model. `model` is what to call: while the Plan's period is
    1 its gradients are averaged during the backward pass (DDP); while it is longer nothing is sent until `step` has
    counted a round's local steps and averages the parameters, weighted by samples.

        policy = Alternating(small=Plan(32, sync_period_steps=16), large=Plan(256, sync_period_steps=1))
        with LocalSGD(model, optimizer, policy) as sync:
            for x, y in sync.batches(dataset):
                optimizer.zero_grad()
                loss = loss_fn(sync.model(x), y); loss.backward()
                optimizer.step(); sync.step(loss)

    Args:
        model: on its device, before any DDP wrapper.
        optimizer: over the model's parameters; its learning rates are scaled during `optimizer.step()` only, so any
            scheduler may set them.
        policy: the rule that plans batch and period.
        settings: what is averaged, and how.
        world: this rank among all; by default the process group that is there, else a world of one.
        clock: where waits are counted.
        scaler: the loss scaler of a loop in fp16, which must be one on all ranks at period 1.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        policy: Policy,
        *,
        settings: SyncConfig = SyncConfig(),  # noqa: B008  # frozen
        world: World | None = None,
        clock: Clock | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        device = next(model.parameters()).device
        self.world = world or World.current(device)
        self.clock = clock or Clock(device)
        self.settings = settings
        self.optimizer = optimizer
        self.scaler = scaler
        self.collectives = Collectives(self.world, self.clock, settings.bucket_bytes)
        self.replica = Replica(model, optimizer, self.collectives)
        self.controller = Controller(policy)
        self.local_step = 0
        self.rounds = 0
        self.stopping = False
        self._stop_asked = False
        self._agreed_samples = 0  # trained by all ranks up to the last observation
        self._round_steps = 0
        self._find_unused = settings.find_unused_parameters
        self._ledger = Ledger(device)
        self._accuracy = math.nan
        self._batch_samples: int | None = None
        self._parallel: DistributedDataParallel | None = None
        self._hooks: list[Any] = []
        self._lrs: list[float] = []

    # ---- entering and leaving

    def __enter__(self) -> LocalSGD:
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._scale_lr),
            self.optimizer.register_step_post_hook(self._restore_lr),
        ]
        self.replica.make_one()
        self.rewrap()
        self.clock.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.clock.stop()
            self._unwrap()
            for hook in self._hooks:
                hook.remove()

    # ---- what the loop reads

    @property
    def model(self) -> nn.Module:
        """What to call in the forward pass; ask for it at every step, since a new Plan may change it."""
        return self._parallel or self.replica.model

    @property
    def plan(self) -> Plan:
        """What the current round does."""
        return self.controller.plan

    @property
    def samples(self) -> int:
        """Samples trained so far, over all ranks."""
        return self._agreed_samples + self._ledger.samples * self.world.size

    @property
    def lr_scale(self) -> float:
        """The factor that the next `optimizer.step()` puts on the learning rate."""
        return self.controller.lr_scale(self.samples)

    def batches(self, dataset: Any, samples: int | None = None, *, seed: int = 0) -> Iterator[tuple[Any, Any]]:
        """This rank's shard in batches of the planned size, until all ranks together have trained `samples`.

        Args:
            dataset: anything with a length and items (input, label), or a ShardStream of this rank's shard.
            samples: where to stop, counted from the beginning of the run; by default one pass over the data set.
            seed: of the sharding and the order.
        """
        stream = dataset
        if not isinstance(dataset, ShardStream):
            stream = ShardStream.of(dataset, self.world, seed=seed)
        total = samples if samples is not None else len(dataset)
        while self.samples < total and not self.stopping:
            share = -(-(total - self.samples) // self.world.size)
            with self.clock.waiting("input_wait"):
                batch = stream.take(min(self.plan.batch_per_rank, share))
            self._batch_samples = len(batch[1])
            yield batch

    def no_sync(self) -> AbstractContextManager[None]:
        """For all but the last of the micro-batches that make up a local step: gradients stay on this rank."""
        return self._parallel.no_sync() if self._parallel is not None else nullcontext()

    # ---- one local step

    def all_finite(self, loss: torch.Tensor) -> Callable[[], bool]:
        """Begin to agree whether this step's loss is finite; call the answer after the backward pass.

        Inside a longer period each rank answers for itself, without a message; at period 1 a gradient is everybody's,
        so one rank's bad loss makes every rank skip.
        """
        if self._parallel is None:
            return lambda: math.isfinite(loss.item())
        vote = self.collectives.begin_sum(loss)

        def answer() -> bool:
            self.clock.overlap_ends()  # the backward pass, which this follows, has waited for the last gradient
            return math.isfinite(self.collectives.end_sum(vote))

        return answer

    def step(self, loss: torch.Tensor, samples: int | None = None, *, skipped: bool = False) -> Round | None:
        """Count one local step; at a round's end average, decide, and enter the next round's Plan.

        Args:
            loss: this step's mean loss on this rank (0-dim).
            samples: trained in this step by this rank; known already for batches of `batches`.
            skipped: the optimizer was not stepped; the step counts all the same, on every rank.

        Returns:
            The Round that ended, where ranks compared what they saw: after every averaging, and at period 1 every
            `observe_steps` steps; else None.
        """
        self.clock.overlap_ends()
        count = samples if samples is not None else self._batch_samples
        if count is None:
            raise ValueError("samples = None: pass sync.step(loss, samples=...) for batches of a loader of your own")
        self._batch_samples = None
        self.local_step += 1
        self._round_steps += 1
        self._ledger.count(loss, count, skipped=skipped)
        if self._round_steps < self.plan.sync_period_steps:
            return None
        self._end_round()
        often = self.plan.sync_period_steps == 1 and self._ledger.steps < self.settings.observe_steps
        return None if often else self._observe()

    @property
    def between_rounds(self) -> bool:
        """Whether the replicas are one model now."""
        return self._round_steps == 0

    def finish(self) -> Round | None:
        """End the open round early, so that the replicas are one model; the Round, where anything was left to tell."""
        if not self.between_rounds:
            self._end_round()
        return self._observe() if self._ledger.steps else None

    def ask_to_stop(self) -> None:
        """Make all ranks stop at the next observation: `batches` ends on each, and `stopping` is true."""
        self._stop_asked = True

    @contextmanager
    def consensus(self, calibration: Iterable[torch.Tensor] = ()) -> Iterator[nn.Module]:
        """The consensus model, in evaluation mode and the same on every rank; ends the open round first.

        Args:
            calibration: inputs of this rank for `batch_norm = recalibrate`.
        """
        self.finish()
        model = self.replica.model
        keep = self.replica.float_buffers if self.settings.batch_norm == "keep" else []
        own = [buffer.clone() for buffer in keep]
        if self.settings.batch_norm == "recalibrate":
            recalibrate(model, calibration)
        self.replica.average_buffers(1 / self.world.size)
        training = model.training
        model.eval()
        try:
            yield model
        finally:
            model.train(training)
            for buffer, value in zip(keep, own, strict=True):
                buffer.copy_(value)

    def saw_accuracy(self, accuracy: float) -> None:
        """Tell the policy an evaluation's result (the same number on every rank)."""
        self._accuracy = accuracy

    # ---- a round's end

    def _end_round(self) -> None:
        self.rounds += 1
        self._round_steps = 0

    def _observe(self) -> Round:
        """Compare, average, decide: the same on every rank."""
        headers = self.collectives.gather(self._header())
        compare(headers, ("round", "step", "batch", "period", "lr_scale"))
        if self.plan.sync_period_steps == 1 and len({header["samples"] for header in headers}) > 1:
            warnings.warn(
                "ranks trained different numbers of samples at period 1, where gradients are averaged with equal "
                "weights: give every rank batches of one size, or drop the last",
                stacklevel=3,
            )
        seen, phase = reduce(headers, self._agreed_samples, self._accuracy), self.controller.phase
        layouts = {header["layout"] for header in headers}
        if self.plan.sync_period_steps > 1:
            trained = sum(header["samples"] for header in headers)
            weight = headers[self.world.rank]["samples"] / trained if trained else 1 / self.world.size
            buffers = self.settings.batch_norm == "average"
            self.replica.average(weight, state=self.settings.state, buffers=buffers, same_layout=len(layouts) == 1)
        changed = self.controller.observe(seen)
        self._agreed_samples = seen.samples
        self.stopping = any(header["stop"] for header in headers)
        if changed:
            self._find_unused |= any(header["no_gradient"] for header in headers)
            self._enter_plan()
        self._ledger.begin(self.clock.read())
        in_a_row = int(max(header["in_a_row"] for header in headers))
        return Round(seen, phase, self.controller.phase if changed else None, in_a_row)

    def _header(self) -> dict[str, float]:
        return {
            "round": self.rounds,
            "step": self.local_step,
            "batch": self.plan.batch_per_rank,
            "period": self.plan.sync_period_steps,
            "lr_scale": self.plan.lr_scale,
            "stop": self._stop_asked,
            "no_gradient": self.replica.without_gradient(),
            "layout": self.replica.layout_digest(),
            **self._ledger.header(self.clock.read()),
        }

    def _enter_plan(self) -> None:
        """Period 1 needs one optimizer state and one loss scale on all ranks."""
        if self.plan.sync_period_steps > 1:
            self._unwrap()
        elif self._parallel is None:
            if self.settings.state == "keep":  # else it was averaged or reset with the parameters
                self.replica.average_state(1 / self.world.size)
            if self.scaler is not None and self.scaler.is_enabled():
                scales = self.collectives.gather(self.scaler.state_dict())
                own = self.scaler.state_dict()  # the scale, and the steps since it last grew: the smallest of each
                self.scaler.load_state_dict({n: type(v)(min(scale[n] for scale in scales)) for n, v in own.items()})
            self.rewrap()

    def rewrap(self) -> None:
        """Put DDP round the model while the period is 1, and only then: its buckets are a gradient's worth of memory.

        A fresh wrapper begins with the same buckets wherever it is made, so a run that rewraps at a checkpoint goes on
        bit for bit as one that is resumed from it.
        """
        self._unwrap()
        if self.plan.sync_period_steps > 1 or self.world.size == 1:
            return
        with warnings.catch_warnings():
            # the name that every torch since 2.10 knows, and the only one that syncs no buffer here
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            self._parallel = DistributedDataParallel(
                self.replica.model,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
                find_unused_parameters=self._find_unused,
                init_sync=False,
            )
        self._parallel.register_comm_hook(None, self.collectives.gradient_hook)

    def _unwrap(self) -> None:
        self._parallel = None

    # ---- the learning rate follows the batch

    def _scale_lr(self, optimizer: Optimizer, *_: Any) -> None:
        self.clock.overlap_ends()
        scale = self.lr_scale
        self._lrs = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * scale

    def _restore_lr(self, optimizer: Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._lrs, strict=True):
            group["lr"] = lr

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The place within round and phase, for a checkpoint; model and optimizer are saved by their owners."""
        return {
            "local_step": self.local_step,
            "rounds": self.rounds,
            "agreed_samples": self._agreed_samples,
            "round_steps": self._round_steps,
            "ledger": self._ledger.state_dict(),
            "accuracy": self._accuracy,
            "find_unused": self._find_unused,
            "controller": self.controller.state_dict(),
            "sent_bytes": self.collectives.sent_bytes,
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: called inside the `with` block, once model and optimizer are loaded."""
        self.local_step, self.rounds = state["local_step"], state["rounds"]
        self._agreed_samples, self._round_steps = state["agreed_samples"], state["round_steps"]
        self._ledger.load_state_dict(state["ledger"])
        self._accuracy, self._find_unused = state["accuracy"], state["find_unused"]
        self.controller.load_state_dict(state["controller"])
        self.collectives.sent_bytes = state["sent_bytes"]
        self.clock.load_state_dict(state["clock"])
        self.rewrap()
