"""Devices on one rank: each is trained in turn from the consensus model, and all go into one displacement."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from trainer.config.federated import CORRECTING, FederatedConfig
from trainer.control.reports import Report
from trainer.data.device_data import Request
from trainer.data.reading import mixed_seed
from trainer.distributed.collectives import Collectives
from trainer.errors import ConfigError
from trainer.federated.cohorts import Cohorts, DeviceRound, Fleet, Heard, Visit, batch_sizes, open_cohorts
from trainer.federated.devices import Devices
from trainer.federated.profiles import Profile
from trainer.plan import Plan
from trainer.sync.drift import RULES, Drift, Flats, Reach
from trainer.sync.gathered import Gathered, Reached, Sent
from trainer.sync.gradient_notes import GradientNotes
from trainer.sync.replica import Replica
from trainer.sync.rests import Named, Rests

STEP_BETWEEN = "a scheduler steps within a round; call scheduler.step() where sync.between_rounds is true"
INTERCHANGEABLE = {"fedavg", "fedprox", "fednova"}
"""Rules that keep nothing between rounds."""


class Host:
    """Trains this rank's devices of a round one after another, in the one replica that there is.

    Memory does not grow with the devices: each begins from the round's first model, and what it moved is added to one
    buffer. The average of the ranks' replicas that follows is the devices' own, since a rank's replica is then the
    weighted mean of its devices' models and counts with the sum of their weights.

    Args:
        devices: all of them, and the samples of this rank's.
        replica: what is trained.
        notes: on gradients.
        via: collectives of all ranks.
        recalibrates: floating-point buffers are recalibrated, so that devices' own are dropped.
    """

    def __init__(
        self, devices: Devices, replica: Replica, notes: GradientNotes, via: Collectives, *, recalibrates: bool
    ) -> None:
        self.devices, self.config = devices, devices.config
        self._replica, self._notes, self._via = replica, notes, via
        self._rests = Rests(replica, via, recalibrates=recalibrates, mixes=self.config.rule == "fedasync")
        count = self.config.devices or 0
        self.mine = list(range(via.rank, count, via.size))
        """Numbers of the devices that this rank hosts."""
        self.round: DeviceRound | None = None
        """The open round; None between two rounds."""
        self.ever: set[int] = set()
        """Devices that took part in some round."""
        self.left_out: list[int] = []
        """This rank's devices of the latest round whose models were not finite."""
        self._turn, self._steps = 0, 0
        self._held: dict[int, Sent] = {}
        """By draw."""
        self._before: dict[str, Any] = {}
        """The rounds as they were before the open one."""
        self._rates: list[float] | None = None
        """Learning rates by which the open round's devices begin; None before the first."""
        self._reach = Reach(replica.optimizer, 0.0)
        self._cohorts: Cohorts | None = None
        self._rule: Drift | None = None
        self._share, self._gain, self._reach_steps = 0.0, 1.0, math.nan
        self._round_from = 0

    # ---- before the first round

    def open(self) -> None:
        """Learn every device's size; every rank calls it.

        Raises:
            ConfigError: devices without samples, fewer devices than ranks, or shards of another rank's devices.
        """
        count = self.config.devices or 0
        if count < self._via.size:
            raise ConfigError(f"devices = {count}: fewer than the {self._via.size} ranks; start fewer ranks")
        if self._cohorts is None:
            profile = Profile.of(self.config.profile, count, self.devices.seed)
            parameters = sum(flat.numel() for flat in self._replica.flat_parameters.buffers)
            fleet = Fleet(self.config, self._sizes(count), profile, self.devices.seed, parameters)
            self._cohorts = open_cohorts(fleet)
        self._take_members()
        if self._rule is None:  # what devices keep outlives a block
            self._rule = RULES[self.config.rule](self.config, self._sums, self.mine)
        self._reach = Reach(self._replica.optimizer, self.rule.pull)

    def _take_members(self) -> None:
        """Make room for the parameters that are trained now."""
        flats = self._replica.flat_parameters.adopt()
        self._start = [flat.clone() for flat in flats]
        self._views = self._replica.flat_parameters.views_of(self._start)
        like = [torch.zeros((), dtype=torch.promote_types(f.dtype, torch.float32), device=f.device) for f in flats]
        self._sums = [torch.zeros_like(kind).expand(len(f)).clone() for kind, f in zip(like, flats, strict=True)]

    def relayout(self) -> None:
        """Layers were unfrozen, frozen, added or replaced; every rank calls it, between two rounds.

        Raises:
            ConfigError: devices keep something for each parameter.
        """
        before = [len(flat) for flat in self._sums]
        self._take_members()
        self._replica.remember_rests()
        keeps = self.rule.keeps or bool(self._held)
        if keeps and before != [len(flat) for flat in self._sums]:
            raise ConfigError(
                f"rule = {self.config.rule!r}: devices keep a model's size of their own, and other parameters are "
                f"trained from round {self.cohorts.number} on; train the same ones all along, or choose fedavg"
            )

    def _sizes(self, count: int) -> tuple[int, ...]:
        shards = self.devices.shards
        missing = [device for device in self.mine if device not in shards]
        if not self.devices.all_known and (missing or len(shards) != len(self.mine)):
            wrong = missing[0] if missing else next(device for device in shards if device not in self.mine)
            raise ConfigError(
                f"shards: rank {self._via.rank} of {self._via.size} hosts devices {self._via.rank}, "
                f"{self._via.rank + self._via.size}, ...; mend device {wrong}"
            )
        if self.devices.all_known:
            return tuple(len(shards[device]) for device in range(count))
        known: dict[int, int] = {}
        for theirs in self._via.gather_objects({device: len(indices) for device, indices in shards.items()}):
            known |= theirs
        return tuple(known[device] for device in range(count))

    @property
    def rule(self) -> Drift:
        """What corrects drift; there once the block was entered."""
        assert self._rule is not None
        return self._rule

    @property
    def cohorts(self) -> Cohorts:
        """The rounds; there once the block was entered."""
        assert self._cohorts is not None
        return self._cohorts

    @property
    def is_open(self) -> bool:
        """The block was entered, now or before."""
        return self._cohorts is not None and self._rule is not None

    def check(self, plans: list[Plan]) -> None:
        """Refuse what no round of these Plans could do.

        Raises:
            ConfigError: a deadline that too few devices meet.
        """
        for plan in plans:
            self.cohorts.fleet.check_deadline(plan)

    # ---- a round, as a loop goes through it

    def begin_round(self, plan: Plan, local_step: int) -> None:
        """Draw the next round; every rank comes to the same one. Goes on with one that a checkpoint interrupted."""
        if self.round is not None:
            return
        self._before = self.cohorts.state_dict()
        self.round = self.cohorts.next(plan)
        self._rates = None
        self._turn, self._steps, self._round_from = 0, 0, local_step
        self.left_out = []
        flats = self._replica.flat_parameters.adopt()
        for start, flat in zip(self._start, flats, strict=True):
            start.copy_(flat)
        self._gathered = Gathered([sums.zero_() for sums in self._sums])
        self._rests.begin_round()
        if self.visit is not None:
            self._begin_visit(self.visit)

    @property
    def visits(self) -> list[Visit]:
        """This rank's, of the open round."""
        assert self.round is not None
        return [visit for visit in self.round.visits if visit.device % self._via.size == self._via.rank]

    @property
    def visit(self) -> Visit | None:
        """The device that trains now; None where this rank has none left in the round, and its step counts nothing."""
        return self.visits[self._turn] if self._turn < len(self.visits) else None

    @property
    def ends_at(self) -> int:
        """Local steps of the run at the open round's end: those of the devices that made the most."""
        assert self.round is not None
        return self._round_from + self.round.steps

    @property
    def idle(self) -> bool:
        """The present step is of no device."""
        return self.round is not None and self.visit is None

    def requests(self) -> Iterator[tuple[Request, int]]:
        """What is to be read for the rest of the open round, a local step each, and the samples that it counts."""
        if not self.visits:
            largest = max(self.mine, key=lambda device: len(self.devices.shards[device]))
            yield Request(self.devices.shards[largest][:2], (self.devices.seed, largest)), 0
            return
        for turn, visit in enumerate(self.visits):
            if turn >= self._turn:
                for number, places in enumerate(self._batches(visit)):
                    if turn > self._turn or number >= self._steps:
                        yield Request(places, (self.devices.seed, visit.device, visit.draw, number)), len(places)

    def _batches(self, visit: Visit) -> Iterator[Any]:
        shard = self.devices.shards[visit.device]
        sizes = batch_sizes(len(shard), visit.batch)
        for step in range(visit.steps):
            epoch, number = divmod(step, len(sizes))
            if number == 0:
                draw = np.random.default_rng([self.devices.seed, 5, visit.device, visit.draw, epoch])
                order, start = shard[draw.permutation(len(shard))], 0
            yield order[start : start + sizes[number]]
            start += sizes[number]

    def before_update(self, factor: float, *, with_closure: bool) -> None:
        """The optimizer is about to step: correct the gradient.

        Raises:
            ConfigError: the gradient is not there yet, or is scaled.
        """
        if self.round is None or self.visit is None:
            return
        if not self._reach.begun:
            self._compare_rates(self.visit.device)
        if self.config.rule in CORRECTING:
            self._require_gradients(with_closure=with_closure)
            self._correct()
        self._reach.step(factor)

    def _compare_rates(self, device: int) -> None:
        """A device's first update in a round: all devices begin by the same rates, whoever went before.

        Raises:
            ConfigError: names the rate, and the mend.
        """
        rates = [float(group["lr"]) for group in self._replica.optimizer.param_groups]
        self._rates = self._rates or rates
        for number, (before, now) in enumerate(zip(self._rates, rates, strict=False)):
            if now != before:
                raise ConfigError(
                    f"the learning rate of group {number} is {now} for device {device}, and was {before} for the "
                    f"round's first: {STEP_BETWEEN}"
                )

    def _require_gradients(self, *, with_closure: bool) -> None:
        said = f"rule = {self.config.rule!r}: adds to the gradient before optimizer.step"
        if with_closure:
            raise ConfigError(f"{said}, which a closure computes inside; step without one")
        if getattr(self._replica.optimizer, "grad_scale", None) is not None:
            raise ConfigError(f"{said}, which is still scaled there; call scaler.unscale_(optimizer), or fused=False")

    @torch.no_grad()
    def _correct(self) -> None:
        members: list[torch.Tensor] = [each for each in self._replica.parameters if each.numel()]
        parameters = [each for each in members if each.requires_grad]  # not those that were frozen since
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif parameter.grad.layout != torch.strided:
                parameter.grad = parameter.grad.to_dense()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]

        def of_trained(views: list[torch.Tensor]) -> list[torch.Tensor]:
            return [view for view, each in zip(views, members, strict=True) if each.requires_grad]

        if self.rule.pull:
            starts = of_trained(self._views)
            moved = [parameter - start for parameter, start in zip(parameters, starts, strict=True)]
            torch._foreach_add_(gradients, moved, alpha=self.rule.pull)
        terms = self.rule.terms()
        if terms is not None:
            views = of_trained(self._replica.flat_parameters.views_of(terms))
            torch._foreach_add_(gradients, [v.to(g.dtype) for v, g in zip(views, gradients, strict=True)])

    def stepped(self) -> bool:
        """A local step was counted; whether this rank's part of the round is over."""
        visit = self.visit
        if visit is None:
            return True
        self._steps += 1
        if self._steps < visit.steps:
            return False
        self._end_visit(visit)
        self._turn, self._steps = self._turn + 1, 0
        following = self.visit
        if following is not None:
            self._begin_visit(following)
        return following is None

    @torch.no_grad()
    def _begin_visit(self, visit: Visit) -> None:
        """Give the replica the round's first model, and nothing of the device before."""
        self._restore()
        self._replica.reset_state()
        self._reach.begin()
        self.rule.begin(visit.device)
        self._notes.begin_part()
        seed = mixed_seed(self.devices.seed, 10, visit.device, visit.draw)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond where CUDA is not in use
        if self._via.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)

    @torch.no_grad()
    def _restore(self) -> None:
        for flat, start in zip(self._replica.flat_parameters.adopt(), self._start, strict=True):
            flat.copy_(start)
        self._rests.restore()

    @torch.no_grad()
    def _end_visit(self, visit: Visit) -> None:
        """Take what the device moved; one whose model is not finite is left out."""
        assert self.round is not None
        flats = self._replica.flat_parameters.adopt()
        moved = [flat.to(sums) - start for flat, sums, start in zip(flats, self._sums, self._start, strict=True)]
        sq_norm = math.fsum(float(torch.dot(part, part)) for part in moved)
        if not math.isfinite(sq_norm):
            self.left_out.append(visit.device)
            return
        fleet, reached = self.cohorts.fleet, self._reach.moved
        self.rule.end(visit.device, fleet.share(visit.device), moved, self._by_group(reached))
        far = max(reached)  # groups' rates are in the same proportion on every device
        own = Reached(far, max(self._reach.steps))
        if self.rule.normalises and far:
            moved = [part / far for part in moved]
            sq_norm /= far**2
        if self.config.rule == "fedasync":
            moved = [flat.to(sums, copy=True) for flat, sums in zip(flats, self._sums, strict=True)]
        heard = next(
            (each for each in self.round.heard if each.draw == visit.draw and each.device == visit.device), None
        )
        rests = self._rests.taken()
        if heard is None:
            self._held[visit.draw] = Sent(visit, moved, rests, own)
        else:
            self._add(heard, moved, rests, sq_norm, own)

    def _add(self, heard: Heard, moved: Flats, rests: Named, sq_norm: float, reached: Reached) -> None:
        gathered = self._gathered
        self._rests.add(rests, heard.weight, heard.scale)
        for sums, part in zip(gathered.sums, moved, strict=True):
            sums.add_(part, alpha=heard.weight * heard.scale)
        gathered.add(heard.weight, heard.scale, sq_norm, self.cohorts.fleet.share(heard.device), reached)

    def _by_group(self, values: list[float]) -> float | Flats:
        """A number for every parameter, from one for each parameter group."""
        if len(set(values)) == 1:
            return values[0]
        flats = [torch.ones_like(sums) for sums in self._sums]
        owner = {
            id(parameter): value
            for group, value in zip(self._replica.optimizer.param_groups, values, strict=True)
            for parameter in group["params"]
        }
        for key, number, place in self._replica.flat_parameters.places():
            flats[number][place] = owner.get(key, 1.0)
        return flats

    # ---- a round's end

    @torch.no_grad()
    def gather(self) -> tuple[int, ...]:
        """Make the replica the weighted mean of this rank's devices, as the rule has it; every rank calls it.

        Returns:
            Devices of all ranks that were left out since their models were not finite.
        """
        assert self.round is not None
        for heard in self.round.heard:
            if heard.draw in self._held:
                sent = self._held[heard.draw]
                sq_norm = math.fsum(float(torch.dot(part, part)) for part in sent.moved)
                self._add(heard, sent.moved, sent.rests, sq_norm, sent.reached)
        self._refuse_moved()
        gathered = self._gathered
        self._share, tau = self._agree(gathered)
        self._restore()
        self._gain = tau * self.rule.gain(self._share)
        offset = self.rule.offset()
        for number, (flat, start, sums) in enumerate(
            zip(self._replica.flat_parameters.adopt(), self._start, gathered.sums, strict=True)
        ):
            if not gathered.weight:
                continue
            mean = sums / gathered.weight
            if self.config.rule == "fedasync":
                mean -= start * (gathered.scaled / gathered.weight)
            mean *= self._gain
            if offset is not None:
                mean -= offset[number]
            flat.copy_(start + mean)
        self._rests.mean(gathered.weight)
        if not self._compare_ranks():
            return ()
        return tuple(sorted(device for theirs in self._via.gather_objects(self.left_out) for device in theirs))

    def _refuse_moved(self) -> None:
        """Parameters without a gradient would pass from one device to the next.

        Raises:
            ConfigError: names one that has moved.
        """
        new = self._rests.unfrozen()  # these are taken with the buffers
        moved = [name for name in self._replica.moved(buffers=False) if name not in new]
        if moved:
            raise ConfigError(
                f"parameter {moved[0]!r} requires no gradient, and moved: devices begin anew with what is trained and "
                "with buffers only; make it a buffer, or leave it as it is"
            )

    def _agree(self, gathered: Gathered) -> tuple[float, float]:
        """What all ranks' devices have together: their share of the objective, and by how much the mean of normalised
        displacements is to be multiplied."""
        mine = [gathered.weight, gathered.share, gathered.reach, gathered.steps]
        weight, share, reach, steps = self._via.sum_numbers(mine)
        self._reach_steps = steps / weight if weight else math.nan
        return share, reach / weight if self.rule.normalises and weight else 1.0

    def _compare_ranks(self) -> int:
        """The most devices that any rank left out.

        Raises:
            ConfigError: the devices of one rank began by other learning rates than those of another.
        """
        groups = len(self._replica.optimizer.param_groups)
        rates = self._rates or [-math.inf] * groups
        lowest = [-rate for rate in self._rates] if self._rates else [-math.inf] * groups
        most, *rest = self._via.most_numbers([len(self.left_out), *rates, *lowest])
        for number, (high, low) in enumerate(zip(rest[:groups], rest[groups:], strict=True)):
            if high != -low and math.isfinite(high):
                raise ConfigError(
                    f"the learning rate of group {number} is {-low} on one rank and {high} on another in round "
                    f"{self.cohorts.number}: {STEP_BETWEEN}"
                )
        return int(most)

    def weigh(self, report: Report) -> Report:
        """This rank's report, weighed by its devices; what it took is the virtual clock's."""
        assert self.round is not None
        gathered, parts, fleet = self._gathered, len(self.visits), self.cohorts.fleet
        inner = 0.0
        if gathered.weight and self.config.rule != "fedasync":
            norm = math.fsum(float(torch.dot(sums, sums)) for sums in gathered.sums)
            inner = max(0.0, gathered.sq_norms - norm / gathered.weight) * self._gain**2
        return replace(
            report,
            weight=gathered.weight,
            spread=inner,
            parts=parts,
            noise=math.fsum(1 / batch_sizes(fleet.sizes[each.device], each.batch)[0] for each in self.visits),
        )

    def known(self) -> dict[str, Any]:
        """Figures of the Observation that follow from the round itself."""
        assert self.round is not None
        return {
            "ranks": max(1, len(self.round.heard)),
            "steps": self.round.steps,
            "compute_s": self.round.compute_s,
            "slowest_compute_s": self.round.slowest_compute_s,
            "transfer_s": self.round.transfer_s,
            "sync_wait_s": max(0.0, self.round.ended_s - self.round.began_s - self.round.slowest_compute_s),
            "reach_steps": self._reach_steps,
        }

    @torch.no_grad()
    def end_round(self) -> DeviceRound:
        """The ranks have one model again; every rank calls it."""
        ended = self.round
        assert ended is not None
        flats = self._replica.flat_parameters.adopt()
        mean = [flat.to(sums) - start for flat, sums, start in zip(flats, self._sums, self._start, strict=True)]
        self.rule.end_round(mean, self._share, self._via)
        self.ever |= {visit.device for visit in ended.visits}
        for heard in ended.heard:
            self._held.pop(heard.draw, None)
        self._replica.reset_state()
        self._replica.remember_rests()
        self.round = None
        return ended

    def abandon(self) -> int | None:
        """The loop ends within a round: all that its devices did is dropped, and the model is the round's first again.

        Returns:
            The local step at which the round began; None where none is open.
        """
        if self.round is None:
            return None
        self._restore()
        self._replica.reset_state()
        self.cohorts.load_state_dict(self._before)
        for visit in self.round.visits:
            self._held.pop(visit.draw, None)
        self.rule.drop_round()
        self.round = None
        return self._round_from

    # ---- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, also in the middle of a round."""
        state: dict[str, Any] = {
            "cohorts": self.cohorts.state_dict(),
            "rule": self.rule.state_dict(),
            "ever": sorted(self.ever),
            "held": {
                str(draw): [asdict(sent.visit), sent.moved, sent.rests, [*sent.reached]]
                for draw, sent in self._held.items()
            },
            "round": None,
            "about": {"rule": self.config.rule, "sizes": list(self.cohorts.fleet.sizes)},
        }
        if self.round is not None:
            kept = {
                name: getattr(self._gathered, name)
                for name in ("weight", "scaled", "sq_norms", "share", "reach", "steps")
            }
            state["round"] = {
                "round": asdict(self.round),
                "turn": [self._turn, self._steps, self._round_from],
                "gathered": {**kept, "sums": self._gathered.sums},
                "start": self._start,
                "rests": self._rests.state_dict(),
                "before": self._before,
                "rates": self._rates,
                "reach": self._reach.state(),
                "left_out": self.left_out,
            }
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, once the model is loaded.

        Raises:
            ConfigError: it is of other devices, or of another rule.
        """
        self._refuse_others(state["about"])
        self.cohorts.load_state_dict(state["cohorts"])
        self.rule.load_state_dict(state["rule"])
        self.ever = set(state["ever"])
        self._held = {
            int(draw): Sent(
                Visit(**visit),
                [part.to(sums) for part, sums in zip(moved, self._sums, strict=True)],
                {name: tensor.to(self._start[0].device) for name, tensor in rests.items()},
                Reached(*reached),
            )
            for draw, (visit, moved, rests, reached) in state["held"].items()
        }
        saved = state["round"]
        self.round = None
        if saved is None:
            return
        self.round = DeviceRound.restored(saved["round"])
        self._turn, self._steps, self._round_from = saved["turn"]
        for mine, theirs in ((self._start, saved["start"]), (self._sums, saved["gathered"]["sums"])):
            for flat, value in zip(mine, theirs, strict=True):
                flat.copy_(value)
        self._gathered = Gathered(**{**saved["gathered"], "sums": self._sums})
        self._rests.load_state_dict(saved["rests"])
        self._before, self._rates = saved["before"], saved["rates"]
        self._reach.restore(saved["reach"])
        self.left_out = list(saved["left_out"])

    def _refuse_others(self, about: Mapping[str, Any]) -> None:
        sizes, mine = about["sizes"], self.cohorts.fleet.sizes
        if len(sizes) != len(mine):
            raise ConfigError(f"devices = {len(mine)}: the state is of {len(sizes)}; give the same devices")
        for device, (before, now) in enumerate(zip(sizes, mine, strict=True)):
            if before != now:
                raise ConfigError(
                    f"shards: device {device} has {now} samples, and had {before} in the state; give the same shards"
                )
        rule, saved = self.config.rule, about["rule"]
        if rule != saved and not {rule, saved} <= INTERCHANGEABLE:
            raise ConfigError(f"rule = {rule!r}: the state is of {saved!r}, which keeps other things; set it back")


def check_devices(config: FederatedConfig, optimizer: torch.optim.Optimizer, *, scaled: bool) -> None:
    """Refuse an optimizer that a rule cannot account for.

    Raises:
        ConfigError: names the rule and the mend.
    """
    plain = isinstance(optimizer, torch.optim.SGD)
    if config.rule in ("scaffold", "feddyn") and not plain:
        raise ConfigError(
            f"rule = {config.rule!r}: devices need torch.optim.SGD, not {type(optimizer).__name__}; choose fedavg"
        )
    if config.rule in CORRECTING and any(group.get("maximize") for group in optimizer.param_groups):
        raise ConfigError(
            f"rule = {config.rule!r}: adds to the gradient of a loss; negate the loss, with maximize=False"
        )
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if config.rule in CORRECTING and scaled and fused:
        raise ConfigError(
            f"rule = {config.rule!r}: adds to gradients, which a fused optimizer unscales too late; fused=False"
        )
