"""From one Plan to the next: what all ranks must have in common before its first local step."""

from __future__ import annotations

from torch.amp.grad_scaler import GradScaler

from trainer.config.sync import SyncConfig
from trainer.distributed.collectives import Collectives
from trainer.plan import Plan
from trainer.sync.averager import Averager
from trainer.sync.gradient_average import GradientAverage
from trainer.sync.gradient_notes import GradientNotes
from trainer.sync.replica import Replica
from trainer.sync.timetable import Timetable


class Transition:
    """Makes the ranks ready for a Plan: period 1 needs one model, one optimizer state and one loss scale on all of
    them, and another way of averaging begins from one model.

    Args:
        replica: this rank's.
        averager: of parameters.
        timetable: when they are averaged.
        parallel: of gradients.
        notes: on the gradients that are averaged over all ranks.
        settings: of the run, before what a Plan says itself.
        scaler: the loss scaler, where one is used.
    """

    def __init__(
        self,
        replica: Replica,
        averager: Averager,
        timetable: Timetable,
        parallel: GradientAverage,
        notes: GradientNotes,
        settings: SyncConfig,
        scaler: GradScaler | None,
    ) -> None:
        self._replica, self._averager, self._timetable, self._parallel = replica, averager, timetable, parallel
        self._notes, self._settings, self._scaler = notes, settings, scaler

    def enter(self, plan: Plan, before: Plan, *, no_gradient: bool) -> None:
        """Go from the Plan before to this one; every rank calls it, between two rounds.

        Args:
            plan: to be entered.
            before: what ran until now.
            no_gradient: some backward pass has left a parameter out.
        """
        kind, kind_before = min(plan.sync_period_steps, 2), min(before.sync_period_steps, 2)
        settings = self._settings.under(plan)
        if kind != kind_before or settings != self._averager.settings:
            self._timetable.make_one()
        if settings != self._averager.settings:
            self._timetable.use(settings)
        if kind == kind_before:
            return
        if kind_before == 1:
            self._averager.rebase()
            self.wrap(plan, no_gradient=no_gradient)
        elif kind == 1:
            if self._settings.state == "reset":
                self._replica.optimizer.state.clear()
            else:
                self._replica.average_state()
            if self._scaler is not None:
                agree_on_scale(self._scaler, self._replica.collectives)
            self.wrap(plan, no_gradient=no_gradient)

    def wrap(self, plan: Plan, *, no_gradient: bool) -> None:
        """Put DDP round the model while gradients are averaged, over all ranks or a node's, and only then."""
        via, find_unused = self._replica.collectives, self._settings.find_unused_parameters or no_gradient
        if plan.sync_period_steps == 1:
            self._parallel.put_on(via, self._notes, find_unused=find_unused)
        else:
            nodes = via.within if self._settings.node_period_steps == 1 else None
            self._parallel.put_on(nodes, find_unused=find_unused)


def agree_on_scale(scaler: GradScaler, collectives: Collectives) -> None:
    """Give every rank the smallest loss scale of any, and the fewest steps since one last grew."""
    everyones = collectives.gather(scaler.state_dict())
    own = scaler.state_dict()
    scaler.load_state_dict({name: type(value)(min(each[name] for each in everyones)) for name, value in own.items()})
