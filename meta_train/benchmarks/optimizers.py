"""Optimizers on the tasks that people really have: who does them best?

    python -m meta_train.benchmark                                     # a quick look
    python -m meta_train.benchmark --tasks all --optimizers all --seeds 3 --jobs 2
    python -m meta_train.benchmark --tasks fmnist_cnn --optimizers adamw muon ng --seeds 5

All optimizers start at the same initialisation and see the same batches. Every run is kept as a
line of runs.jsonl, and the same command goes on with those that are missing.
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
from meta_train.benchmarks.judge import text
from meta_train.benchmarks.records import Record, Run
from meta_train.benchmarks.report import Outcome, stopped_early, write
from meta_train.benchmarks.strangers import tasks
from meta_train.benchmarks.strangers.task import Task
from meta_train.benchmarks.training import stops, train

QUICK_OPTIMIZERS = ("adamw", "adamw-default", "muon", "ng")


@dataclass(frozen=True, slots=True)
class Settings:
    """What to compare.

    Attributes:
        tasks: Names of tasks of strangers or of ``meta_train.tasks``, or "all" or "quick".
        optimizers: Names, or "all" or "rivals".
        seeds: Number of seeds, from 1 on.
        steps: Number of steps of a run; 0 for each task's own.
        anytime: Whether runs that stop at 1/8, 1/4 and 1/2 are made too.
        grid: Rates in place of an optimizer's own, by name.
        checkpoint: Checkpoint of the learned optimizer, a name or a path.
        data_root: Folder where datasets lie; "sample" for stand-ins from the package.
        out: Folder of what is written.
        device: To train on; other than "cpu" for tasks of ``meta_train.tasks`` alone.
        jobs: Runs at the same time, of one thread each.
        finished: Whether to report what is there, and run nothing.
    """

    tasks: Sequence[str] = ("quick",)
    optimizers: Sequence[str] = QUICK_OPTIMIZERS
    seeds: int = 1
    steps: int = 0
    anytime: bool = False
    grid: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    checkpoint: str = "general"
    data_root: str | None = None
    out: Path = Path("runs/benchmark")
    device: str = "cpu"
    jobs: int = 1
    finished: bool = False


def plan(settings: Settings, wanted: Sequence[Task], known: dict[str, Contender]) -> list[Run]:
    """All runs, those first that make whole tables early."""
    # What is read from another contender's runs needs these, asked for or not.
    own = contenders.contenders(settings.checkpoint) | known
    own = {n: own[n] for n in dict.fromkeys(c.run_of or n for n, c in known.items())}
    learned = any(c.is_learned for c in own.values())
    checkpoint = contenders.identity(settings.checkpoint) if learned else ""
    return [
        Run(
            task.name, name, rate, seed, steps, checkpoint if contender.is_learned else "",
            settings.device,
        )
        for seed in range(1, settings.seeds + 1)
        for task in wanted
        for name, contender in own.items()
        for steps in (stops(task.steps) if settings.anytime and contender.horizon else [task.steps])
        for rate in contender.rates
    ]  # fmt: skip


def execute(settings: Settings, runs: Sequence[Run]) -> list[Record]:
    """Do those runs that the folder lacks, keeping each as it ends; the caller holds it.

    Returns:
        The records of ``runs``, in their order; with ``finished``, of those that there are.
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
    """Check, do all runs, gather.

    Raises:
        ValueError, OSError: For a request that cannot be met, before any run; where another
            command is at work in the folder, too.
    """
    check_ranges(settings, seeds=COUNT, jobs=COUNT, steps=COUNT_OR_NONE)
    check_device(settings.device)
    wanted, notes = tasks.chosen(settings.tasks, settings.data_root, settings.device)
    known, more = contenders.chosen(settings.optimizers, settings.checkpoint, settings.grid)
    if not wanted or not known:
        raise ValueError("nothing to run: " + "; ".join([*notes, *more]))
    wanted = [replace(task, steps=settings.steps or task.steps) for task in wanted]
    check_writable(settings.out)
    runs = plan(settings, wanted, known)
    for line in (*notes, *more):
        print(f"benchmark: {line}", file=sys.stderr)
    # A look at what there is leaves the folder to whoever is at work in it.
    with nullcontext() if settings.finished else held(settings.out):
        done = with_averages(execute(settings, runs), known)
    stopped = stopped_early(wanted, done)
    names = {record.run.task for record in stopped[1.0]}
    if not names:
        raise ValueError(f"no run of these is finished in '{settings.out}'")
    wanted = [task for task in wanted if task.name in names]
    early = stopped if settings.anytime else {}
    return Outcome(wanted, known, stopped[1.0], [*notes, *more], early)


def with_averages(done: Sequence[Record], known: dict[str, Contender]) -> list[Record]:
    """The records of known contenders, those read from another's runs among them."""
    answer = [record for record in done if record.run.optimizer in known]
    for name, contender in known.items():
        answer += [
            replace(record, run=replace(record.run, optimizer=name), merits=record.averaged)
            for record in done
            if record.run.optimizer == contender.run_of
        ]
    return answer


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compare, print; 0 when all is done, 2 for a request that cannot be met."""
    settings = _parse(argv)

    def work() -> list[str]:
        paths = write(compare(settings), settings.out)
        return [paths[0].read_text(), "wrote " + ", ".join(map(str, paths))]

    goes_on = f"stopped; run the same command again to continue from {settings.out}"
    return run_command("benchmark", work, stopped=goes_on)


def _parse(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.benchmark",
        description=(__doc__ or "").partition("\n")[0],
        epilog=f"tasks: {', '.join(tasks.known_names())}; "
        f"optimizers: {', '.join(contenders.contenders())}",
    )
    add, default = parser.add_argument, Settings()
    add("--tasks", nargs="+", default=default.tasks, metavar="TASK", help='or "all" or "quick"')
    text = 'or "all" or "rivals"'
    add("--optimizers", nargs="+", default=default.optimizers, metavar="OPTIMIZER", help=text)
    add("--seeds", type=int, default=default.seeds, help="how many, from 1 on")
    add("--steps", type=int, default=default.steps, help="of every run; 0: each task's own")
    add("--anytime", action="store_true", help="stop everyone at 1/8, 1/4 and 1/2 too")
    add("--grid", nargs="+", type=_grid, default=[], metavar="OPTIMIZER=RATE,...")
    add("--checkpoint", default=default.checkpoint, help="of NG: a name or a path")
    add("--data-root", metavar="FOLDER", help='"sample": stand-ins from the package')
    add("--out", type=Path, default=default.out, metavar="FOLDER")
    add("--device", default=default.device)
    add("--jobs", type=int, default=default.jobs, help="runs at the same time, of one thread each")
    add("--finished", action="store_true", help="report what is finished, and run nothing")
    args = vars(parser.parse_args(argv))
    return Settings(**{**args, "grid": dict(args["grid"])})


def _grid(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, rates = text.partition("=")
    try:
        return name, tuple(float(rate) for rate in rates.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected e.g. adam=1e-3,3e-3, found '{text}'") from None


def _line(record: Record) -> str:
    run, merit = record.run, text(tasks.find(record.run.task).merit, [record.merit])
    return (
        f"{run.task} {run.optimizer} {run.rate:g} seed {run.seed}, {run.steps} steps: {merit}, "
        f"{record.seconds:.1f} s"
    )
