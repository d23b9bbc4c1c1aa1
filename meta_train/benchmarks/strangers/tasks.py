"""All tasks by name."""

from importlib.util import find_spec

from meta_train.benchmarks.strangers import (
    fields,
    generative,
    sequences,
    tables,
    taught,
    vision,
)
from meta_train.benchmarks.strangers.task import Task

TASKS: dict[str, Task] = {
    task.name: task
    for kind in (vision, sequences, fields, generative, tables, taught)
    for task in kind.TASKS
}
QUICK = ("vit", "gpt", "siren", "pinn", "recommender", "adapt")


def chosen(names: tuple[str, ...]) -> tuple[list[Task], list[str]]:
    """Tasks by name, and a line about each that a missing package leaves out.

    Args:
        names: Names of ``TASKS``, or "all" or "quick" for several.

    Raises:
        ValueError: For a name that is not known.
    """
    several = {"all": tuple(TASKS), "quick": QUICK}
    wanted = list(dict.fromkeys(n for name in names for n in several.get(name, (name,))))
    for name in wanted:
        if name not in TASKS:
            known = ", ".join([*several, *TASKS])
            raise ValueError(f"unknown task '{name}', expected one of {known}")
    tasks = [TASKS[name] for name in wanted]
    missing = [task for task in tasks if task.library and find_spec(task.library) is None]
    lines = [f"task {task.name} left out: needs {task.library}" for task in missing]
    return [task for task in tasks if task not in missing], lines
