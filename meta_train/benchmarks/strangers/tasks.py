"""All tasks by name: those of strangers, and behind them those of ``meta_train.tasks``."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from meta_train.benchmarks.strangers import fields, generative, sequences, tables, taught, vision
from meta_train.benchmarks.strangers.task import ACCURACY, Batch, Problem, Task
from meta_train.tasks import TASKS as REGISTERED
from meta_train.tasks import get_task

TASKS: dict[str, Task] = {
    task.name: task
    for kind in (vision, sequences, fields, generative, tables, taught)
    for task in kind.TASKS
}
QUICK = ("vit", "gpt", "siren", "pinn", "recommender", "adapt")

# Kofinas et al. 2024: runs of 1,000 steps, seeds 101 to 105.
STEPS, FIRST_SEED = 1000, 101


def known_names() -> list[str]:
    """Names of all tasks, of ours and of ``meta_train.tasks``."""
    return [*TASKS, *REGISTERED]


def find(name: str, device: str = "cpu") -> Task:
    """The task of a name, of ours or of ``meta_train.tasks``; the first are for the CPU alone.

    Raises:
        ValueError: For a name that is not known, and a setting that the task does not take.
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

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            return problem.loss(list(net.parameters()), batch)

        def evaluate(net: nn.Module) -> float:
            return 100 * problem.accuracy(list(net.parameters()))

        return Problem(problem.module, loss, problem.batch, evaluate)

    return Task(name, name, ACCURACY, STEPS, make)


def chosen(
    names: Sequence[str], root: str | None = None, device: str = "cpu"
) -> tuple[list[Task], list[str]]:
    """Tasks by name, and a line about each that cannot run here.

    ``names`` may be "all" or "quick", too; the root "sample" has stand-ins from the package.

    Raises:
        ValueError: For a name that is not known.
        DatasetNotFoundError: For data of ``meta_train.tasks`` that are not there.
    """
    several = {"all": tuple(TASKS), "quick": QUICK}
    tasks, lines = [], []
    for name in dict.fromkeys(n for given in names for n in several.get(given, (given,))):
        task = find(name, device)
        if name not in TASKS:
            get_task(name).load(root)
        if task.library and find_spec(task.library) is None:
            lines.append(f"task {name} left out: needs {task.library}")
        elif name in TASKS and device != "cpu":
            lines.append(f"task {name} left out: needs the CPU")
        else:
            tasks.append(task)
    return tasks, lines
