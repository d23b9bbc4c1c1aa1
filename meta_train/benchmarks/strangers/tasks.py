"""All tasks of the benchmark by name: tasks of strangers and those of ``meta_train.tasks``."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch

from meta_train.benchmarks.strangers import fields, generative, sequences, tables, taught, vision
from meta_train.benchmarks.strangers.task import ACCURACY, Problem, Task
from meta_train.tasks import TASKS as REGISTERED
from meta_train.tasks import get_task

TASKS: dict[str, Task] = {
    task.name: task
    for kind in (vision, sequences, fields, generative, tables, taught)
    for task in kind.TASKS
}
QUICK = ("vit", "gpt", "siren", "pinn", "recommender", "adapt")

# Of tasks of ``meta_train.tasks``, from Kofinas et al. 2024: 1,000 steps, seeds 101 to 105.
STEPS, FIRST_SEED = 1000, 101


def known_names() -> list[str]:
    """Return the names of all tasks."""
    return [*TASKS, *REGISTERED]


def find(name: str, device: str = "cpu") -> Task:
    """Find a task by name.

    Args:
        name: Name of a task of strangers, or of ``meta_train.tasks``, possibly with settings.
        device: Device for a task of ``meta_train.tasks``; tasks of strangers only use the CPU.

    Raises:
        ValueError: For an unknown name, and for settings that the task does not take.
    """
    if name in TASKS:
        return TASKS[name]
    if name.partition(":")[0] not in REGISTERED:
        known = ", ".join(["all", "quick", *known_names()])
        raise ValueError(f"unknown task '{name}', expected one of {known}")
    registered = get_task(name)

    def make(seed: int, root: str | None) -> Problem:
        registered.load(root)
        problem = registered.problem(FIRST_SEED - 1 + seed, torch.device(device))
        return Problem(
            problem.module,
            lambda net, batch: problem.loss(list(net.parameters()), batch),
            problem.batch,
            lambda net: 100 * problem.accuracy(list(net.parameters())),
        )

    return Task(name, name, ACCURACY, STEPS, make)


def choose_tasks(
    names: Sequence[str], root: str | None = None, device: str = "cpu"
) -> tuple[list[Task], list[str]]:
    """Find tasks by name.

    Args:
        names: Names as in ``find``, "all" or "quick".
        root: Folder of datasets; "sample" for the packaged sample.
        device: Device to train on.

    Returns:
        Tasks that can run here, and a message about each of the others.

    Raises:
        ValueError: For an unknown name.
        DatasetNotFoundError: If data of ``meta_train.tasks`` is missing.
    """
    groups = {"all": tuple(TASKS), "quick": QUICK}
    tasks, messages = [], []
    for name in dict.fromkeys(n for given in names for n in groups.get(given, (given,))):
        task = find(name, device)
        if name not in TASKS:
            get_task(name).load(root)
        if task.library and find_spec(task.library) is None:
            messages.append(f"task {name} left out: needs {task.library}")
        elif name in TASKS and device != "cpu":
            messages.append(f"task {name} left out: needs the CPU")
        else:
            tasks.append(task)
    return tasks, messages
