"""Benchmark of optimizers on tasks that people train in practice.

    python -m meta_train.benchmark                                     # a quick look
    python -m meta_train.benchmark --tasks all --optimizers all --seeds 3 --jobs 2
    python -m meta_train.benchmark --tasks fmnist_cnn --optimizers adamw muon ng --seeds 5

All optimizers have the same initialisation and mini-batches. Every run is stored as a line of
runs.jsonl, and the same command continues with the runs that are missing.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from l2o_graph.commands import run_command
from l2o_graph.datasets.workers import check_device, in_parallel
from l2o_graph.ranges import COUNT, COUNT_OR_NONE, check_ranges
from l2o_graph.storage.files import check_writable
from l2o_graph.storage.lock import held
from meta_train.benchmarks import contenders, records
from meta_train.benchmarks.contenders import Contender
from meta_train.benchmarks.judge import format_merit
from meta_train.benchmarks.records import Record, Run
from meta_train.benchmarks.report import Outcome, stopped_early, write
from meta_train.benchmarks.strangers import tasks
from meta_train.benchmarks.strangers.task import Task
from meta_train.benchmarks.training import stops, train

QUICK_OPTIMIZERS = ("adamw", "adamw-default", "muon", "ng")


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a comparison."""

    tasks: Sequence[str] = ("quick",)  # names of tasks, "all" or "quick"
    optimizers: Sequence[str] = QUICK_OPTIMIZERS  # names of optimizers, "all" or "rivals"
    seeds: int = 1  # number of seeds, from 1 on
    steps: int = 0  # number of training steps; 0 for each task's own
    anytime: bool = False  # whether to evaluate also at 1/8, 1/4 and 1/2 of the steps
    # Learning rates by name, instead of an optimizer's own grid.
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    checkpoint: str = "general"  # name or file of a learned optimizer
    data_root: str | None = None  # folder of datasets; "sample" for the packaged sample
    out: Path = Path("runs/benchmark")  # folder for results
    device: str = "cpu"  # device; only tasks of ``meta_train.tasks`` run on others than the CPU
    jobs: int = 1  # number of parallel runs, with one thread each
    finished: bool = False  # whether to report finished runs only, without training


def plan(settings: Settings, wanted: Sequence[Task], known: dict[str, Contender]) -> list[Run]:
    """List all runs, seed by seed, so that complete tables come early."""
    # With the contenders whose runs give the results of others.
    own = contenders.contenders(settings.checkpoint) | known
    own = {n: own[n] for n in dict.fromkeys(c.run_of or n for n, c in known.items())}
    learned = any(c.is_learned for c in own.values())
    checkpoint = contenders.identity(settings.checkpoint) if learned else ""
    shorter = {n for n, c in own.items() if settings.anytime and c.depends_on_length}
    return [
        Run(
            task.name, name, rate, seed, steps, checkpoint if contender.is_learned else "",
            settings.device,
        )
        for seed in range(1, settings.seeds + 1)
        for task in wanted
        for name, contender in own.items()
        for steps in (stops(task.steps) if name in shorter else [task.steps])
        for rate in contender.rates
    ]  # fmt: skip


def execute(settings: Settings, runs: Sequence[Run]) -> list[Record]:
    """Carry out the runs without a record and store each result; the folder has to be locked.

    Returns:
        Records in the order of ``runs``; with ``finished``, only those that exist.
    """
    found = records.read(settings.out)
    if settings.finished:
        return [found[run] for run in runs if run in found]
    missing = [run for run in runs if run not in found]
    work = partial(train, checkpoint=settings.checkpoint, root=settings.data_root)
    with tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run") as progress:
        for record in in_parallel(work, missing, settings.jobs):
            records.add(settings.out, record)
            found[record.run] = record
            progress.update()
            progress.write(_line(record), file=sys.stderr)
    return [found[run] for run in runs]


def compare(settings: Settings) -> Outcome:
    """Compare optimizers on tasks.

    Raises:
        ValueError: For unknown names and settings out of range, before any run.
        DatasetNotFoundError: If data of ``meta_train.tasks`` is missing.
        BlockingIOError: If another process uses the folder.
        OSError: If the folder cannot be written to.
    """
    check_ranges(settings, seeds=COUNT, jobs=COUNT, steps=COUNT_OR_NONE)
    check_device(settings.device)
    wanted, notes = tasks.choose_tasks(settings.tasks, settings.data_root, settings.device)
    known, more = contenders.choose_contenders(
        settings.optimizers, settings.checkpoint, settings.grid
    )
    notes += more
    if not wanted or not known:
        raise ValueError("nothing to run: " + "; ".join(notes))
    wanted = [replace(task, steps=settings.steps or task.steps) for task in wanted]
    check_writable(settings.out)
    runs = plan(settings, wanted, known)
    for line in notes:
        print(f"benchmark: {line}", file=sys.stderr)
    # Reports of finished runs do not need the lock, which another process may hold.
    with nullcontext() if settings.finished else held(settings.out):
        done = with_averages(execute(settings, runs), known)
    stopped = stopped_early(wanted, done)
    names = {record.run.task for record in stopped[1.0]}
    if not names:
        raise ValueError(f"no run of these is finished in '{settings.out}'")
    wanted = [task for task in wanted if task.name in names]
    early = stopped if settings.anytime else {}
    return Outcome(wanted, known, stopped[1.0], notes, early)


def with_averages(done: Sequence[Record], known: dict[str, Contender]) -> list[Record]:
    """Select the records of known contenders, and add those with averaged weights."""
    return [record for record in done if record.run.optimizer in known] + [
        replace(record, run=replace(record.run, optimizer=name), merits=record.averaged)
        for name, contender in known.items()
        for record in done
        if record.run.optimizer == contender.run_of
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    settings = _parse(argv)

    def work() -> list[str]:
        paths = write(compare(settings), settings.out)
        return [paths[0].read_text(), "wrote " + ", ".join(map(str, paths))]

    stopped = f"stopped; run the same command again to continue from {settings.out}"
    return run_command("benchmark", work, stopped=stopped)


def _parse(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.benchmark",
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"tasks: {', '.join(tasks.known_names())}; "
        f"optimizers: {', '.join(contenders.contenders())}",
    )
    add, default = parser.add_argument, Settings()
    text = 'names of tasks, "all" or "quick"'
    add("--tasks", nargs="+", default=default.tasks, metavar="TASK", help=text)
    text = 'names of optimizers, "all" or "rivals"'
    add("--optimizers", nargs="+", default=default.optimizers, metavar="OPTIMIZER", help=text)
    add("--seeds", type=int, default=default.seeds, help="number of seeds, from 1 on")
    add("--steps", type=int, default=default.steps, help="training steps; 0: each task's own")
    text = "evaluate also at 1/8, 1/4 and 1/2 of the steps"
    add("--anytime", action="store_true", help=text)
    text = "learning rates instead of an optimizer's own grid"
    add("--grid", nargs="+", type=_grid, default=[], metavar="OPTIMIZER=RATE,...", help=text)
    add("--checkpoint", default=default.checkpoint, help="name or file of a learned optimizer")
    text = 'folder of datasets; "sample": the packaged sample'
    add("--data-root", metavar="FOLDER", help=text)
    add("--out", type=Path, default=default.out, metavar="FOLDER", help="folder for results")
    add("--device", default=default.device, help="device of torch")
    add("--jobs", type=int, default=default.jobs, help="parallel runs, with one thread each")
    add("--finished", action="store_true", help="report finished runs only, without training")
    args = vars(parser.parse_args(argv))
    return Settings(**{**args, "grid": dict(args["grid"])})


def _grid(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, rates = text.partition("=")
    try:
        return name, tuple(float(rate) for rate in rates.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected e.g. adam=1e-3,3e-3, found '{text}'") from None


def _line(record: Record) -> str:
    run = record.run
    merit = format_merit(tasks.find(run.task).merit, [record.merit])
    return (
        f"{run.task} {run.optimizer} {run.rate:g} seed {run.seed}, {run.steps} steps: {merit}, "
        f"{record.seconds:.1f} s"
    )
