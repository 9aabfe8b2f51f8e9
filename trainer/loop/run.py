"""One run on one rank: what its configuration means, and what happens beside the steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from torch import nn

from trainer.config.config import to_dict
from trainer.control.controller import Phase
from trainer.control.rounds import Round
from trainer.data import DevicePictures, ShardStream, Transform, open_part, split_evenly
from trainer.errors import ConfigError
from trainer.log import LOG
from trainer.loop.ending import export_weights
from trainer.loop.facts import facts_of, planned, too_short
from trainer.loop.federated import device_figures, judge_all, judge_tuned
from trainer.loop.job import Job, stop_signals
from trainer.loop.lineage import Prepared
from trainer.loop.lock import RunLock
from trainer.loop.manifest import Manifest, load_rank
from trainer.loop.optimizer import learning_rate
from trainer.loop.random_state import random_state, restore_random_state
from trainer.loop.regroup import consensus
from trainer.loop.saving import Saving
from trainer.loop.start import Start, decided, described, find_start, prepare
from trainer.loop.step import LocalStep
from trainer.memory import peak_memory_bytes
from trainer.plan import observed, plain
from trainer.policies import policy_name
from trainer.records.writer import Records, RunRecords, open_records
from trainer.sync.local_sgd import LocalSGD

Summary = dict[str, Any]
PATIENCE_S = 5.0
"""Seconds that a checkpoint under way is given once the run has failed."""
TIMES = ("elapsed_s", "compute_s", "sync_wait_s", "input_wait_s", "eval_s", "checkpoint_s")


class Run:
    """What happens beside the steps: records, evaluations, checkpoints, all off the training clock."""

    def __init__(
        self, job: Job, sync: LocalSGD, step: LocalStep, stream: ShardStream | DevicePictures, alone: float | None
    ) -> None:
        self._job, self._sync, self._step, self._stream = job, sync, step, stream
        self._config = job.config
        self._saving = Saving(job.folder / "checkpoints", job.config.checkpoint.keep, sync.world)
        self._lock: RunLock | None = None
        self._id = ""
        self._records = Records()
        self._close, self._records_end = ExitStack(), ExitStack()
        self._alone = alone
        self._best = 0.0
        self._last: dict[str, float] = {}
        self._skipped = 0
        self._virtual_s = 0.0
        self._over_devices: dict[str, Any] = {}
        self._saved = -1
        self._facts: dict[str, Any] = {}
        self._earlier_s = 0.0
        self._next_eval = job.config.eval.every_samples
        self._next_save = job.config.checkpoint.every_samples
        self._save_at = math.inf

    def __enter__(self) -> Run:
        """Start afresh, or go on from the checkpoint that is asked for; off the training clock."""
        try:
            with self._sync.clock.off("other"):
                self._open()
        except BaseException:
            self._saving.close(0)
            self._close.close()
            raise
        return self

    def _open(self) -> None:
        sync, folder, via = self._sync, self._job.folder, self._sync.collectives
        if isinstance(self._stream, ShardStream) and self._config.world.elastic is not None:
            self._stream.regroup(sync.world, ())
        if sync.is_newcomer:
            self._join()
            return
        decided(via, self._take_lock)
        start = find_start(self._config, folder, sync.replica.model, via)
        prepared = decided(via, lambda: self._prepare(start))
        state = self._load(start)
        self._id = start.run
        self._close.enter_context(self._records_end)
        self._records = self._records_end.enter_context(open_records(folder, self._config, rank=via.rank))
        self._close.enter_context(stop_signals(sync))
        self._facts = facts_of(self._job, sync.world)
        self._save_later()
        if prepared.aside is not None:
            self._records.say(f"{folder} held an earlier run: it is now {prepared.aside}")
        if state is not None:
            self._restore(state, start)
        else:
            self._begin()
        for warning in (*start.warnings, *([prepared.warning] if prepared.warning else ())):
            self._records.event("warning", message=warning)
        sync.carry("run", self)
        if prepared.abandoned is not None:
            self._records.say(f"what followed step {sync.local_step} is now in {prepared.abandoned}")

    def _join(self) -> None:
        """Come to a run that is under way: the others tell how far it is."""
        self._saving.regroup(self._sync.world)
        self._close.enter_context(self._records_end)
        self._close.enter_context(stop_signals(self._sync))
        self._facts = facts_of(self._job, self._sync.world)
        self._sync.carry("run", self)

    def state_dict(self) -> dict[str, Any]:
        """What a newcomer must know of the run."""
        return {**self._carried(), "run": self._id, "skipped": self._skipped, "facts": self._facts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Know what another rank knows of the run."""
        self._best, self._last, self._skipped, self._alone = (state[n] for n in ("best", "last", "skipped", "alone"))
        self._next_eval, self._next_save = state["next_eval"], state["next_save"]
        self._id, self._facts = state["run"], state["facts"]
        self._earlier_s = state["wall_s"] - (time.time() - self._job.started_s)

    def _carried(self) -> dict[str, Any]:
        return {
            "best": self._best,
            "last": self._last,
            "alone": self._alone,
            "next_eval": self._next_eval,
            "next_save": self._next_save,
            "wall_s": self._wall_s(),
        }

    def catch_up(self) -> None:
        """A newcomer does first what the others do after the step that let it in."""
        if self._sync.is_newcomer:
            self.follow()
            self.evaluate_if_due()
            self.save_if_due()

    def follow(self) -> None:
        """Where the ranks have changed: the first of them writes, and all know with whom they save."""
        for change in self._sync.regroupings():
            self._saving.regroup(self._sync.world)
            self._write_as(change.rank)
            left = {str(rank): why for rank, why in change.left.items()}
            numbers = {"local_step": change.local_step, "took_s": round(change.took_s, 3)}
            self._records.event("regrouped", ranks=change.ranks, left=left, joined=list(change.joined), **numbers)

    def _write_as(self, rank: int) -> None:
        """Write the records, or no longer: they are the first rank's."""
        writes = isinstance(self._records, RunRecords)
        if writes == (rank == 0):
            return
        if writes:
            self._records_end.close()
            self._records = Records()
            return
        try:
            self._take_lock()
            problem = None
        except ConfigError as error:
            problem = str(error)
        self._records = self._records_end.enter_context(open_records(self._job.folder, self._config, rank=0))
        if problem is not None:
            self._records.event("warning", message=f"the folder's lock was not taken over: {problem}")
        self._save_later()

    def _take_lock(self) -> None:
        self._lock = RunLock(self._job.folder)
        self._close.callback(self._lock.release)

    def _prepare(self, start: Start) -> Prepared:
        assert self._lock is not None
        return prepare(start, self._config, self._job.folder, self._lock)

    def _begin(self) -> None:
        """Say what will be trained, and enter the first phase."""
        self._records.event("started", **self._facts, **planned(self._config))
        if (words := too_short(self._config, self._sync.world.size)) is not None:
            self._records.event("warning", message=words)
        self._enter(self._sync.controller.phase)

    def _enter(self, phase: Phase) -> None:
        rank, step = self._sync.world.rank, self._sync.local_step
        LOG.debug("rank %d, step %d: phase %d, %s: %s", rank, step, phase.number, phase.name, phase.plan)
        self._records.phase(phase)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._saving.close(PATIENCE_S)
        self._close.close()
        self._stream.close()

    def _load(self, start: Start) -> dict[str, Any] | None:
        """What the checkpoint holds for this rank; None without one."""
        if start.checkpoint is None or start.manifest is None:
            return None
        wrote, world = start.manifest.ranks, self._sync.world
        if wrote == world.size:
            return load_rank(start.checkpoint, world.rank)
        return consensus(start.checkpoint, wrote, self._config.sync.state)

    def _restore(self, state: dict[str, Any], start: Start) -> None:
        sync, wrote, ranks = self._sync, state["sync"]["ranks"], self._sync.world.size
        sync.replica.model.load_state_dict(state["model"])
        sync.optimizer.load_state_dict(state["optimizer"])
        past = [(count, read) for count, read in state["past"]]
        if wrote == ranks:
            sync.load_state_dict(state["sync"])
            restore_random_state(state["random"], sync.world.device)
        else:
            sync.load_consensus(state["sync"])
            past.append((wrote, state["consumed"]))
        if past and isinstance(self._stream, ShardStream):
            data, seed = self._config.data, self._config.run.seed
            self._stream.deal_anew(open_part(data, train=True, seed=seed), past)
        self._stream.seek(state["consumed"] if wrote == ranks else 0)
        self._step.scaler.load_state_dict(state["scaler"])
        self._best, self._skipped, self._alone = state["best"], state["skipped"], state["alone"]
        self._last, self._saved = state["last"], sync.local_step
        self._virtual_s = state["virtual_s"]
        config, samples = self._config, self._sync.samples
        self._next_eval = _mark(state["next_eval"], config.eval.every_samples, samples)
        self._next_save = _mark(state["next_save"], config.checkpoint.every_samples, samples)
        self._facts["started_at"], self._earlier_s = state["started_at"], state["wall_s"]
        LOG.debug("rank %d: resumed at step %d", sync.world.rank, sync.local_step)
        self._records.say_start(self._facts | planned(self._config))
        self._records.event("resumed", local_step=sync.local_step, samples=sync.samples)
        for line in start.changed:
            self._records.event("changed", message=line)

    def rate(self) -> float:
        """The scheduled learning rate of the next step, before the plan's scale."""
        return learning_rate(self._config.optim, self._sync.samples, self._config.run.samples)

    def record(self, rounds: Iterable[Round]) -> None:
        """Write down rounds that ended."""
        for ended in rounds:
            self._record(ended)

    def _record(self, ended: Round) -> None:
        """Write down one round, and the phase that begins after it."""
        seen, times = ended.seen, self._sync.clock.read()
        self._skipped += seen.skipped_steps
        figures = {
            "round": seen.round,
            "phase": ended.phase.number,
            "local_step": seen.local_step,
            "samples": seen.samples,
            "plan": plain(ended.phase.plan),
            "lr": self._sync.optimizer.param_groups[0]["lr"] * self._sync.lr_scale,
            "train_loss": seen.train_loss,
            **{name: times[name] for name in TIMES},
            "wire_bytes": round(self._sync.collectives.sent_bytes),
            "transfer_s": _measured(seen.transfer_s),
            "delay_steps": seen.delay_steps,
            "divergence": _measured(seen.divergence),
            "grad_noise_scale": _measured(seen.noise_scale),
            "skipped_steps": seen.skipped_steps,
            "seen": observed(seen),
            "decided": {
                "phase": ended.decision.phase,
                "plan": plain(ended.decision.plan),
                "why": ended.decision.why,
            },
        }
        if ended.devices is not None:
            figures |= device_figures(ended.devices)
            self._virtual_s = ended.devices.ended_s
        self._records.write("round", figures)
        if ended.devices is not None and not ended.devices.heard:
            self._records.event("too few reports: the model is kept", round=seen.round, local_step=seen.local_step)
        if ended.left_out:
            self._records.event("left out", ranks=list(ended.left_out), local_step=seen.local_step)
        if ended.devices is not None and ended.devices.left_out:
            self._records.event("left out", devices=list(ended.devices.left_out), local_step=seen.local_step)
        if ended.next_phase is not None:
            self._enter(ended.next_phase)
        if ended.skipped_in_a_row >= self._config.step.max_skipped_steps:
            raise FloatingPointError(
                f"no finite loss and gradient in {ended.skipped_in_a_row} local steps in a row, up to step "
                f"{seen.local_step}: lower optim.lr, set optim.clip_norm, or raise step.max_skipped_steps"
            )

    def evaluate_if_due(self) -> None:
        """Evaluate at the first round's end past each mark."""
        every = self._config.eval.every_samples
        if self._next_eval is not None and self._sync.samples >= self._next_eval and self._sync.between_rounds:
            assert every is not None
            self._sync.together(self._evaluate)
            self._next_eval = (self._sync.samples // every + 1) * every
            self.follow()

    def save_if_due(self) -> None:
        """Write a checkpoint where it is time, also in the middle of a round; and tell what became of those before."""
        for trouble in self._saving.troubles():
            self._records.event("warning", message=trouble)
        if time.monotonic() >= self._save_at:
            self._save_at = math.inf
            self._sync.ask_to_save()
        every, asked = self._config.checkpoint.every_samples, self._sync.take_save()
        if self._next_save is not None and self._sync.samples >= self._next_save:
            assert every is not None
            self._next_save = (self._sync.samples // every + 1) * every
            asked = True
        if asked:
            self._save()

    def _save_later(self) -> None:
        """Rank 0's clock says when the next checkpoint is asked for."""
        every_s = self._config.checkpoint.every_s
        self._save_at = time.monotonic() + every_s if every_s and self._sync.world.rank == 0 else math.inf

    def stop(self) -> None:
        """Told to stop: leave a checkpoint that `run.resume auto` goes on from."""
        self._records.event("stopped", local_step=self._sync.local_step, samples=self._sync.samples)
        self._save()
        self._await_save()

    def end(self) -> Summary:
        """Average what is left, evaluate the consensus model, and sum up; the figures, and this rank."""
        self.record(self._sync.finish())
        if self._last.get("samples") != self._sync.samples or (self._job.hosted and not self._over_devices):
            self._sync.together(self._evaluate)
            self.follow()
        self._judge_tuned()
        self._save()
        self._await_save()
        if self._sync.world.rank == 0:
            for trouble in export_weights(self._sync.replica.model, self._job.folder):
                self._records.event("warning", message=trouble)
        summary = self._summary()
        self._records.finish(summary)
        return summary | {"rank": self._sync.world.rank}

    def _evaluate(self) -> None:
        config, sync = self._config, self._sync
        self.record(sync.settle())
        with sync.clock.off("eval"):
            transform = Transform.of(self._job.test_part, config.data, sync.world.device, train=False)
            batches = split_evenly(self._job.test_part, sync.world, config.eval.batch, transform, config.data.workers)
            calibration = self._stream.sample_inputs(config.sync.recalibrate_samples, config.eval.batch)
            with sync.consensus(calibration) as model:
                result = self._step.evaluate(model, batches, sync.collectives)
                self._judge_devices(model)
        sync.saw_accuracy(result.accuracy)
        self._best = max(self._best, result.accuracy)
        self._last = {
            "local_step": sync.local_step,
            "samples": sync.samples,
            "elapsed_s": sync.clock.read()["elapsed_s"],
            "test_loss": result.loss,
            "test_accuracy": result.accuracy,
        }
        about = {"virtual_s": self._virtual_s} if self._job.hosted is not None else {}
        self._records.write("eval", {**self._last, **about, **self._over_devices})

    def _judge_devices(self, model: nn.Module) -> None:
        """The consensus model on devices' own held-out samples."""
        hosted, source = self._job.hosted, self._stream
        if hosted is None or not isinstance(source, DevicePictures) or not self._config.data.test_share:
            return
        assert self._sync.devices is not None
        self._over_devices = judge_all(
            hosted, model, self._step, source, self._config.eval.batch, self._sync.collectives
        ).figures(self._sync.devices_ever)

    def _judge_tuned(self) -> None:
        """At the end: the same after each device trained on with its own samples."""
        hosted, source = self._job.hosted, self._stream
        wanted = self._config.data.test_share and self._config.federated.finetune_steps
        if hosted is None or not isinstance(source, DevicePictures) or not wanted:
            return
        with self._sync.clock.off("eval"):
            rate = self._rate_at_end()
            tuned = judge_tuned(hosted, self._sync, self._step, source, self._config, rate)
        self._over_devices |= tuned.figures(self._sync.devices_ever, prefix="tuned_")

    def _rate_at_end(self) -> float:
        """The rate of the latest round, since a schedule's end may be zero."""
        return float(self._sync.optimizer.param_groups[0]["lr"])

    def _save(self) -> None:
        sync = self._sync
        if self._saved == sync.local_step:
            return
        self._saved = sync.local_step
        with sync.clock.off("checkpoint"):
            if self._lock is not None and not self._lock.is_held:
                raise ConfigError(f"run.name = {self._job.folder.name!r}: another run has taken over this folder")
            self._records.event("checkpoint", local_step=sync.local_step, samples=sync.samples)
            model = sync.replica.model
            about = Manifest(
                run=self._id,
                local_step=sync.local_step,
                samples=sync.samples,
                ranks=sync.world.size,
                written_at=datetime.now(UTC).isoformat(timespec="seconds"),
                parameters=described(model),
                config=to_dict(self._config),
                metrics_bytes=self._records.offset,
            )
            trained = {f"model.{name}" for name, each in model.named_parameters() if each.requires_grad}
            self._saving.begin(about, self._state(), trained, self._records.sync)
            LOG.debug("rank %d: saved at step %d", sync.world.rank, sync.local_step)
        self._save_later()

    def _state(self) -> dict[str, Any]:
        """All that this rank needs to go on as if nothing had happened."""
        sync = self._sync
        return {
            "model": sync.replica.model.state_dict(),
            "optimizer": sync.optimizer.state_dict(),
            "random": random_state(sync.world.device),
            "sync": sync.state_dict(),
            "consumed": self._stream.consumed,
            "past": [list(world) for world in self._stream.past] if isinstance(self._stream, ShardStream) else [],
            "scaler": self._step.scaler.state_dict(),
            **self._carried(),
            "skipped": self._skipped,
            "virtual_s": self._virtual_s,
            "started_at": self._facts["started_at"],
        }

    def _await_save(self) -> None:
        with self._sync.clock.off("checkpoint"):
            self._saving.wait()
        for trouble in self._saving.troubles():
            self._records.event("warning", message=trouble)

    def _wall_s(self) -> float:
        """Seconds since the run began, without those between a stop and a resume."""
        return self._earlier_s + time.time() - self._job.started_s

    def _summary(self) -> Summary:
        sync, times = self._sync, self._sync.clock.read()
        rate = sync.samples / times["elapsed_s"]
        return {
            "name": self._config.run.name,
            "policy": policy_name(self._config.policy),
            "local_steps": sync.local_step,
            "rounds": sync.rounds,
            "phases": sync.controller.phase.number + 1,
            "samples": sync.samples,
            **{name: times[name] for name in TIMES},
            "wire_bytes": round(sync.collectives.sent_bytes),
            "samples_per_s": rate,
            "reference_samples_per_s": self._alone,
            "scaling_speedup": rate / self._alone if self._alone else None,
            "test_accuracy": self._last["test_accuracy"],
            "best_test_accuracy": self._best,
            "skipped_steps": self._skipped,
            "peak_memory_bytes": peak_memory_bytes(sync.world.device),
            **self._facts,
            **({"virtual_s": self._virtual_s} if self._job.hosted is not None else {}),
            **self._over_devices,
            "wall_s": self._wall_s(),
        }


def _measured(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def _mark(saved: int | None, every: int | None, samples: int) -> int | None:
    """Samples at which something is due next: as the checkpoint has it, unless it is done now and was not then."""
    if every is None or saved is not None:
        return saved if every is not None else None
    return (samples // every + 1) * every
