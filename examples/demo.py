"""Comparison of the learned optimizer with Adam and Muon on FashionMNIST: a table and a plot.

    python examples/demo.py [--data-root FOLDER] [--steps N] [--out demo.png]

All three optimizers have the same initialisation and mini-batches. The table also has the accuracy
of the learned optimizer's averaged weights. If FashionMNIST cannot be found or downloaded, the
sample in the package is used.
"""

import argparse
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from l2o_graph.datasets.images import DATA_VARIABLE, DatasetNotFoundError, data_root
from l2o_graph.ranges import COUNT
from l2o_graph.storage.files import check_writable, write_atomically
from meta_train.benchmarks.contenders import contenders
from meta_train.benchmarks.plots import plot_losses
from meta_train.benchmarks.records import Record, Run
from meta_train.benchmarks.report import Outcome
from meta_train.benchmarks.strangers.tasks import find
from meta_train.benchmarks.training import train
from meta_train.tasks import get_task

# The best learning rates on the task fmnist_cnn (docs/results.md).
RATES = {"adam": 0.02, "muon": 0.05, "ng": 1.0}
STEPS, SAMPLE_STEPS = 600, 300
PATIENCE = 10.0  # timeout of a download in seconds


def main(steps: int | None = None, root: str | None = None, out: str | Path = "demo.png") -> Path:
    """Train, print the table and save the plot; return its path.

    Args:
        steps: Number of training steps; by default 600, or 300 on the sample.
        root: Folder of FashionMNIST; see ``l2o_graph.datasets.images.data_root``.
        out: File for the plot.

    Raises:
        ValueError: For fewer than one step.
        OSError: If the plot cannot be written, before any training.
    """
    if steps is not None:
        COUNT.check("steps", steps)
    out = Path(out)
    check_writable(out.parent)
    name, data, full = choose_task(root)
    steps = steps or (STEPS if full else SAMPLE_STEPS)
    records: dict[str, Record] = {}
    with tqdm(RATES.items(), unit="optimizer") as progress:
        for optimizer, rate in progress:
            progress.set_description(optimizer)
            records[optimizer] = train(Run(name, optimizer, rate, 1, steps), root=root)
    known = {optimizer: contenders()[optimizer] for optimizer in RATES}
    labels = {o: f"{c.label}, {RATES[o]:g}" if o != "ng" else c.label for o, c in known.items()}
    print(table(labels, records))
    task = replace(find(name), label=data, steps=steps)
    done = list(records.values())
    tables = Outcome([task], known, done, []).tables()
    write_atomically(out, plot_losses([task], tables, done, labels))
    print(f"\nwrote {out}")
    return out


def choose_task(root: str | None) -> tuple[str, str, bool]:
    """Choose FashionMNIST, or its sample if it cannot be downloaded, and print which.

    Returns:
        Name of the task, name of the dataset, and whether it is the whole dataset.
    """
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torchvision has no timeout
    try:
        data = get_task("fmnist_cnn").load(root)
        print(f"data: all of {data}, in {data_root(root).resolve()}")
        return "fmnist_cnn", data, True
    except DatasetNotFoundError as error:
        data = get_task("fmnist_sample").load(None)
        reason = " ".join(str(error.__cause__).split())
        print(
            f"data: {data} (6,000 of 60,000 images); all of it is not in "
            f"{data_root(root).resolve()} and could not be downloaded ({reason}). Set its folder "
            f"by --data-root or {DATA_VARIABLE}."
        )
        return "fmnist_sample", data, False
    finally:
        socket.setdefaulttimeout(before)


def table(labels: Mapping[str, str], records: Mapping[str, Record]) -> str:
    """Format a line for each optimizer, and one for averaged weights."""
    columns = f"{'test accuracy':>14} {'loss at the end':>15} {'ms/update':>10} {'ms/step':>8}"
    lines = ["", f"{'optimizer':30} {columns}"]
    for name, record in records.items():
        tenth = -(-len(record.curve) // 10)
        times = record.update_seconds, record.pass_seconds + record.update_seconds
        lines.append(
            f"{labels[name]:30} {record.merit or 0:12.2f} % {fmean(record.curve[-tenth:]):15.3f} "
            f"{1e3 * times[0]:10.1f} {1e3 * times[1]:8.1f}"
        )
        if name == "ng":
            averaged = record.averaged[record.run.steps] or 0
            lines.append(f"{labels[name] + ', averaged weights':30} {averaged:12.2f} %")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    text = f"number of training steps [{STEPS}, or {SAMPLE_STEPS} on the sample]"
    parser.add_argument("--steps", type=int, help=text)
    parser.add_argument("--data-root", metavar="FOLDER", help="folder of datasets")
    parser.add_argument("--out", default="demo.png", metavar="FILE", help="file for the plot")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse()
    try:
        main(args.steps, args.data_root, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"demo: {error}")
