"""Facts of a run, told before its first step: data, model, ranks, device, and what is planned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from trainer.config.config import Config
from trainer.distributed.world import World, versions
from trainer.loop.job import Job, device_name
from trainer.plan import Plan, plain
from trainer.policies import Policy, policy_name
from trainer.tasks import parameter_count


def facts_of(job: Job, world: World) -> dict[str, Any]:
    """The facts of a run, as its records and its page hold them."""
    config = job.config
    return {
        "data": config.data.name,
        "data_samples": job.data_samples,
        "model": config.task.model,
        "parameters": parameter_count(job.model),
        "world_size": world.size,
        "device": device_name(world.device),
        "versions": versions(),
        "started_at": datetime.fromtimestamp(job.started_s, UTC).isoformat(timespec="seconds"),
    }


def plans_of(policy: Policy) -> list[Mapping[str, Any]]:
    """The Plans that a policy starts from, with the names of its fields where they have any."""
    named = [(each.name, getattr(policy, each.name)) for each in fields(policy)]
    plans = [(name, value) for name, value in named if isinstance(value, Plan) and name != "plan"]
    return [{"name": name} | plain(plan) for name, plan in plans or [("", plan) for plan in policy.plans()]]


def planned(config: Config) -> dict[str, Any]:
    """The Plans that the configuration names."""
    return {
        "policy": policy_name(config.policy),
        "plans": plans_of(config.policy),
        "planned_samples": config.run.samples,
    }


def too_short(config: Config, ranks: int) -> str | None:
    """Words for a run that will end before its second phase."""
    begins = config.policy.second_phase_at(ranks)
    if begins is None or begins < config.run.samples:
        return None
    return (
        f"run.samples = {config.run.samples}: the second phase begins after {begins:,} samples, so there will be one "
        "phase; train more, or give the phase's length as a share of the run, such as 0.25"
    )
