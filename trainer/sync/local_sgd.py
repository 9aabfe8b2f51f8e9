"""LocalSGD: local steps between averagings, as the controller plans them. The library's front door."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.config.sync import SyncConfig, check_plans, check_scaler
from trainer.control.controller import Controller
from trainer.control.reports import compare
from trainer.control.rounds import Round, Rounds
from trainer.data.planned import PlannedBatches, Uneven
from trainer.distributed.clock import Clock
from trainer.distributed.collectives import Collectives
from trainer.distributed.world import World
from trainer.plan import Plan
from trainer.policies import Policy
from trainer.sync.averager import Averager
from trainer.sync.consensus import consensus_model
from trainer.sync.early_end import EarlyEnd
from trainer.sync.feed import Batches, Feed, Options
from trainer.sync.gradient_average import GradientAverage
from trainer.sync.progress import Progress
from trainer.sync.replica import Replica
from trainer.sync.scaled_rate import ScaledRate
from trainer.sync.timetable import Timetable
from trainer.sync.transition import Transition


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

    With `delay_steps` a round's average is exchanged beside the next round's local steps, and what it tells the
    controller changes the Plan at the next round's end.

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
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        check_plans(settings, policy.plans())
        check_scaler(settings, used=self._scaler is not None)
        device = next(model.parameters()).device
        self.world = world or World.current(device)
        if settings.ranks_per_node is not None:
            self.world = self.world.with_nodes_of(settings.ranks_per_node)
        self.clock = clock or Clock(device)
        self.settings = settings
        self.optimizer = optimizer
        self.collectives = Collectives(self.world, self.clock, settings.bucket_bytes)
        self.replica = Replica(model, optimizer, self.collectives)
        self.controller = Controller(policy)
        self._averager = Averager(self.replica, settings, self.collectives, self.clock)
        self._parallel = GradientAverage(model, settings.gradient_format)
        self._told = Rounds(self.controller)
        self._progress = Progress(self.replica, self._told, self.collectives, self.clock, settings.observe_steps)
        self._early = EarlyEnd(self.replica, self._progress.notes, self.collectives)
        self._timetable = Timetable(self._averager, settings, self._told, self._progress)
        self._transition = Transition(
            self.replica, self._averager, self._timetable, self._parallel, self._progress.notes, settings, self._scaler
        )
        self._feed = Feed(
            self._told, self._progress, self.collectives, self.clock, self._parallel, settings.observe_steps
        )
        self._rate = ScaledRate(optimizer, self._before_update)

    # ---- entering and leaving

    def __enter__(self) -> LocalSGD:
        self._rate.open()
        self.replica.make_one()
        self._averager.open()
        self._enter_plan(self.plan)
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
            self._averager.close()
            self._parallel.take_off()
            self._rate.close()

    # ---- what the loop reads

    @property
    def model(self) -> nn.Module:
        """What to call in the forward pass; ask for it at every step, since a new Plan may change it."""
        return self._parallel.module

    @property
    def plan(self) -> Plan:
        """What the current round does."""
        return self.controller.plan

    @property
    def stopping(self) -> bool:
        """Some rank was asked to stop, and all know."""
        return self._told.stopping

    @property
    def local_step(self) -> int:
        """Local steps so far."""
        return self._progress.local_step

    @property
    def rounds(self) -> int:
        """Rounds that have ended."""
        return self._progress.rounds

    @property
    def samples(self) -> int:
        """Samples trained so far, over all ranks."""
        return self._progress.samples

    @property
    def lr_scale(self) -> float:
        """The factor that the next `optimizer.step()` puts on the learning rate."""
        return self._progress.lr_scale

    def _before_update(self) -> float:
        """The optimizer has all its gradients, and asks by what to scale its rate."""
        self.clock.overlap_ends()
        if self._feed.idle and not self._parallel.on:  # a step without data of its own changes nothing
            for parameter in self.replica.parameters:
                if parameter.grad is not None:
                    parameter.grad.zero_()
            return 0.0
        if not self._parallel.on:
            gradients = [p.grad for p in self.replica.parameters]
            every, apart = self.plan.early_end == "gradient_change", not self._timetable.are_one
            self._progress.notes.look(gradients, self.rounds, every=every, apart=apart)
        elif self.plan.sync_period_steps == 1:
            self._progress.notes.sum_up(self._scaler.get_scale() if self._scaler is not None else 1.0)
        return self.lr_scale

    def batches(
        self,
        data: Any,
        samples: int | None = None,
        *,
        seed: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        workers: int = 0,
        uneven: Uneven = "stop",
        shard: bool = True,
    ) -> Batches:
        """One more pass over the data at each call, in batches of the planned size, on the model's device.

        Each pass has a new order, and reads every sample of this rank's shard once. All ranks end it together. After a
        `break` the next call begins the next pass. A checkpoint holds how far a pass is: after `load_state_dict` the
        first call for such a data set (of one kind, length and seed) reads the rest of the interrupted pass.

            for epoch in range(sync.passes(dataset), 10):
                for x, y in sync.batches(dataset):
                    ...

        Args:
            data: one of these.
                A data set with a length and items by index: shared out by rank, read as planned.
                An iterable of items, or a function that makes one: this rank's own, cut into batches as planned.
                A DataLoader: this rank's own, its batches as they are; after a checkpoint as many are passed over. With
                `batch_sampler` it follows the Plan.
                The trainer's ShardStream: never ends, and needs `samples`.
            samples: go on, pass after pass, until all ranks together have trained so many, counted from the
                beginning of the run. Policies then know how far the run is.
            seed: of the sharding, the order, and the random draws of the data set's own transforms.
            collate_fn: makes a batch of a list of items; by default torch's own.
            workers: reading processes of this rank; 0 reads in the training process.
            uneven: where ranks have unequal numbers of batches. `stop` ends the pass for all with the first that has
                no more. `go_on` ends it with the last; a rank without data repeats its last batch, which counts for
                nothing. Where lengths are not known, ranks vote once a round in one small message.
            shard: False if a data set is this rank's own already; lengths may differ then.

        Raises:
            ConfigError: arguments that cannot hold.
            DataError: while it is read: data that is not there, or an item that cannot be read.
        """
        return self._feed.batches(data, Options(samples, seed, collate_fn, workers, uneven, shard))

    def batch_sampler(self, data: Any, *, seed: int = 0) -> PlannedBatches:
        """This rank's samples in lists of the planned size, for `DataLoader(dataset, batch_sampler=...)`.

        Args:
            data: the data set, or its length.
            seed: of the sharding and the order.
        """
        return self._feed.batch_sampler(data, seed)

    def passes(self, data: Any, *, seed: int = 0, shard: bool = True) -> int:
        """Passes over such a data set (of one kind, length and seed) that are over; one that a checkpoint interrupted
        is not. The arguments are those of `batches`."""
        return self._feed.passes(data, Options(seed=seed, shard=shard))

    def no_sync(self) -> AbstractContextManager[None]:
        """For all but the last of the micro-batches that make up a local step: gradients stay on this rank."""
        return self._parallel.no_sync()

    # ---- one local step

    def all_finite(self, loss: torch.Tensor) -> Callable[[], bool]:
        """Begin to agree whether this step's loss is finite; call the answer after the backward pass.

        Inside a longer period each rank answers for itself, without a message; at period 1 a gradient is everybody's,
        so one rank's bad loss makes every rank skip.
        """
        if self._feed.idle:
            loss = torch.zeros_like(loss)
        if not self._parallel.on:
            return lambda: math.isfinite(loss.item())
        vote = self._parallel.collectives.begin_sum(loss)

        def answer() -> bool:
            self.clock.overlap_ends()  # the backward pass, which this follows, has waited for the last gradient
            return math.isfinite(self._parallel.collectives.end_sum(vote))

        return answer

    def step(
        self,
        loss: torch.Tensor,
        samples: int | None = None,
        *,
        skipped: bool = False,
        right: torch.Tensor | None = None,
    ) -> list[Round]:
        """Count one local step; take what is due, and at a round's end average, decide, and enter the next Plan.

        Args:
            loss: this step's mean loss on this rank (0-dim).
            samples: trained in this step by this rank; known already for batches of `batches`.
            skipped: the optimizer was not stepped; the step counts all the same, on every rank.
            right: how many of the samples were classified rightly (0-dim), for policies that look at it.

        Returns:
            The rounds that the controller has now heard of, mostly none: at a round's end the round itself, or with a
            delay the one before it; at period 1 one every `observe_steps` steps.
        """
        self.clock.overlap_ends()
        count = samples if samples is not None else self._batch_samples
        if self._feed.idle:
            loss, count, right = torch.zeros_like(loss), 0, None
        if count is None:
            raise ValueError("samples = None: pass sync.step(loss, samples=...) for batches of a loader of your own")
        self._feed.end_step()
        if skipped and self._parallel.on:
            self._parallel.forget()
        if self._timetable.are_one:
            self._progress.samples_apart = 0
        self._progress.count(loss, count, skipped=skipped, right=right)
        self._timetable.are_one &= self.plan.sync_period_steps == 1
        if self.plan.sync_period_steps <= 1:
            return self._end_lone_step()
        self._timetable.land()
        if self._progress.round_steps >= self.plan.sync_period_steps:
            return self._end_round()
        self._timetable.within_round(self.plan)
        if self.plan.early_end != "never" and self._early.reached(self.plan):
            return self._end_round()
        return []

    @property
    def _batch_samples(self) -> int | None:
        """Samples of the present step on this rank; `_feed.step_sizes` has those of all ranks."""
        return self._feed.batch_samples

    @property
    def between_rounds(self) -> bool:
        """Whether a round has just ended."""
        return self._progress.round_steps == 0

    def finish(self) -> list[Round]:
        """End the open round early, take what is under way, and make the replicas one model."""
        ended = self.settle()
        self._timetable.make_one()
        return ended

    def settle(self) -> list[Round]:
        """The same, as an evaluation needs it: where the Plan never averages, the replicas stay apart."""
        if self.plan.sync_period_steps <= 1:
            return self._observe() if self._progress.ledger.steps else []
        ended = [] if self.between_rounds else self._end_round()
        self._timetable.make_one()
        return ended + self._hear()

    def ask_to_stop(self) -> None:
        """Make all ranks stop at the next observation: `batches` ends on each, and `stopping` is true."""
        self._progress.stop_asked = True

    @contextmanager
    def consensus(self, calibration: Iterable[torch.Tensor] = ()) -> Iterator[nn.Module]:
        """The consensus model, in evaluation mode and the same on every rank; settles first.

        Call `settle` before it to have the rounds that end so. Where the Plan never averages, the replicas are
        averaged for the block's time only.

        Args:
            calibration: inputs of this rank for `batch_norm = recalibrate`.
        """
        self.settle()
        with consensus_model(self.replica, self._timetable, self.settings.batch_norm, calibration) as model:
            yield model

    def saw_accuracy(self, accuracy: float) -> None:
        """Tell the policy an evaluation's result (the same number on every rank)."""
        self._told.accuracy = accuracy

    # ---- a round's end

    def _end_lone_step(self) -> list[Round]:
        """A round of one step, which averages gradients or nothing."""
        self._progress.end_round()
        return self._observe() if self._progress.ledger.steps >= self.settings.observe_steps else []

    def _end_round(self) -> list[Round]:
        fragments = self._timetable.last_of_round(self.plan)
        self._progress.end_round()
        report = self._progress.report()
        ran = self.plan
        heard = self._told.decide()  # of earlier rounds: the Plan may change now
        self._timetable.send(fragments, report, self.plan, ends_round=True)
        heard += self._told.decide()
        self._enter_plan(ran)
        return heard

    def _observe(self) -> list[Round]:
        """At period 1 or 0: compare and decide."""
        headers = self.collectives.gather(self._progress.report())
        compare(headers)
        equal = self._feed.take_weighed() or len({header["samples"] for header in headers}) == 1
        if self.plan.sync_period_steps == 1 and not equal:
            warnings.warn(
                "ranks trained different numbers of samples at period 1, where gradients are averaged with equal "
                "weights: give every rank batches of one size, or drop the last",
                stacklevel=4,
            )
        self._told.tell(headers)
        return self._hear()

    def _hear(self) -> list[Round]:
        """Let the controller hear what was told, and enter the Plan that it answers with."""
        ran = self.plan
        heard = self._told.decide()
        self._enter_plan(ran)
        return heard

    def _enter_plan(self, before: Plan) -> None:
        """Make the ranks ready for the current Plan, after this one."""
        self._transition.enter(self.plan, before, no_gradient=self._told.no_gradient)
        self._early.begin_round(self.plan)

    def rewrap(self) -> None:
        """Put DDP afresh round the model where gradients are averaged, as a run resumed from here does."""
        self._transition.wrap(self.plan, no_gradient=self._told.no_gradient)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The place within round and phase, for a checkpoint; model and optimizer are saved by their owners."""
        return {
            "progress": self._progress.state_dict(),
            "told": self._told.state_dict(),
            "early": self._early.state_dict(),
            "averager": self._averager.state_dict(),
            "gradients": self._parallel.state_dict(),
            "feed": self._feed.state_dict(),
            "timetable": self._timetable.state_dict(),
            "sent_bytes": self.collectives.sent_bytes,
            "clock": self.clock.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: called inside the `with` block, once model and optimizer are loaded."""
        self._progress.load_state_dict(state["progress"])
        self._told.load_state_dict(state["told"])
        self._averager.use(self.settings.under(self.plan))
        self._averager.load_state_dict(state["averager"])
        self._parallel.load_state_dict(state["gradients"])
        self._early.load_state_dict(state["early"])
        if "feed" in state:
            self._feed.load_state_dict(state["feed"])
        self._timetable.load_state_dict(state["timetable"])
        self.collectives.sent_bytes = state["sent_bytes"]
        self.clock.load_state_dict(state["clock"])
        self.rewrap()
