"""Where an optimizer stops working: other widths, depths, batches, horizons and networks.

    python -m meta_train.transfer --optimizers adam muon ng --seeds 1

Every optimizer keeps the rate that did best on the paper's FashionMNIST network and is taken away
from it, one thing at a time. Runs are saved as the benchmark's are, and go on in the same way.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from l2o_graph.zoo.files import write_atomically
from l2o_graph.zoo.lock import held
from meta_train.baselines import BEST_RATES, base_of, contenders, learned_checkpoints
from meta_train.benchmark import (
    Record,
    Run,
    Settings,
    execute,
    named_checkpoint,
    plan,
    spread,
)

# (what is different, task, steps); the first is where the rates come from.
HOME = ("nothing", "fmnist_cnn", 1000)
AWAY = (
    ("width 32", "fmnist_cnn:width=32", 1000),
    ("width 64", "fmnist_cnn:width=64", 1000),
    ("width 128, 500 steps", "fmnist_cnn:width=128", 500),  # a step costs 40 of those at home
    ("2 convolutions", "fmnist_cnn:depth=2", 1000),
    ("4 convolutions", "fmnist_cnn:depth=4", 1000),
    ("5 convolutions", "fmnist_cnn:depth=5", 1000),
    ("batches of 32", "fmnist_cnn:batch=32", 1000),
    ("batches of 512", "fmnist_cnn:batch=512", 1000),
    ("5,000 steps", "fmnist_cnn", 5000),
    ("an MLP", "fmnist_mlp", 1000),
    ("BatchNorm", "fmnist_cnn:norm=1", 1000),
    ("MNIST", "mnist_cnn", 1000),
)
PLACES = (HOME, *AWAY)

# The loss of a guess, less what batches differ by: what ends there has diverged, or has collapsed
# to a constant.
LOST = 0.99 * math.log(10)


def transfer(settings: Settings) -> dict[str, list[Record]]:
    """Do all runs; ``tasks`` and ``steps`` of the settings do not count.

    Returns:
        For each place, the records of all optimizers and seeds.

    Raises:
        ValueError, OSError: As ``benchmark.compare``.
    """
    rates = {**BEST_RATES, **dict.fromkeys(learned_checkpoints(settings.checkpoints), 1.0)}
    grid = {name: (rate,) for name, rate in rates.items() if name in settings.optimizers}
    settings = replace(settings, grid={**grid, **settings.grid})
    runs = {
        label: plan(replace(settings, tasks=(task,), steps=steps)) for label, task, steps in PLACES
    }
    with held(settings.out):
        records = execute(settings, [run for each in runs.values() for run in each])
    of_run: dict[Run, Record] = {record.run: record for record in records}
    return {label: [of_run[run] for run in each] for label, each in runs.items()}


def failed(record: Record) -> bool:
    """Whether a run ended no better than guessing, or without a number."""
    return record.final_loss is None or record.final_loss > LOST


def markdown(places: dict[str, list[Record]], optimizers: Sequence[str]) -> str:
    """Test accuracy of every optimizer in every place."""
    first = {r.run.optimizer: r.run for r in next(iter(places.values()))}
    learned = {base_of(name): run.checkpoint for name, run in first.items() if run.checkpoint}
    known = contenders(learned)
    heads = [f"{known[name].label} ({first[name].rate:g})" for name in optimizers]
    lines = [f"| different | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for label, records in places.items():
        cells = [_cell([r for r in records if r.run.optimizer == name]) for name in optimizers]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lost = [
        sum(failed(r) for rs in places.values() for r in rs if r.run.optimizer == name)
        for name in optimizers
    ]
    lines.append(f"| failed | {' | '.join(map(str, lost))} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print; 0 when all is done, 2 for a request that cannot be met."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.transfer", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--optimizers", nargs="+", default=list(BEST_RATES), metavar="OPTIMIZER")
    add("--rate", nargs="+", type=_rate, default=[], metavar="OPTIMIZER=RATE")
    add("--seeds", type=int, default=1, help="how many, from 101 on")
    add("--checkpoint", nargs="+", type=named_checkpoint, default=[], metavar="OPTIMIZER=FILE")
    add("--data-root", metavar="FOLDER")
    add("--out", type=Path, default=Path("runs/transfer"), metavar="FOLDER")
    add("--jobs", type=int, default=1, help="runs at the same time, of one thread each")
    args = vars(parser.parse_args(argv))
    settings = Settings(
        tasks=(), optimizers=tuple(dict.fromkeys(args.pop("optimizers"))),
        grid=dict(args.pop("rate")), checkpoints=dict(args.pop("checkpoint")), **args,
    )  # fmt: skip
    try:
        places = transfer(settings)
    except (ValueError, OSError) as error:
        print("transfer: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; the same command goes on from {settings.out}", file=sys.stderr)
        return 130
    table = markdown(places, settings.optimizers)
    write_atomically(settings.out / "transfer.md", table.encode())
    print(table)
    print(f"wrote {settings.out / 'transfer.md'}")
    return 0


def _cell(records: Sequence[Record]) -> str:
    lost = sum(map(failed, records))
    if lost == len(records):
        return "failed"
    text = spread([100 * r.accuracy for r in records], 1)
    return f"{text}, {lost} failed" if lost else text


def _rate(text: str) -> tuple[str, tuple[float, ...]]:
    name, _, rate = text.partition("=")
    try:
        return name, (float(rate),)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected e.g. adam=1e-2, found '{text}'") from None


if __name__ == "__main__":
    sys.exit(main())
