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
        gradients: their average.
        notes: on the gradients that are averaged over all ranks.
        settings: of the run, before what a Plan says itself.
        scaler: the loss scaler, where one is used.
    """

    def __init__(
        self,
        replica: Replica,
        averager: Averager,
        timetable: Timetable,
        gradients: GradientAverage,
        notes: GradientNotes,
        settings: SyncConfig,
        scaler: GradScaler | None,
    ) -> None:
        self._replica, self._averager, self._timetable, self._gradients = replica, averager, timetable, gradients
        self._notes, self._settings, self._scaler = notes, settings, scaler

    def enter(self, plan: Plan, before: Plan) -> None:
        """Go from the Plan before to this one; every rank calls it, between two rounds."""
        settings = self._settings.under(plan)
        if plan.averages != before.averages or settings != self._averager.settings:
            self._timetable.make_one()
        if settings != self._averager.settings:
            self._timetable.use(settings)
        if plan.averages == before.averages:
            return
        if before.averages == "gradients":
            self._averager.rebase()
        elif plan.averages == "gradients":
            self.unite()
        if "gradients" in (plan.averages, before.averages):
            self.wrap(plan)

    def mend(self, plan: Plan) -> None:
        """Averaged gradients have met replicas that were not one: some rank made no update. Make them one again."""
        self._timetable.part_again()
        self._timetable.make_one()
        self._averager.rebase()
        self.unite()
        self.wrap(plan)

    def relayout(self, plan: Plan) -> None:
        """Take in layers that were unfrozen, frozen, added or replaced since; every rank calls it, between two rounds.

        Raises:
            MismatchError: models that differ in more than values.
        """
        self._timetable.make_one()
        self._averager.relayout()
        if plan.averages == "gradients":
            self.unite()
        self.wrap(plan)

    def unite(self) -> None:
        """Make optimizer state, loss scale and all that is no member the same on every rank."""
        if self._settings.state == "reset":
            self._replica.reset_state()
        else:
            self._replica.average_state()
        if self._scaler is not None:
            agree_on_scale(self._scaler, self._replica.collectives)
        self._replica.unite(buffers=self._settings.batch_norm == "average")

    def wrap(self, plan: Plan) -> None:
        """Average gradients as the Plan says: over all ranks, over a node's, or not."""
        via, parameters = self._replica.collectives, self._replica.parameters
        if plan.averages == "gradients":
            self._gradients.put_on(parameters, via.for_gradients(), self._notes)
        else:
            self._gradients.put_on(parameters, via.within if self._settings.node_period_steps == 1 else None)


def agree_on_scale(scaler: GradScaler, collectives: Collectives) -> None:
    """Give every rank the smallest loss scale of any, and the fewest steps since one last grew."""
    everyones = collectives.gather(scaler.state_dict())
    own = scaler.state_dict()
    scaler.load_state_dict({name: type(value)(min(each[name] for each in everyones)) for name, value in own.items()})
