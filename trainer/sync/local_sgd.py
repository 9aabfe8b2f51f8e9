"""LocalSGD: local steps between averagings, as the controller plans them. The library's front door."""

from __future__ import annotations

import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from trainer.config.federated import check_federated, device_plan
from trainer.config.sync import SyncConfig, check_plans, check_scaler, sync_config_of
from trainer.control.controller import Controller
from trainer.control.reports import SAVE, STOP, Total
from trainer.control.rounds import Round, Rounds
from trainer.data.planned import PlannedBatches, Uneven
from trainer.distributed.board import told
from trainer.distributed.clock import Clock
from trainer.distributed.collectives import Collectives
from trainer.distributed.launcher import node_name
from trainer.distributed.world import World
from trainer.errors import ConfigError, MismatchError, PeerError
from trainer.federated.devices import Devices
from trainer.log import LOG
from trainer.plan import Plan
from trainer.policies import Policy
from trainer.policies.base import policy_of
from trainer.sync.averager import Averager, share
from trainer.sync.consensus import consensus_model, evaluating
from trainer.sync.early_end import EarlyEnd
from trainer.sync.elastic import Elastic, Parts, Regrouped, Stateful
from trainer.sync.feed import Batches, Feed
from trainer.sync.given import check_elastic, check_kinds, check_optimizer, differing_settings, one_number
from trainer.sync.given_noise import GivenNoise, directions, excess
from trainer.sync.gradient_average import GradientAverage
from trainer.sync.host import Host, check_devices
from trainer.sync.layout import refuse_model, refuse_optimizer
from trainer.sync.passes import Options
from trainer.sync.progress import Progress, optimizer_settings
from trainer.sync.regroup import regrouped
from trainer.sync.replica import Replica
from trainer.sync.scaled_rate import ScaledRate
from trainer.sync.step_response import step_response
from trainer.sync.synced_model import SyncedModel
from trainer.sync.timetable import Timetable
from trainer.sync.transition import Transition

T = TypeVar("T")


class LocalSGD:
    """Local SGD under a synchronization controller, in a loop of the user's own.

    Inside the `with` block every rank starts from rank 0's model. While the Plan's period is 1, gradients are averaged
    during the backward pass, as DistributedDataParallel does. While it is longer nothing is sent until `step` has
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
        model: on its device, not wrapped and not sharded. Every rank builds the same one; values may differ.
        optimizer: over the model's parameters; its learning rates are scaled during `optimizer.step()` only, so any
            scheduler may set them.
        policy: the rule that plans batch and period; its class or registered name stands for its defaults.
        settings: what is averaged, and how; a dict holds fields of a SyncConfig.
        world: this rank among all; by default the process group that is there, else a world of one.
        group: the process group of the ranks that train together, where it is not all of them; every one of its ranks,
            and no other, makes a LocalSGD.
        clock: where waits are counted.
        scaler: the loss scaler of a loop in fp16, which must be one on all ranks at period 1.
        devices: federated devices that share the ranks. A Plan then gives each device its batch and local steps.
            `batches` goes through this rank's devices of a round, and `step` averages once the last of them is done.

    Raises:
        ConfigError: what cannot be averaged, or does not go together; names it, with the mend.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        policy: Policy | type[Policy] | str,
        *,
        settings: SyncConfig | Mapping[str, Any] | None = None,
        world: World | None = None,
        group: Any = None,
        clock: Clock | None = None,
        scaler: torch.amp.GradScaler | None = None,
        devices: Devices | None = None,
    ) -> None:
        check_kinds(model, optimizer, world, scaler, devices)
        policy, settings = policy_of(policy), sync_config_of(settings)
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.devices, self.optimizer = devices, optimizer
        self._check_plans(settings, policy)
        check_scaler(settings, used=self._scaler is not None)
        if isinstance(model, SyncedModel):  # of a LocalSGD before
            model = model.module
        refuse_model(model)
        refuse_optimizer(model, optimizer)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        world = world or World.current(device, group)
        self.clock = clock or Clock(device)
        self.settings = settings
        self._response = 1.0 if devices else step_response(optimizer)  # devices average parameters at any period
        self.controller = Controller(policy, self._response)
        self.collectives = Collectives(self._levelled(world), self.clock, settings.bucket_bytes)
        self._inside = False
        self.replica = Replica(model, optimizer, self.collectives, keeps_state=settings.state != "average")
        averages_gradients = [] if devices else [plan for plan in policy.plans() if plan.averages == "gradients"]
        many = self.world.size > 1 or self.world.members is not None
        check_optimizer(optimizer, averages_gradients=bool(averages_gradients) and many)
        if self.world.members is not None:
            check_elastic(settings, devices)
        self._gradients, self._noise = GradientAverage(settings.gradient_format, self.replica), GivenNoise()
        self._gradients.more = self._noise_weight
        splits = bool(averages_gradients or settings.node_period_steps == 1) and many
        self.model: nn.Module = SyncedModel(model, self._gradients, splits_graphs=splits)
        """The model to call: one object for the whole run, in all phases."""
        self._elastic: Elastic | None = None
        self._wire_up()

    def _wire_up(self) -> None:
        """The collaborators, each made of those before it."""
        self._averager = Averager(self.replica, self.settings, self.collectives, self.clock)
        self._told = Rounds(self.controller, self._carried_out)
        about = self.replica, self._told, self.collectives, self.clock, self.settings
        self._progress = Progress(*about, by_devices=self.devices is not None)
        self._host: Host | None = None
        if self.devices is not None:
            recalibrates = self.settings.batch_norm == "recalibrate"
            hosting = self.devices, self.replica, self._progress.notes, self.collectives
            self._host = Host(*hosting, recalibrates=recalibrates)
        self._early = EarlyEnd(self.replica, self._progress.notes, self.collectives)
        self._timetable = Timetable(self._averager, self.settings, self._told, self._progress)
        averaging = self.replica, self._averager, self._timetable, self._gradients
        self._transition = Transition(*averaging, self._progress.notes, self.settings, self._scaler)
        gathered = self._told, self._progress, self.collectives, self.clock
        self._feed = Feed(*gathered, self._gradients, self.settings.observe_steps, self._host)
        if self.world.members is not None:
            parts = Parts(
                self.replica,
                self._averager,
                self._timetable,
                self._gradients,
                self._transition,
                self._early,
                self._told,
                self._progress,
                self._feed,
                self.clock,
                self.settings,
            )
            self._elastic = Elastic(self.world.members, parts, self._facts())
        # a local step without data of its own changes nothing
        self._rate = ScaledRate(
            self.optimizer, self._before_update, lambda: self._inside and self._feed.idle and not self._gradients.on
        )

    def _check_plans(self, settings: SyncConfig, policy: Policy) -> None:
        """Refuse settings that the policy's Plans, or the devices, cannot have."""
        if self.devices is None:
            check_plans(settings, policy.plans())
            return
        check_federated(self.devices.config, settings, policy.plans())
        check_devices(self.devices.config, self.optimizer, scaled=self._scaler is not None)

    def _carried_out(self, plan: Plan) -> Plan:
        """A policy's Plan as rounds carry it out."""
        return plan if self.devices is None else device_plan(plan, self.devices.config, self.settings)

    def _levelled(self, world: World) -> World:
        """The world with its nodes, where averages have two levels."""
        if self.settings.ranks_per_node is not None:
            return world.with_nodes_of(self.settings.ranks_per_node)
        if self.settings.node_period_steps is None or world.size == 1:
            return world
        return world.with_nodes(Collectives(world, None, self.settings.bucket_bytes).gather_objects(node_name()))

    # ---- entering and leaving

    def __enter__(self) -> LocalSGD:
        if self._inside:
            raise RuntimeError("LocalSGD is entered already: leave its `with` block before the next one begins")
        self._inside = True
        self.world.board.begin()
        try:
            self._rate.open()
            if self._elastic is not None:
                self._elastic.begin()
                self._told.step_response = self._response
                self._averager.open()
                self._elastic.regroup(None)
                self.clock.start()
                return self
            self._compare_settings()
            self.replica.make_one()
            self._averager.open()
            if self._host is not None:
                self._averager.use(self.settings.under(self.plan))
                self._host.open()
                self._host.check([self._carried_out(plan) for plan in self.controller.policy.plans()])
            self._transition.enter(self.plan, self.plan)
            self.rewrap()
            self._early.begin_round(self.plan)
        except BaseException as error:
            self._leave(error)
            raise
        self.clock.start()
        return self

    def _compare_settings(self) -> None:
        """Make sure that all ranks begin by one plan, with the same settings.

        Raises:
            MismatchError: names the field, and every rank's value.
        """
        mine = self._facts()
        # one number, which a float holds exactly
        packed = round(100 * self._response) * 2**32 + zlib.crc32(repr(mine).encode())
        everyones = [divmod(rank["packed"], 2**32) for rank in self.collectives.gather({"packed": packed})]
        self._told.step_response = min(response for response, _ in everyones) / 100
        if len({digest for _, digest in everyones}) == 1:
            return
        everyone = self.collectives.gather_objects(mine)
        name = next(name for name in mine if len({theirs[name] for theirs in everyone}) > 1)
        sides = ", ".join(f"{theirs[name]} on rank {rank}" for rank, theirs in enumerate(everyone))
        raise MismatchError(f"the {name} is {sides}; give all ranks the same")

    def _facts(self) -> dict[str, str]:
        """By name, what all ranks must have in common."""
        facts = {"policy": self.controller.policy, "settings": self.settings, "plan": self.plan}
        facts = {f"{name} of LocalSGD": value for name, value in facts.items()}
        if self.devices is not None:
            facts |= self.devices.alike()
        return {name: re.sub(r" at 0x[0-9a-f]+", "", repr(value)) for name, value in facts.items()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                last = self.local_step
                with self.world.board.saying(f"ended its loop after local step {last}", last):
                    self.finish()
                last = self.local_step
                self.world.board.say(f"ended its loop after local step {last}", after_step=last)
        except BaseException as late:
            error = late
            raise
        finally:
            self._leave(error)

    def _leave(self, error: BaseException | None) -> None:
        if error is not None:
            self.world.board.say(told(error))
        if self.world.members is not None:
            if error is None:
                self.world.members.end("ended its loop")
            else:
                self.world.members.leave(told(error))
        self._abandon()
        self._feed.close()
        self.clock.stop()
        self._averager.close()
        self._gradients.take_off()
        self._rate.close()
        self.replica.release()
        self._inside = False

    def _abandon(self) -> None:
        """Drop an open round of devices, as if it had not begun."""
        began = None if self._host is None else self._host.abandon()
        if began is not None:
            self._progress.drop_round(began)
            self._feed.end_step()

    def _require_inside(self, what: str) -> None:
        if not self._inside:
            raise RuntimeError(
                f"sync.{what} was called outside its block: put the loop inside `with LocalSGD(...) as sync`"
            )

    # ---- what the loop reads

    @property
    def world(self) -> World:
        """The ranks that take part, and this one among them."""
        return self.collectives.world

    @property
    def plan(self) -> Plan:
        """What the current round does."""
        return self._told.plan

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
    def visiting(self) -> int | None:
        """The device that this rank trains now; None without devices, and where it has none in the round."""
        visit = self._host.visit if self._host is not None and self._host.round is not None else None
        return None if visit is None else visit.device

    @property
    def devices_ever(self) -> set[int]:
        """Devices that have taken part in some round."""
        return set() if self._host is None else set(self._host.ever)

    @property
    def lr_scale(self) -> float:
        """The factor that the next `optimizer.step()` puts on the learning rate."""
        batch = self._feed.own_batch
        return self._progress.lr_scale * (1.0 if batch is None else self.controller.batch_factor(batch))

    @property
    def _absorbs(self) -> bool:
        """The others have counted this rank's present step already."""
        return self._elastic is not None and self._elastic.absorbs

    def _noise_weight(self, via: Collectives) -> float:
        """What this rank's gradient counts more or less in the next mean, for the noise that the Plan asks for."""
        much = excess(self.plan)
        return float(directions(via.size, much, self.local_step)[via.rank]) if much > 0 else 0.0

    def _before_update(self, with_closure: bool) -> float:
        """The optimizer is about to step, and asks by what to scale its rate."""
        self.clock.overlap_ends()
        if not with_closure and not self._absorbs:  # else it computes the gradients itself, or makes no update
            self._gradients.join()
        if not self._absorbs:
            self._progress.updates += 1
            if self._elastic is not None and self._gradients.on:
                self._elastic.did()
        if self._host is not None:
            self._host.before_update(self.lr_scale, with_closure=with_closure)
        notes = self._progress.notes
        if self.plan.averages == "gradients":
            scale = self._scaler.get_scale() if self._scaler is not None else 1.0
            notes.sum_up(scale, self._gradients.weight)
        elif not self._gradients.on:
            every, apart = self.plan.early_end == "gradient_change", not self._timetable.are_one
            apart = apart and self._host is None  # a device's first gradient is the consensus model's
            notes.look(self.replica.parameters, self.rounds, every=every, apart=apart)
            if not with_closure:
                self._noise.add(self.replica.parameters, self.plan, self.local_step, self.world.rank)
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
        is not. The arguments are those of `batches`. With devices a call of `batches` is a round, and these are the
        rounds that are over."""
        if self._host is not None:
            return self.rounds
        return self._feed.passes(data, Options(seed=seed, shard=shard))

    def no_sync(self) -> AbstractContextManager[None]:
        """For all but the last of the micro-batches that make up a local step: gradients stay on this rank."""
        return self._gradients.no_sync()

    # ---- one local step

    def all_finite(self, loss: torch.Tensor) -> Callable[[], bool]:
        """Begin to agree whether this step's loss is finite; call the answer after the backward pass.

        Inside a longer period each rank answers for itself, without a message; at period 1 a gradient is everybody's,
        so one rank's bad loss makes every rank skip.
        """
        if self._feed.idle:
            loss = torch.zeros_like(loss)
        if self._absorbs or not self._gradients.on:
            return lambda: math.isfinite(loss.item())
        via = self._gradients.collectives
        vote = self._agreed_or_own(lambda: via.begin_sum(loss))

        def answer() -> bool:
            self.clock.overlap_ends()  # the backward pass, which this follows, has waited for the last gradient
            total = None if vote is None else self._agreed_or_own(lambda: via.end_sum(vote))
            return math.isfinite(loss.item() if total is None else total)

        return answer

    def _agreed_or_own(self, ask: Callable[[], T]) -> T | None:
        """An answer of all ranks, or None where one has gone, which the average of gradients will notice."""
        try:
            return ask()
        except PeerError:
            if self._elastic is None:
                raise
            return None

    def step(
        self,
        loss: torch.Tensor | float,
        samples: int | None = None,
        *,
        skipped: bool = False,
        correct: torch.Tensor | None = None,
        right: torch.Tensor | None = None,
    ) -> list[Round]:
        """Count one local step; take what is due, and at a round's end average, decide, and enter the next Plan.

        Args:
            loss: this step's mean loss on this rank (one number).
            samples: trained in this step by this rank; known already for batches of `batches`.
            skipped: the optimizer was not stepped; the step counts all the same, on every rank.
            correct: how many of the samples were classified correctly (0-dim), for policies that look at it.
            right: an earlier name of `correct`.

        Returns:
            The rounds that the controller has now heard of, mostly none: at a round's end the round itself, or with a
            delay the one before it; at period 1 one every `observe_steps` steps.

        Raises:
            ConfigError: no samples known, or a loss that is no single number.
            MismatchError: ranks disagree about where they are.
            PeerError: a peer left.
        """
        self._require_inside("step")
        if self._elastic is not None and self._elastic.absorbs:
            self._elastic.absorbs = False
            self._feed.end_step()
            return []
        if self._host is not None and not self._feed.in_hand:
            raise ConfigError(
                "sync.step: with devices each call is for one batch of sync.batches(dataset), which goes through this "
                "rank's devices in turn; take batches from there, and call sync.step once for each"
            )
        count, mean, of_feed = self._counted(samples), one_number(loss), self._feed.in_hand
        if self._feed.idle:
            mean, count, correct, right = torch.zeros_like(mean), 0, None, None
        correct = correct if correct is not None else right
        with torch.inference_mode(mode=False):
            heard = self._lasting(lambda: self._step(mean, count, skipped=skipped, correct=correct)) or []
            if self._elastic is not None and not of_feed:
                self._elastic.let_in()
        self.world.board.step = self.local_step + 1
        for each in heard:
            if each.left_out:
                warnings.warn(
                    f"round {each.seen.round}: the replica of rank {', '.join(map(str, each.left_out))} held values "
                    "that are not finite or had moved too far; it was left out of the average, and took the others'",
                    stacklevel=2,
                )
            if each.devices is not None and each.devices.left_out:
                warnings.warn(
                    f"round {each.seen.round}: the model of device {', '.join(map(str, each.devices.left_out))} held "
                    "values that are not finite; it was left out of the average",
                    stacklevel=2,
                )
        return heard

    def _counted(self, samples: int | None) -> int:
        count = samples if samples is not None else self._feed.batch_samples
        if count is None:
            raise ConfigError("samples = None: pass sync.step(loss, samples=...) for batches of a loader of your own")
        try:
            whole = not isinstance(count, bool) and int(count) == count and count >= 0
        except (TypeError, ValueError, OverflowError, RuntimeError):
            whole = False
        if not whole:
            raise ConfigError(f"samples = {count!r}: must be the number of samples of this step, 0 or more")
        return int(count)

    def _step(self, loss: torch.Tensor, count: int, *, skipped: bool, correct: torch.Tensor | None) -> list[Round]:
        self.clock.overlap_ends()
        if self._elastic is not None:
            self._progress.admits = self._elastic.admits
        if skipped and self._gradients.on:
            self._gradients.forget()
        self._gradients.join()  # a rank that had nothing to train takes part all the same
        self._gradients.end_step()
        everyones = self._feed.everyones(count) if self._host is None else 0
        self._feed.end_step()
        self._timetable.stepped(self.plan, count)
        self._progress.count(loss, count, everyones, skipped=skipped, correct=correct)
        self.world.board.step = self.local_step
        if self._host is not None:
            return self._end_device_round(self._host) if self._host.stepped() else []
        if self.plan.averages != "parameters":
            return self._end_lone_step()
        self._timetable.land()
        if self._progress.round_steps >= self.plan.sync_period_steps:
            return self._end_round()
        self._timetable.within_round(self.plan)
        if self.plan.early_end != "never" and self._early.reached(self.plan):
            return self._end_round()
        return []

    @property
    def between_rounds(self) -> bool:
        """Whether a round has just ended."""
        return self._progress.round_steps == 0 and (self._host is None or self._host.round is None)

    def finish(self) -> list[Round]:
        """End the open round early, take what is under way, and make the replicas one model.

        With devices an open round is dropped: the model is the last consensus model.
        """
        if self._host is not None:
            self._abandon()
            return []
        ended = self.settle()
        self._lasting(self._finish, again=True)
        return ended

    def _finish(self) -> None:
        with torch.inference_mode(mode=False):
            self._timetable.make_one()
            if self._timetable.layout_changed:
                self._relayout(self.plan)
            self.replica.unite(buffers=self.settings.batch_norm == "average")

    def settle(self) -> list[Round]:
        """End the open round early, and take what is under way, so that an evaluation may follow.

        Where the Plan never averages, the replicas stay apart.
        """
        self._require_inside("settle")
        if self._host is not None:
            self._require_between_rounds("settle")
            return []
        return self._lasting(self._settle, again=True) or []

    def _settle(self) -> list[Round]:
        waits = self.world.board.saying(f"evaluates or ends after local step {self.local_step}", self.local_step)
        with waits, torch.inference_mode(mode=False):
            if self.plan.averages != "parameters":
                heard = self._observe() if self._progress.ledger.steps else []
                if self.plan.averages == "gradients" and not self.replica.are_equal():
                    self._mend()
                return heard
            ended = [] if self.between_rounds else self._end_round()
            self._timetable.make_one()
            return ended + self._hear()

    def _require_between_rounds(self, what: str) -> None:
        if not self.between_rounds:
            raise RuntimeError(
                f"sync.{what} was called within a round of devices: wait for its end, which sync.between_rounds tells"
            )

    def ask_to_stop(self) -> None:
        """Make all ranks stop at the next observation: `batches` ends on each, and `stopping` is true."""
        self._progress.wish = STOP

    def ask_to_save(self) -> None:
        """Make `take_save` true on all ranks at the next observation, at the same local step."""
        self._progress.wish = max(self._progress.wish, SAVE)

    def take_save(self) -> bool:
        """Whether some rank has asked for a checkpoint, and all know; true once."""
        asked, self._told.saving = self._told.saving, False
        return asked

    @contextmanager
    def consensus(self, calibration: Iterable[Any] = ()) -> Iterator[nn.Module]:
        """The consensus model, in evaluation mode and the same on every rank; settles first.

        Call `settle` before it to have the rounds that end so. Where the Plan never averages, the replicas are
        averaged for the block's time only. Every module has its own mode again after the block.

        Args:
            calibration: inputs of this rank for `batch_norm = recalibrate`.
        """
        self.settle()
        about = self.replica, self._timetable, self.settings.batch_norm, calibration
        opened: list[AbstractContextManager[nn.Module]] = []

        def enter() -> None:
            found = consensus_model(*about)
            found.__enter__()
            opened.append(found)

        with ExitStack() as ends:
            self._lasting(enter, again=True)
            if opened:
                ends.push(opened[0])
            else:
                ends.enter_context(evaluating(self.replica.model))
            yield self.replica.model

    def saw_accuracy(self, accuracy: float) -> None:
        """Tell the policy an evaluation's result (the same number on every rank)."""
        if isinstance(accuracy, bool | str) or not hasattr(accuracy, "__float__"):
            raise ConfigError(f"accuracy = {accuracy!r}: must be a number, the same on every rank")
        self._told.accuracy = float(accuracy)

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

    def _end_device_round(self, host: Host) -> list[Round]:
        """This rank's devices of the round are done: average all ranks'; too few reports keep the model."""
        assert host.round is not None
        ran, heard_any = self.plan, bool(host.round.heard)
        left_out = host.gather()
        self._progress.local_step = host.ends_at
        self._progress.end_round()
        report = host.weigh(self._progress.report())
        about = {"devices": replace(host.round, left_out=left_out), **host.known()}
        if heard_any:
            self._timetable.send([*self._averager.everything], report, ran, ends_round=True, **about)
        else:
            total = share(report, self.collectives)
            self._timetable.heard(total)
            self._told.tell(total, **about)
        host.end_round()
        heard = self._told.decide()
        self._enter_plan(ran)
        return heard

    def _observe(self) -> list[Round]:
        """At period 1 or 0: compare and decide."""
        total = share(self._progress.report(), self.collectives)
        self._timetable.heard(total)
        if self.plan.averages == "gradients":
            self._check_equal(total)
        self._told.tell(total)
        return self._hear()

    def _check_equal(self, total: Total) -> None:
        """At period 1 replicas must stay one: the same rates, the same updates, gradients weighted as they should be.

        Raises:
            MismatchError: learning rates differ.
        """
        if "rates" in total.differing:
            raise MismatchError(differing_settings(self.collectives.gather_objects(optimizer_settings(self.optimizer))))
        if "updates" in total.differing or total.are_apart:
            self._mend()
        if np.ptp(total.weight_by_rank) > 0 and not self._feed.take_weighed():
            warnings.warn(
                "ranks trained different numbers of samples at period 1, where gradients are averaged with equal "
                "weights: take batches from sync.batches(loader), or give every rank batches of one size",
                stacklevel=5,
            )

    def _mend(self) -> None:
        """Replicas are not one though gradients were averaged: average them, and say so."""
        warnings.warn(
            "replicas differ at period 1: parameters or updates were changed on some ranks only; they were averaged, "
            "and training goes on from there",
            stacklevel=2,
        )
        self._transition.mend(self.plan)

    def _hear(self) -> list[Round]:
        """Let the controller hear what was told, and enter the Plan that it answers with."""
        ran = self.plan
        heard = self._told.decide()
        self._enter_plan(ran)
        return heard

    def _enter_plan(self, before: Plan) -> None:
        """Make the ranks ready for the current Plan, after this one."""
        if self.plan != before:
            LOG.debug("local step %d: phase %s begins, %s", self.local_step, self.controller.phase.name, self.plan)
        self._transition.enter(self.plan, before)
        if self._timetable.layout_changed and self.plan.averages != "nothing":  # else it waits for what ends that
            self._relayout(self.plan)
        self._early.begin_round(self.plan)

    def _relayout(self, plan: Plan) -> None:
        LOG.debug("local step %d: the model's layers have changed, and are taken in", self.local_step)
        self._early.forget()
        self._transition.relayout(plan)
        self._timetable.layout_mended()
        if self._host is not None:
            self._host.relayout()

    def rewrap(self) -> None:
        """Begin gradient averaging afresh where it is on, as a run resumed from here does."""
        self._transition.wrap(self.plan)

    # ---- ranks that come and go

    def together(self, work: Callable[[], T]) -> T | None:
        """Do something of the loop's own that has collectives, such as an evaluation over all ranks' shares.

        Where ranks come and go, it is done again with those who are left; not where the others had finished it when
        this rank was cut off: then the answer is None. Elsewhere it is just done.
        """
        self._require_inside("together")
        return self._lasting(work, again=True)

    def carry(self, name: str, thing: Stateful) -> None:
        """Have newcomers take this thing's state: a scheduler, a counter of the loop's own.

        Call it inside the block, before the loop, on every rank; on a newcomer it loads the others' state.

        Args:
            name: the same on every rank.
            thing: with `state_dict` and `load_state_dict`; its state is pickled.
        """
        self._require_inside("carry")
        if self._elastic is not None:
            self._elastic.carry(name, thing)

    def regroupings(self) -> list[Regrouped]:
        """How the ranks have changed since this was last asked; `world` is what they are now."""
        return [] if self._elastic is None else self._elastic.heard()

    @property
    def is_newcomer(self) -> bool:
        """This rank came when the others had begun. A loop with batches of its own does first what they do after
        `step`."""
        return self._elastic is not None and self._elastic.is_new

    def _lasting(self, work: Callable[[], T], *, again: bool = False) -> T | None:
        """Do what needs the other ranks, also where some go."""
        return work() if self._elastic is None else self._elastic.lasting(work, again=again)

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The place within round and phase, for a checkpoint; model and optimizer are saved by their owners."""
        if self._host is not None and not self._host.is_open:
            raise RuntimeError("sync.state_dict was called before its block: with devices, call it inside or after")
        return {
            "ranks": self.world.size,
            "progress": self._progress.state_dict(),
            "replica": self.replica.state_dict(),
            "told": self._told.state_dict(),
            "early": self._early.state_dict(),
            "averager": self._averager.state_dict(),
            "gradients": self._gradients.state_dict(),
            "noise": self._noise.state_dict(),
            "feed": self._feed.state_dict(),
            "timetable": self._timetable.state_dict(),
            "sent_bytes": self.collectives.sent_bytes,
            "clock": self.clock.state_dict(),
            "devices": None if self._host is None else self._host.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: called inside the `with` block, once model and optimizer are loaded."""
        self._require_inside("load_state_dict")
        missing = sorted({*self.state_dict()} - {*state}) if isinstance(state, Mapping) else ["all"]
        if missing:
            raise ConfigError(
                f"state of LocalSGD has no {missing[0]!r}: pass what sync.state_dict() gave, of this version"
            )
        if state["ranks"] != self.world.size:
            raise ConfigError(
                f"state of LocalSGD is of {state['ranks']} ranks, and there are {self.world.size}: start as many"
            )
        if (self._host is None) != (state["devices"] is None):
            sides = ("devices", "none") if self._host is None else ("no devices", "some")
            raise ConfigError(f"state of LocalSGD is of {sides[0]}, and there are {sides[1]}: give LocalSGD the same")
        self._progress.load_state_dict(state["progress"])
        if self.replica.load_state_dict(state["replica"]):
            self._averager.retake()
        self._told.load_state_dict(state["told"])
        self._averager.use(self.settings.under(self.plan))
        self._averager.load_state_dict(state["averager"])
        self._gradients.load_state_dict(state["gradients"])
        self._noise.load_state_dict(state["noise"], self.replica.parameters[0].device)
        self._early.load_state_dict(state["early"])
        self._feed.load_state_dict(state["feed"])
        self._timetable.load_state_dict(state["timetable"])
        self.collectives.sent_bytes = state["sent_bytes"]
        self.clock.load_state_dict(state["clock"])
        if self._host is not None:
            self._host.load_state_dict(state["devices"])
        self.rewrap()

    def load_consensus(self, saved: Mapping[str, Any]) -> None:
        """Go on from a checkpoint of another number of ranks: called inside the `with` block, once every rank has
        loaded the consensus of its replicas, and one optimizer state.

        Args:
            saved: rank 0's `state_dict()` of the ranks that wrote it.

        Raises:
            ConfigError: there are devices, whose data and state are private to the rank that hosts them.
        """
        if self._host is not None:
            raise ConfigError(
                f"state of LocalSGD is of {saved['ranks']} ranks, and there are {self.world.size}: devices stay with "
                "the rank that hosts them; start as many"
            )
        self.load_state_dict(regrouped(self.state_dict(), saved))
        self.replica.remember_rests()
        self._early.begin_round(self.plan)
        self._progress.ledger.begin(self.clock.read(), self.collectives.sent_bytes)
