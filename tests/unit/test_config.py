"""Recipes and flags: what overrides what, what is saved, and one line for each class of bad input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.config import recipes
from trainer.config.config import Config, OptimConfig, check_ranks, digest
from trainer.errors import ConfigError
from trainer.plan import Plan
from trainer.policies import Alternating, Constant, PostLocal

RECIPES = sorted((Path(__file__).parents[2] / "launch" / "recipes").glob("*.toml"))


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.toml"
    path.write_text(text)
    return str(path)


def test_flags_override_the_recipe_and_the_recipe_the_defaults(tmp_path: Path) -> None:
    recipe = write(tmp_path, "[optim]\nlr = 0.5\nmomentum = 0.8\n[policy.small]\nbatch_per_rank = 7\n")
    config = recipes.parse(["--recipe", recipe, "--optim.lr", "0.25", "--policy.small.sync-period-steps", "3"], "x")
    assert (config.optim.lr, config.optim.momentum) == (0.25, 0.8)
    assert config.optim.weight_decay == OptimConfig().weight_decay
    assert config.policy == Alternating(small=Plan(7, 3))


def test_a_policys_own_fields_follow_its_name(tmp_path: Path) -> None:
    named = recipes.parse(["--policy.name", "constant", "--policy.batch-per-rank", "9"], "x")
    assert named.policy == Constant(Plan(9, 16))
    recipe = write(tmp_path, '[policy]\nname = "constant"\nbatch_per_rank = 5\nsync_period_steps = 2\n')
    assert recipes.parse(["--recipe", recipe], "x").policy == Constant(Plan(5, 2))
    assert recipes.parse(["--recipe", recipe, "--policy.name", "post_local"], "x").policy == PostLocal()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_saved_configuration_is_a_recipe_of_itself(recipe: Path, tmp_path: Path) -> None:
    config = recipes.load(recipe).named()
    recipes.save(config, tmp_path / "config.toml")
    assert recipes.load(tmp_path / "config.toml") == config
    assert digest(recipes.load(tmp_path / "config.toml")) == digest(config)


@pytest.mark.parametrize("policy", [Constant(), Alternating(cycles=2, last="small"), PostLocal(switch_samples=5)])
def test_every_policy_survives_saving(policy: Alternating, tmp_path: Path) -> None:
    config = Config(policy=policy, optim=OptimConfig(schedule="step", milestones=(3, 9)))
    recipes.save(config, tmp_path / "config.toml")
    assert recipes.load(tmp_path / "config.toml") == config


BAD_RECIPES = {
    "unknown section": ("[optm]\nlr = 1\n", "optm"),
    "unknown key": ("[optim]\nlearning_rate = 1\n", "optim.learning_rate = 1: unknown"),
    "key of another policy": ('[policy]\nname = "constant"\nsamples_per_phase = 3\n', "policy.samples_per_phase = 3"),
    "wrong type": ('[run]\nsamples = "many"\n', "run.samples = 'many': must be a whole number"),
    "fraction for a count": ("[run]\nsamples = 1.5\n", "run.samples = 1.5: must be a whole number"),
    "truth for a count": ("[run]\nsamples = true\n", "run.samples = True: must be a whole number"),
    "no table": ("optim = 3\n", "optim = 3: must be a table"),
    "batch 0": ("[policy.small]\nbatch_per_rank = 0\n", "policy.small.batch_per_rank = 0: must be at least 1"),
    "no period": (
        "[policy.large]\nsync_period_steps = -1\n",
        "policy.large.sync_period_steps = -1: must be",
    ),
    "unknown policy": (
        '[policy]\nname = "magic"\n',
        "policy.name = 'magic': choose one of adaptive_period",
    ),
    "unknown choice": ('[sync]\nstate = "forget"\n', "sync.state = 'forget': choose one of keep, average, reset"),
    "unbuilt wire format": ('[sync]\nwire_format = "int3"\n', "sync.wire_format = 'int3': choose one of float32"),
    "no TOML": ("[optim\n", "is not TOML"),
    "Nesterov without momentum": ("[optim]\nmomentum = 0.0\n", "optim.nesterov = True: needs optim.momentum"),
    "policy's missing field": ('[policy]\nname = "test_config:Incomplete"\n', "policy.period is missing"),
}


@pytest.mark.parametrize(("text", "said"), BAD_RECIPES.values(), ids=BAD_RECIPES.keys())
def test_bad_recipes(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        recipes.parse(["--recipe", write(tmp_path, text)], "x")
    assert said in str(refused.value)
    assert recipes.refuse(refused.value, "x") == 2
    assert capsys.readouterr().err.count("\n") == 1


BAD_FLAGS = {
    "unknown flag": (["--optm.lr", "1"], "--optm.lr"),
    "wrong type": (["--optim.lr", "fast"], "--optim.lr"),
    "no value": (["--optim.lr"], "--optim.lr"),
    "impossible value": (["--run.samples", "0"], "run.samples = 0: must be at least 1"),
    "impossible plan": (
        ["--policy.small.batch-per-rank", "-3"],
        "policy.small.batch_per_rank = -3: must be at least 1",
    ),
    "flat plan": (
        ["--policy.name", "constant", "--policy.batch-per-rank", "0"],
        "policy.batch_per_rank = 0: must be at least 1",
    ),
    "no such recipe": (["--recipe", "/nowhere.toml"], "'/nowhere.toml': cannot be read"),
    "no policy": (["--policy.name", "magic"], "policy.name = 'magic'"),
}


@pytest.mark.parametrize(("flags", "said"), BAD_FLAGS.values(), ids=BAD_FLAGS.keys())
def test_bad_flags(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        recipes.parse(flags, "x")
    capsys.readouterr()
    assert said in str(refused.value)
    recipes.refuse(refused.value, "x")
    assert capsys.readouterr().err.count("\n") == 1


PLACE = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
BAD_JOBS = {
    "flag": (["--run.samples", "0"], "run.samples = 0"),
    "more ranks than samples to train": (["--run.samples", "1"], "run.samples = 1: must be at least one a rank (2)"),
    "more ranks than samples in the data": (["--data.train-limit", "1"], "data set of 1 samples: too few for 2 ranks"),
    "another world": (["--world.ranks", "8"], "world.ranks = 8: the launcher started 2"),
    "model": (["--task.model", "resnet19"], "task.model = 'resnet19'"),
    "data": (["--data.name", "fashion_minst"], "data.name = 'fashion_minst'"),
    "reference": (["--run.reference", "nowhere"], "run.reference = 'nowhere'"),
    "own class": (["--task.model", "no.such:thing"], "task.model = 'no.such:thing'"),
    "own policy": (["--policy.name", "collections:Counter"], "must name a subclass of trainer.Policy"),
}


@pytest.mark.parametrize(("flags", "said"), BAD_JOBS.values(), ids=BAD_JOBS.keys())
def test_what_only_torch_can_tell_is_refused_too(
    flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # no peer and no rendezvous exists here, so a rank that tried to join a group would not come back
    for name, value in (PLACE | {"RANK": "0", "LOCAL_RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert main(["--data.name", "fake", *flags]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1, told


def test_ranks_are_checked() -> None:
    check_ranks(Config(), 4)
    with pytest.raises(ConfigError, match="mend its --nnodes"):
        check_ranks(recipes.from_dict({"world": {"ranks": 2}}), 3)


def test_the_digest_leaves_out_where_files_lie() -> None:
    here, there = (recipes.from_dict({"run": {"root": root}, "data": {"root": root}}) for root in ("a", "b"))
    assert digest(here) == digest(there)
    assert digest(here) != digest(recipes.from_dict({"run": {"seed": 1}}))


@dataclass(frozen=True, kw_only=True)
class Incomplete(Constant):
    """A policy of a user's own with a field that has no default."""

    period: int
