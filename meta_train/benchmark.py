"""Train networks with several optimizers, over several seeds: a table and curves.

    python -m meta_train.benchmark --tasks fmnist_cnn --optimizers adam muon ng --seeds 5

Every optimizer starts at the same initialisation and sees the same batches. Each is reported at
the rate of its grid with the best mean test accuracy. Every run is saved once it is finished, and
the same command goes on with those that are missing.

Protocol: Kofinas et al., ICLR 2024: 1,000 steps, batch 128, seeds 101 to 105.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev

import torch
from tqdm import tqdm

from l2o_graph.datasets.workers import check_device, in_parallel
from l2o_graph.optim.checkpoints import load_checkpoint
from l2o_graph.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, check_ranges
from l2o_graph.zoo.files import expecting, write_atomically
from l2o_graph.zoo.lock import held
from meta_train.baselines import PUBLISHED, base_of, contenders, learned_checkpoints
from meta_train.parsing import parsed
from meta_train.plots import Curve, Panel, plot_curves
from meta_train.tasks import get_task
from meta_train.training import Training

FIRST_SEED = 101
FINAL = 100  # the loss reported is the mean over this many last steps
THINNING = 10  # the loss curve keeps the mean of every so many steps


@dataclass(frozen=True, slots=True)
class Settings:
    """What to compare, and how.

    Attributes:
        tasks: Names of ``meta_train.tasks.TASKS``.
        optimizers: Names of ``meta_train.baselines.contenders()``.
        seeds: How many, from 101 on.
        tune_seeds: How many of them choose the rate of a grid; 0 for all.
        steps: Training steps of a run.
        grid: Rates in place of an optimizer's own grid, by name.
        checkpoints: Learned optimizers beside the packaged one; see ``contenders``.
        evaluate_every: Steps between test accuracies; 0 for the end alone.
        data_root: Where datasets lie; see ``l2o_graph.datasets.images.data_root``.
        out: Folder of results.json, results.md and curves.png.
        device: To train on.
        jobs: Runs at the same time; with more than one, each has one thread.
    """

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: int = 5
    tune_seeds: int = 0
    steps: int = 1000
    grid: dict[str, tuple[float, ...]] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)
    evaluate_every: int = 0
    data_root: str | None = None
    out: Path = Path("runs/benchmark")
    device: str = "cpu"
    jobs: int = 1


@dataclass(frozen=True, slots=True)
class Run:
    """One training run; runs that are equal here give the same result.

    Attributes:
        task: Name.
        optimizer: Name.
        rate: Learning rate.
        seed: Of initialisation and batches.
        steps: Training steps.
        device: Trained on.
        checkpoint: Identity of a learned optimizer's weights, else empty.
    """

    task: str
    optimizer: str
    rate: float
    seed: int
    steps: int
    device: str
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Record:
    """What came of a run.

    Attributes:
        run: Which.
        accuracy: Test accuracy at the end, in [0, 1].
        final_loss: Mean training loss of the last 100 steps, in nats; None if it diverged.
        curve: Training loss, the mean of every 10 steps.
        accuracies: (steps done, test accuracy) on the way, where asked for.
        diverged: Whether the loss became non-finite, which ends a run.
        step_seconds: Median of a training step.
        update_seconds: Median of its optimizer's part.
        data: The dataset, in words.
        torch: Version.
        machine: CPU, cores, and threads used.
        date: When it ended, UTC.
    """

    run: Run
    accuracy: float
    final_loss: float | None
    curve: list[float]
    accuracies: list[tuple[int, float]]
    diverged: bool
    step_seconds: float
    update_seconds: float
    data: str
    torch: str
    machine: str
    date: str


def compare(settings: Settings) -> list[Record]:
    """Do all runs: the grids on the first ``tune_seeds``, their best rates on all seeds.

    Raises:
        ValueError, OSError: As ``plan``, before any run, and where another command is writing to
            the folder.
    """
    plan(settings)
    records: dict[Run, Record] = {}
    with held(settings.out):
        for task in settings.tasks:
            here = replace(settings, tasks=(task,))
            if settings.tune_seeds:
                tuning = replace(here, seeds=min(settings.tune_seeds, settings.seeds))
                tuned = execute(tuning, plan(tuning))
                records |= {record.run: record for record in tuned}
                here = replace(here, grid={n: (g[0].run.rate,) for n, g in _best(tuned).items()})
            records |= {record.run: record for record in execute(here, plan(here))}
    return list(records.values())


def plan(settings: Settings) -> list[Run]:
    """Check everything that can be checked before any work, and list the runs.

    Raises:
        ValueError: For unknown names, counts below 1, rates that are no rates, a device that
            torch cannot use, a checkpoint that does not load and a results.json that is something
            else.
        DatasetNotFoundError: For data that are not there.
        OSError: When ``out`` cannot be written.
    """
    check_ranges(
        settings, seeds=COUNT, tune_seeds=COUNT_OR_NONE, steps=COUNT, jobs=COUNT,
        evaluate_every=COUNT_OR_NONE,
    )  # fmt: skip
    check_device(settings.device)
    known = contenders(settings.checkpoints)
    for name in (*settings.optimizers, *settings.grid):
        if name not in known:
            raise ValueError(f"unknown optimizer '{name}', expected one of {sorted(known)}")
    for name, rates in settings.grid.items():
        for rate in rates:
            NOT_NEGATIVE.check(f"rate of {name}", rate)
    tasks = [get_task(name) for name in settings.tasks]
    learned = learned_checkpoints(settings.checkpoints)
    identities = {
        name: load_checkpoint(learned[name]).identity
        for name in settings.optimizers
        if name in learned
    }
    check_writable(settings.out)
    _read(settings.out / "results.json")
    for task in tasks:
        task.load(settings.data_root)
    return [
        Run(
            task,
            optimizer,
            rate,
            seed,
            settings.steps,
            settings.device,
            identities.get(optimizer, ""),
        )
        for seed in range(FIRST_SEED, FIRST_SEED + settings.seeds)
        for task in settings.tasks
        for optimizer in settings.optimizers
        for rate in settings.grid.get(optimizer, known[optimizer].rates)
    ]


def execute(settings: Settings, runs: Sequence[Run]) -> list[Record]:
    """Do those runs that results.json lacks, saving each as it ends; the caller holds the folder.

    Returns:
        The records of ``runs``, in their order.
    """
    path = settings.out / "results.json"
    records = _read(path)
    missing = [run for run in runs if run not in records]
    progress = tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run")
    with progress:
        for record in in_parallel(
            partial(train, settings), missing, settings.jobs, one_thread_alone=False
        ):
            records[record.run] = record
            lines = ",\n".join(json.dumps(asdict(r), allow_nan=False) for r in records.values())
            write_atomically(path, f"[\n{lines}\n]\n".encode())
            progress.update()
            progress.write(_line(record), file=sys.stderr)
    return [records[run] for run in runs]


def train(settings: Settings, run: Run) -> Record:
    """One training run.

    Raises:
        RuntimeError: When the checkpoint is no longer the one that the run was planned with.
    """
    task = get_task(run.task)
    data = task.load(settings.data_root)
    problem = task.problem(run.seed, torch.device(run.device))
    contender = contenders(settings.checkpoints)[run.optimizer]
    training = Training(problem, contender, run.rate, run.steps)
    if run.checkpoint:
        found = training.optimizers[0].defaults["checkpoint"]
        if found != run.checkpoint:
            raise RuntimeError(
                f"checkpoint of '{run.optimizer}' changed: expected {run.checkpoint}, found {found}"
            )
    accuracies = []
    for step in range(1, run.steps + 1):
        if not math.isfinite(training.step()):
            break
        if settings.evaluate_every and step % settings.evaluate_every == 0:
            accuracies.append((step, training.accuracy()))
    losses = [loss for loss in training.losses if math.isfinite(loss)]
    diverged = len(losses) < run.steps
    return Record(
        run,
        accuracy=training.accuracy(),
        final_loss=None if diverged else fmean(losses[-FINAL:]),
        curve=[fmean(losses[i : i + THINNING]) for i in range(0, len(losses), THINNING)],
        accuracies=accuracies,
        diverged=diverged,
        step_seconds=median(training.step_seconds),
        update_seconds=median(training.update_seconds),
        data=data,
        torch=torch.__version__,
        machine=_machine(run.device),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def report(settings: Settings, records: Sequence[Record]) -> list[Path]:
    """Write results.md and curves.png of these records; returns their paths."""
    table, curves = settings.out / "results.md", settings.out / "curves.png"
    write_atomically(table, markdown(records).encode())
    write_atomically(curves, plot_curves([_panel(task, rs) for task, rs in _by_task(records)]))
    return [table, curves]


def markdown(records: Sequence[Record]) -> str:
    """Summary at each optimizer's best rate beside the paper's, then every rate of every task."""
    labels = _labels(records)
    by_task = _by_task(records)
    best = {task: _best(task_records) for task, task_records in by_task}
    first = records[0]
    seeds = sorted({r.run.seed for r in records})
    columns = [h for task in best for h in (task, *(["paper"] if task in PUBLISHED else []))]
    lines = [
        f"Test accuracy in % after {first.run.steps:,} steps, mean ± standard deviation over "
        f"seeds {seeds[0]} to {seeds[-1]}; in brackets the best rate of the grid.",
        "",
        "| optimizer | " + " | ".join(columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for name in dict.fromkeys(r.run.optimizer for r in records):
        cells = []
        for task in best:
            cells.append(f"{_accuracy(best[task][name])} ({_rate(best[task][name])})")
            if task in PUBLISHED:
                known = PUBLISHED[task].get(base_of(name))
                cells.append(f"{known[0]:.2f} ± {known[1]:.2f}" if known else "")
        lines.append(f"| {labels[name]} | " + " | ".join(cells) + " |")
    for task, task_records in by_task:
        lines += [
            "",
            f"### {task} ({task_records[0].data})",
            "",
            f"| optimizer | rate | accuracy, % | loss, last {FINAL} steps | ms per training step "
            "| of which update |",
            "|---|---|---|---|---|---|",
        ]
        for (name, _), group in _by_rate(task_records).items():
            star = " (best)" if len(_rates(task_records, name)) > 1 else ""
            chosen = star if group == best[task][name] else ""
            lines.append(
                f"| {labels[name]} | {_rate(group)}{chosen} | {_accuracy(group)} | {_loss(group)} "
                f"| {1e3 * median(r.step_seconds for r in group):.1f} "
                f"| {1e3 * median(r.update_seconds for r in group):.1f} |"
            )
    checkpoints = sorted({r.run.checkpoint for r in records if r.run.checkpoint})
    versions = sorted({f"torch {r.torch}; {r.machine}" for r in records})
    if checkpoints:
        lines += ["", f"Learned: {', '.join(checkpoints)}."]
    lines += ["", f"Measured {first.date[:10]} with {' and '.join(versions)}.", ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compare, print; 0 when all is done, 2 for a request that cannot be met."""
    settings = _parse(argv)
    try:
        records = compare(settings)
        paths = report(settings, records)
    except (ValueError, OSError) as error:
        print("benchmark: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {settings.out}", file=sys.stderr)
        return 130
    print((settings.out / "results.md").read_text())
    print("wrote " + ", ".join(str(p) for p in (settings.out / "results.json", *paths)))
    return 0


def _parse(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.benchmark", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--tasks", nargs="+", default=["fmnist_cnn", "cifar10_cnn"], metavar="TASK")
    add("--optimizers", nargs="+", default=["adam", "muon", "ng"], metavar="OPTIMIZER")
    add("--seeds", type=int, default=5, help="how many, from 101 on")
    add("--tune-seeds", type=int, default=0, help="how many choose a grid's rate; 0: all")
    add("--steps", type=int, default=1000)
    add("--grid", nargs="+", type=_grid, default=[], metavar="OPTIMIZER=RATE,...")
    add("--checkpoint", nargs="+", type=named_checkpoint, default=[], metavar="OPTIMIZER=FILE")
    add("--evaluate-every", type=int, default=0, metavar="STEPS", help="0: at the end alone")
    add("--data-root", metavar="FOLDER")
    add("--out", type=Path, default=Path("runs/benchmark"), metavar="FOLDER")
    add("--device", default="cpu")
    add("--jobs", type=int, default=1, help="runs at the same time, of one thread each")
    args = vars(parser.parse_args(argv))
    args["grid"] = dict(args["grid"])
    args["checkpoints"] = dict(args.pop("checkpoint"))
    for name in ("tasks", "optimizers"):
        args[name] = tuple(dict.fromkeys(args[name]))
    return Settings(**args)


def named_checkpoint(text: str) -> tuple[str, str]:
    """Parse "NAME=FILE"."""
    name, _, file = text.partition("=")
    if not name or not file:
        raise argparse.ArgumentTypeError(f"expected e.g. mine=runs/checkpoint.safetensors: {text}")
    return name, file


def _grid(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, rates = text.partition("=")
    try:
        return name, tuple(float(rate) for rate in rates.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected e.g. adam=1e-3,3e-3, found '{text}'") from None


def check_writable(folder: Path) -> None:
    """Make a folder, and see that files can be made in it.

    Raises:
        OSError: When they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"out: cannot write to folder '{folder}' ({error.strerror})") from error


def _read(path: Path) -> dict[Run, Record]:
    """The records so far, by run."""
    if not path.exists():
        return {}
    with expecting(
        f"'{path}' is not a results.json of this benchmark; move it away or give another --out: "
        "expected a list of records"
    ):
        records = parsed(list[Record], json.loads(path.read_bytes()), "records")
    return {record.run: record for record in records}


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")  # elsewhere than on Linux the architecture has to do
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {os.cpu_count()} cores, threads of a run: {torch.get_num_threads()}"


def _by_task(records: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    tasks = dict.fromkeys(r.run.task for r in records)
    return [(task, [r for r in records if r.run.task == task]) for task in tasks]


def _by_rate(records: Sequence[Record]) -> dict[tuple[str, float], list[Record]]:
    """Records by optimizer and rate; seeds together."""
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        groups.setdefault((record.run.optimizer, record.run.rate), []).append(record)
    return groups


def _rates(records: Sequence[Record], optimizer: str) -> set[float]:
    return {r.run.rate for r in records if r.run.optimizer == optimizer}


def _best(records: Sequence[Record]) -> dict[str, list[Record]]:
    """By optimizer, the records at its best rate."""
    best: dict[str, list[Record]] = {}
    for (name, _), group in _by_rate(records).items():
        # A rate that only took part in the tuning has fewer seeds.
        if name not in best or _standing(group) > _standing(best[name]):
            best[name] = group
    return best


def _standing(records: Sequence[Record]) -> tuple[int, float]:
    return len(records), fmean(r.accuracy for r in records)


def _accuracy(records: Sequence[Record]) -> str:
    text = spread([100 * r.accuracy for r in records], 2)
    diverged = sum(r.diverged for r in records)
    return text + (f", {diverged} of {len(records)} diverged" if diverged else "")


def _loss(records: Sequence[Record]) -> str:
    losses = [r.final_loss for r in records if r.final_loss is not None]
    return spread(losses, 3) if losses else "diverged"


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of more than one value, standard deviation."""
    text = f"{fmean(values):.{digits}f}"
    return text + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def _rate(records: Sequence[Record]) -> str:
    return f"{records[0].run.rate:g}"


def _line(record: Record) -> str:
    run = record.run
    return (
        f"{run.task} {run.optimizer} {run.rate:g} seed {run.seed}: {record.accuracy:.2%}, loss "
        f"{_loss([record])}, {1e3 * record.step_seconds:.1f} ms a step"
    )


def _labels(records: Sequence[Record]) -> dict[str, str]:
    learned = {base_of(r.run.optimizer): r.run.checkpoint for r in records if r.run.checkpoint}
    return {name: contender.label for name, contender in contenders(learned).items()}


def _panel(task: str, records: Sequence[Record]) -> Panel:
    labels = _labels(records)
    curves = []
    for name, group in _best(records).items():
        label = labels[name] if group[0].run.checkpoint else f"{labels[name]}, {_rate(group)}"
        accuracies = [r.accuracies for r in group if r.accuracies]
        losses = [r.curve for r in group if r.curve]  # of none, where the first was no number
        if losses:
            curves.append(Curve(name, label, losses, THINNING, accuracies))
    return Panel(f"{task} ({records[0].data})", curves)


if __name__ == "__main__":
    sys.exit(main())
