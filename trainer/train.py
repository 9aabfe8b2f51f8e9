"""train(config): the loop, from a configuration to a run directory."""

from __future__ import annotations

from trainer.config.config import Config, digest
from trainer.data import ShardStream
from trainer.distributed.world import World, compare_ranks, open_world
from trainer.loop.ending import draw_report
from trainer.loop.job import Job
from trainer.loop.optimizer import build_optimizer, may_fuse, set_learning_rate
from trainer.loop.reference import measure_alone
from trainer.loop.run import Run, Summary
from trainer.sync.local_sgd import LocalSGD


def train(config: Config) -> Summary | None:
    """Train one run; every rank of the world calls this with the same configuration.

    Returns:
        The end's figures, as in summary.json, and this rank; None where the run was told to stop and wrote a checkpoint
        instead.

    Raises:
        ConfigError: a configuration that cannot hold; most of these come before any process group exists.
        MismatchError: ranks that disagree about the job.
        PeerError: a peer went away.
        FloatingPointError: too many steps in a row without a finite loss.
    """
    job = Job.open(config.named())
    mine = digest(job.config)
    with open_world(config.world, mine) as world:
        compare_ranks(world, mine)
        summary = train_in(world, job)
    if summary is not None and summary["rank"] == 0 and job.config.record.report:
        draw_report(job)
    return summary


def train_in(world: World, job: Job) -> Summary | None:
    """The loop itself, in a world that is open."""
    config = job.config
    model, step = job.build(world)
    optimizer = build_optimizer(config.optim, model.parameters(), fused=may_fuse(model, step.scaler))
    stream = ShardStream(job.shard, config.data, world, config.run.seed)
    alone = job.alone
    if alone is None and config.world.elastic is None:  # else all would measure at once, and disturb one another
        alone = measure_alone(config, step.loss, model, stream, world)
    source, devices = job.source(stream, world)

    settings, policy = config.sync, config.policy
    with (
        LocalSGD(model, optimizer, policy, settings=settings, world=world, scaler=step.scaler, devices=devices) as sync,
        Run(job, sync, step, source, alone) as run,
    ):
        run.catch_up()
        for inputs, labels in sync.batches(source, config.run.samples):
            set_learning_rate(optimizer, run.rate())
            trained = step(sync, inputs, labels)
            run.record(sync.step(trained.loss, skipped=trained.skipped, correct=trained.correct))
            run.follow()
            run.evaluate_if_due()
            run.save_if_due()
        if not sync.stopping:
            return run.end()
        run.stop()
        return None
