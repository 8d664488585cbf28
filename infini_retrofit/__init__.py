"""A compressive memory of fixed size (Infini-attention) inside pretrained language models.

The public names stand in `__init__.pyi`, with the module of each, and nowhere else. A name is
imported when it is first asked for, so that each user loads only what is used.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
_MODULES = {alias.name: f".{node.module}" for node in _STUB.body for alias in node.names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    """List the public names beside what is here already."""
    return sorted({*globals(), *__all__})
