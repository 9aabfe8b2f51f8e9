"""Ebbtide by its own name: `ebbtide.LocalSGD` is `trainer.LocalSGD`, and so for every public name.

Names are imported when they are first used, so that `import ebbtide` costs nothing of torch. Another module may be
called `trainer`, as a script of one's own often is. So the package `trainer` is loaded from the folder beside this one.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer import *  # noqa: F403  # every public name, said once
    from trainer import __version__ as __version__


def _load_trainer() -> ModuleType:
    """The package `trainer` of this distribution, whatever else bears its name on the import path."""
    home = Path(__file__).resolve().parent.parent / "trainer" / "__init__.py"
    loaded = sys.modules.get("trainer")
    if loaded is not None:
        where = getattr(loaded, "__file__", None)
        if where is None or Path(where).resolve() != home:
            raise ImportError(f"another module named trainer is loaded ({where}): import ebbtide before it")
        return loaded
    spec = importlib.util.spec_from_file_location("trainer", home, submodule_search_locations=[str(home.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trainer"] = module
    spec.loader.exec_module(module)
    return module


_trainer = _load_trainer()
__all__ = list(_trainer.__all__)  # the names of trainer, said once


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'ebbtide' has no attribute {name!r}")
    return getattr(_trainer, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
