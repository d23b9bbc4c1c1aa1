"""Things of a tree by their name, wherever it has them, so that they may move."""

import ast
import importlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

PACKAGES = ("l2o_graph", "meta_train")

# Names of pins, and how to make what each is a hash of.
Made = Iterator[tuple[str, Callable[[], Any]]]


@cache
def _defined() -> dict[str, list[str]]:
    """Modules that define a name at their top, for every such name."""
    where: dict[str, list[str]] = {}
    for package in PACKAGES:
        root = Path(importlib.import_module(package).__file__ or "").parent
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            module = ".".join(parts).removesuffix(".__init__")
            for node in ast.parse(path.read_text()).body:
                names = [getattr(node, "name", None)]
                if isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    names = [t.id for t in targets if isinstance(t, ast.Name)]
                for name in names:
                    if name is not None:
                        where.setdefault(name, []).append(module)
    return where


def named(name: str, beside: str = "") -> Any:
    """What a tree calls so, wherever it is; of several, the one beside another name."""
    modules = _defined().get(name, [])
    if beside:
        modules = [m for m in modules if m in _defined()[beside]]
    if len(modules) != 1:
        raise LookupError(f"expected one '{name}' beside '{beside}', found {modules}")
    return getattr(importlib.import_module(modules[0]), name)


def command_of(module: str) -> Callable[[list[str]], int]:
    """The function behind ``python -m MODULE``."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    return found.main
