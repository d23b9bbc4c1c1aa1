"""Imports between rooms lead downward, and rooms stand on nine levels at most."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the ground up; those of a level know nothing of each other. What is in no room of its own
# belongs to the room of its folder.
LEVELS = (
    (
        "l2o_graph.commands",
        "l2o_graph.ranges",
        "l2o_graph.registry",
        "l2o_graph.layout",
        "l2o_graph.storage",
    ),
    ("l2o_graph.tracing", "l2o_graph.models", "meta_train.parsing", "meta_train.run"),
    ("l2o_graph.graph", "l2o_graph.datasets"),
    ("l2o_graph.optim", "l2o_graph.metanets"),
    ("l2o_graph.paper",),
    ("l2o_graph",),
    ("meta_train.tasks", "meta_train.families", "meta_train.supervised"),
    ("meta_train",),
    ("meta_train.benchmarks",),
)
# Commands by the names that they have always had.
DOORS = {
    f"meta_train.{name}" for name in ("benchmark", "compare", "step_cost", "strangers", "tables")
}
# ``higher`` is told of an optimizer when one is made, and only where somebody has imported it.
ALLOWED = {("l2o_graph.optim.base", "l2o_graph.higher_support")}


def modules() -> dict[str, Path]:
    """All modules of both packages."""
    found = {}
    for package in ("l2o_graph", "meta_train"):
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def room_of(module: str) -> str:
    """The narrowest room that a module is in."""
    rooms = [room for level in LEVELS for room in level]
    return max((r for r in rooms if f"{module}.".startswith(f"{r}.")), key=len)


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports, at its top or late."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, path
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known.keys()) or {node.module}
    return found & known.keys()


def test_every_room_imports_only_downward():
    known = modules()
    level_of = {room: i for i, level in enumerate(LEVELS) for room in level}
    upward = []
    for module, path in known.items():
        if module in DOORS:
            continue
        here = room_of(module)
        for other in imported(path, known):
            there = room_of(other)
            if there == here or (module, other) in ALLOWED:
                continue
            if other in DOORS or level_of[there] >= level_of[here]:
                upward.append(f"{module} imports {other}")
    assert not upward
    assert len(LEVELS) <= 9


def test_the_layout_imports_nothing_but_torch():
    allowed = {"torch", "jaxtyping", "l2o_graph.layout"}
    for path in (ROOT / "l2o_graph" / "layout").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            outside = [n for n in names if not _is_standard(n) and not _is_in(n, allowed)]
            assert not outside, f"{path.name} imports {outside}"


def test_no_test_imports_another():
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = {node.module}
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
            else:
                continue
            assert not names & tests, f"{path.name} imports {names & tests}"


def _is_standard(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def _is_in(name: str, allowed: set[str]) -> bool:
    return any(f"{name}.".startswith(f"{each}.") for each in allowed)
