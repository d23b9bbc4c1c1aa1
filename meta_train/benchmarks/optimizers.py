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
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
from tqdm import tqdm

from l2o_graph.commands import run_command
from l2o_graph.datasets.workers import check_device, in_parallel
from l2o_graph.optim.checkpoints import load_checkpoint
from l2o_graph.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, check_ranges
from l2o_graph.storage.files import check_writable, expecting, write_atomically
from l2o_graph.storage.lock import held
from meta_train.benchmarks.baselines import contenders, learned_checkpoints
from meta_train.benchmarks.report import best_rates, line_of, report
from meta_train.benchmarks.runs import FINAL, FIRST_SEED, THINNING, Record, Run, Settings
from meta_train.benchmarks.training import Training
from meta_train.parsing import parsed
from meta_train.tasks import get_task


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
                best = {name: (found[0].run.rate,) for name, found in best_rates(tuned).items()}
                here = replace(here, grid=best)
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
            progress.write(line_of(record), file=sys.stderr)
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


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, compare, print; 0 when all is done, 2 for a request that cannot be met."""
    settings = _parse(argv)
    goes_on = f"stopped; the same command goes on from {settings.out}"
    return run_command("benchmark", lambda: _compared(settings), stopped=goes_on)


def _compared(settings: Settings) -> list[str]:
    paths = report(settings, compare(settings))
    wrote = ", ".join(str(p) for p in (settings.out / "results.json", *paths))
    return [(settings.out / "results.md").read_text(), f"wrote {wrote}"]


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
