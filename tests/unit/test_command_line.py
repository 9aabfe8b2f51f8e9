"""The command line as strangers type it: slips work, or are mended in one line before torch is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro

from trainer.config import flags, places, recipes
from trainer.config.config import Config
from trainer.errors import ConfigError
from trainer.plan import Plan
from trainer.policies import POLICIES, Alternating, Constant, PostLocal

Field = Callable[[Config], object]
WORKS: dict[str, tuple[str, Field, object]] = {
    "a truth as a word": ("--data.flip true", lambda c: c.data.flip, True),
    "a truth behind =": ("--data.flip=True", lambda c: c.data.flip, True),
    "an untruth": ("--data.on-device=false", lambda c: c.data.on_device, False),
    "a truth that another flag follows": ("--data.flip --run.seed 3", lambda c: (c.data.flip, c.run.seed), (True, 3)),
    "a negated flag": ("--data.no-on-device", lambda c: c.data.on_device, False),
    "a negated flag with a word": ("--data.no-on-device false", lambda c: c.data.on_device, True),
    "a power of ten": ("--run.samples 1e5", lambda c: c.run.samples, 100_000),
    "an underscore in a number": ("--run.samples 120_000", lambda c: c.run.samples, 120_000),
    "an equals sign": ("--run.samples=5_000", lambda c: c.run.samples, 5_000),
    "an underscore in a flag": ("--data.train_limit 5", lambda c: c.data.train_limit, 5),
    "an underscore after a dot": (
        "--policy.samples_per_phase 7",
        lambda c: c.policy,
        Alternating(samples_per_phase=7),
    ),
    "a share of the run": ("--policy.samples-per-phase .25", lambda c: c.policy, Alternating(samples_per_phase=0.25)),
    "a share after a name": (
        "--policy.switch-samples 0.5 --policy.name=post_local",
        lambda c: c.policy,
        PostLocal(switch_samples=0.5),
    ),
    "a list": (
        "--optim.schedule step --optim.milestones 3 4e1",
        lambda c: c.optim.milestones,
        (3, 40),
    ),
    "a list with commas": (
        "--optim.milestones [3,40] --optim.schedule step",
        lambda c: c.optim.milestones,
        (3, 40),
    ),
    "nothing where that may be": ("--eval.every-samples None", lambda c: c.eval.every_samples, None),
    "auto": ("--sync.delay-steps auto", lambda c: c.sync.delay_steps, "auto"),
    "a negative number": ("--policy.name constant --optim.weight-decay 0", lambda c: c.policy, Constant()),
    "a plan's field": ("--policy.large.batch-per-rank 64", lambda c: c.policy, Alternating(large=Plan(64, 1))),
    "a bare name": ("fda", lambda c: c.run.name, "fda"),
    "a recipe's name": ("--recipe swap --run.seed 4", lambda c: (c.run.name, c.run.seed), ("swap", 4)),
}  # fmt: skip


@pytest.mark.parametrize(("line", "field", "expected"), WORKS.values(), ids=WORKS.keys())
def test_what_is_plain_works(line: str, field: Field, expected: object) -> None:
    assert field(recipes.parse(line.split(), "x")) == expected


REFUSED = {
    "--optim.learning-rate 3": "did you mean --optim.lr?",
    "--lr 3": "did you mean --optim.lr?",
    "--run.sample 3": "did you mean --run.samples?",
    "--polcy.name fda": "did you mean --policy.name?",
    "--recpie fda": "did you mean --recipe?",
    "--nothing.like-it 3": "--help lists them",
    "--policy.switch-samples 5": "it goes with --policy.name post_local",
    "--optim.lr": "--optim.lr: needs a value (a number)",
    "--run.samples --run.seed 3": "--run.samples: needs a value (a whole number)",
    "--recipe": "--recipe: needs a value",
    "--run.samples 1.5": "--run.samples = '1.5': must be a whole number",
    "--run.samples 1e400": "must be a whole number",
    "--run.name a b": "takes one value; leave out 'b'",
    "--data.flip maybe": "--data.flip = 'maybe': must be true or false",
    "--optim.name adam": "must be sgd or adamw (did you mean adamw?)",
    "--sync.delay-steps soon": "must be a whole number or auto",
    "alternatin": "no recipe has that name; choose a FILE.toml or one of adaptive_period",
    "alternating --recipe fda": "given twice",
    "--run.samples -5": "run.samples = -5: must be at least 1",
    "--policy.samples-per-phase 1.5": "policy.samples_per_phase = 1.5: must be at least 1 sample, or a share",
}


def test_what_cannot_be_is_refused_in_one_line_with_its_mend_before_torch_is_loaded() -> None:
    code = (
        "import sys, json, contextlib, io\nfrom trainer.__main__ import main\nfound = []\n"
        "for line in json.load(sys.stdin):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said: code = main(line.split())\n"
        "    found.append([code, said.getvalue()])\n"
        "print(json.dumps([found, 'torch' in sys.modules]))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(list(REFUSED)), text=True, capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found, torch_is_loaded = json.loads(done.stdout)
    assert not torch_is_loaded
    for (line, mend), (code_of, said) in zip(REFUSED.items(), found, strict=True):
        assert code_of == 2, line
        assert mend in said
        assert said.count("\n") == 1, said


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_flags_are_those_of_the_parser(name: str) -> None:
    config = Config(policy=POLICIES[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # there is no other way to ask
        parser = tyro.extras.get_parser(Config, default=config)
    theirs = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
    ours = flags.table(config)
    negated = {flag.replace(".", ".no-") for flag, hint in ours.items() if hint is bool}
    assert set(ours) | negated == theirs


def test_a_recipes_name_finds_it_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.parse(["--recipe", "fda"], "x").run.name == "fda"  # of the checkout beside the package
    own = tmp_path / "launch" / "recipes"
    own.mkdir(parents=True)
    (own / "fda.toml").write_text('[run]\nname = "mine"\n')
    assert recipes.parse(["fda"], "x").run.name == "mine"
    assert recipes.parse([str(own / "fda.toml")], "x").run.name == "mine"
    (tmp_path / "fda").write_text('[run]\nname = "here"\n')
    assert recipes.parse(["fda"], "x").run.name == "here"
    with pytest.raises(ConfigError, match=r"'fd': no recipe.*did you mean fda"):
        places.recipe_path("fd")


def test_an_installed_package_brings_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "PACKAGE", tmp_path / "site-packages" / "trainer")
    monkeypatch.setattr(places, "SHIPPED", tmp_path)
    with pytest.raises(ConfigError, match="no recipes are here"):
        places.recipe_path("fda")
    (tmp_path / "fda.toml").write_text("")
    assert places.recipe_path("fda") == tmp_path / "fda.toml"
