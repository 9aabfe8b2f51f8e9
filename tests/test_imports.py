"""Data flows one way: a module imports only what stands before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "trainer"
LAYERS = [
    "errors",
    "plan",
    "policies",
    "settings",
    "config",
    "recipes",
    "launcher",
    "memory",
    "world",
    "clock",
    "collectives",
    "flat",
    "wire",
    "exchange",
    "background",
    "outer",
    "data",
    "tasks",
    "optim",
    "rate",
    "gradients",
    "signals",
    "controller",
    "replica",
    "ledger",
    "rounds",
    "part",
    "averaging",
    "delay",
    "progress",
    "timetable",
    "consensus",
    "parallel",
    "transition",
    "early_end",
    "sync",
    "step",
    "reference",
    "checkpoint",
    "records",
    "run",
    "train",
    "__main__",
    "report",
    "replay",
]


def imported(file: Path) -> set[str]:
    """The layers that a file imports when it is loaded or run, type-checking blocks apart."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "trainer":
            names = [f"trainer.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("trainer.")}
    return found


def test_no_module_imports_upward() -> None:
    files = {file: file.relative_to(PACKAGE).parts[0].removesuffix(".py") for file in PACKAGE.rglob("*.py")}
    files.pop(PACKAGE / "__init__.py")  # public names, imported when they are used
    assert set(files.values()) == set(LAYERS)
    for file, layer in files.items():
        above = {name for name in imported(file) if LAYERS.index(name) > LAYERS.index(layer)}
        assert not above, f"{file.relative_to(PACKAGE)} imports upward: {above}"


def test_torch_is_not_loaded_by_importing_the_package_or_refusing_a_flag() -> None:
    code = (
        "import sys, trainer, trainer.__main__ as m; m.main(['--run.samples', '0']); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_every_public_name_is_there() -> None:
    import trainer

    for name in trainer.__all__:
        assert getattr(trainer, name) is not None
