"""What is built installs and runs elsewhere: a wheel, a source distribution, and the import name `ebbtide`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted(path.name for path in (ROOT / "launch" / "recipes").glob("*.toml"))


def shell(command: list[str | Path], folder: Path, *, good: bool = True, **variables: str) -> str:
    """Run a command in a folder that is no checkout; what it printed."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert (done.returncode == 0) == good, done.stdout + done.stderr
    return done.stdout if good else done.stderr


def sources(folder: Path) -> Path:
    """A copy of the files that belong to the repository, links kept: builds leave nothing in the checkout."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", ":!benchmarks/results"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    there = "\0".join(name for name in names if name and os.path.lexists(ROOT / name))
    archive = folder / "sources.tar"
    subprocess.run(["tar", "--null", "-cf", archive, "-T", "-"], cwd=ROOT, input=there.encode(), check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "sources", filter="tar")
    return folder / "sources"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution; the wheel is built out of the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    shell([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, sources(folder)], folder)
    return folder


@pytest.fixture(scope="module")
def python(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a fresh environment that has the wheel, and torch and the rest from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    wheel = next(dist.glob("*.whl"))
    site = next(folder.glob("lib/python3*/site-packages"))
    shell([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel], folder)
    others = Path(pytest.__file__).parent.parent
    (site / "others.pth").write_text(f"{others}\n")  # a plain folder: the checkout's own .pth file is not read
    return folder / "bin" / "python"


def test_a_wheel_and_a_source_distribution_hold_every_recipe(dist: Path) -> None:
    import zipfile

    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        held = sorted(Path(name).name for name in wheel.namelist() if name.startswith("trainer/recipes/"))
        assert {"ebbtide/py.typed", "trainer/py.typed"} <= set(wheel.namelist())
        assert not any(name.startswith(("tests", "benchmarks")) for name in wheel.namelist())
    assert held == RECIPES
    with tarfile.open(next(dist.glob("*.tar.gz"))) as tar:
        assert [name for name in tar.getnames() if name.endswith("trainer/recipes/alternating.toml")]


def test_the_installed_trainer_runs_a_recipe_in_another_folder(python: Path, tmp_path: Path) -> None:
    where = "from trainer.config.places import recipe_folder; print(recipe_folder())"
    folder = Path(shell([python, "-c", where], tmp_path).strip())
    assert folder.is_relative_to(python.parent.parent.resolve())
    small = (
        "--data.name fake --data.train-limit 64 --data.test-limit 16 --run.samples 64 --run.root runs --run.name one"
    )
    quiet = "--record.reference-s 0 --record.no-tensorboard --record.no-progress"
    recipe = folder / "alternating.toml"
    shell([python, "-m", "trainer", "--recipe", recipe, *small.split(), *quiet.split()], tmp_path, OMP_NUM_THREADS="1")
    summary = json.loads((tmp_path / "runs" / "one" / "summary.json").read_text())
    assert (summary["world_size"], summary["samples"]) == (1, 64)


def test_the_checkout_has_its_recipes_in_one_place() -> None:
    from trainer.config.places import recipe_folder

    assert sorted(path.name for path in recipe_folder().glob("*.toml")) == RECIPES
    assert recipe_folder().resolve() == (ROOT / "launch" / "recipes").resolve()


def test_both_import_names_are_one_library(python: Path, tmp_path: Path) -> None:
    code = (
        "import sys, ebbtide; assert 'torch' not in sys.modules and 'LocalSGD' in dir(ebbtide)\n"
        "import trainer; assert ebbtide.LocalSGD is trainer.LocalSGD and ebbtide.__version__ == trainer.__version__\n"
        "from ebbtide import *\n"
        "assert all(globals()[name] is getattr(trainer, name) for name in trainer.__all__)\n"
        "print(ebbtide.__version__)"
    )
    from trainer.version import __version__

    assert shell([python, "-c", code], tmp_path).strip() == __version__
    assert "has no attribute 'LocalSDG'" in shell(
        [python, "-c", "import ebbtide; ebbtide.LocalSDG"], tmp_path, good=False
    )


def test_a_script_may_be_called_trainer(python: Path, tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("import ebbtide\nprint(ebbtide.Plan(8, 2).batch_per_rank)\n")
    assert shell([python, "trainer.py"], tmp_path).strip() == "8"
    assert shell([python, "-c", "import ebbtide; print(ebbtide.Plan(8, 2).batch_per_rank)"], tmp_path).strip() == "8"
    told = shell([python, "-c", "import sys; sys.modules['trainer'] = sys; import ebbtide"], tmp_path, good=False)
    assert "another module named trainer is loaded" in told


def test_the_version_is_said_once() -> None:
    from trainer.version import __version__

    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()  # which reads no other file
    assert f"\n## [{__version__}]\n" in (ROOT / "CHANGELOG.md").read_text()
    assert "version = attr: trainer.version.__version__" in (ROOT / "setup.cfg").read_text()
