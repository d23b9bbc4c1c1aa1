"""FashionMNIST with the learned optimizer, Adam and Muon side by side: a table and a plot.

    python examples/demo.py [--data-root FOLDER] [--steps N] [--out demo.png]

All three start at the same initialisation and see the same batches. The learned optimizer averages
its weights as it goes; their accuracy is shown as well. Without the dataset, and without a network
to download it, the sample of FashionMNIST in the package has to do.
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
from meta_train.benchmarks.plots import curves
from meta_train.benchmarks.records import Record, Run
from meta_train.benchmarks.report import Outcome
from meta_train.benchmarks.strangers.tasks import find
from meta_train.benchmarks.training import train
from meta_train.tasks import get_task

# What did best of each grid on the task fmnist_cnn (docs/results.md).
RATES = {"adam": 0.02, "muon": 0.05, "ng": 1.0}
STEPS, SAMPLE_STEPS = 600, 300
PATIENCE = 10.0  # seconds that a download may be silent


def main(steps: int | None = None, root: str | None = None, out: str | Path = "demo.png") -> Path:
    """Train, print the table and save the plot; returns its path.

    Args:
        steps: Of training; None for 600, or 300 on the sample.
        root: Where FashionMNIST lies; see ``l2o_graph.datasets.images.data_root``.
        out: The plot.

    Raises:
        ValueError: For fewer than one step.
        OSError: When the plot cannot be written; before any work.
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
    write_atomically(out, curves([task], tables, done, labels))
    print(f"\nwrote {out}")
    return out


def choose_task(root: str | None) -> tuple[str, str, bool]:
    """The task on all of FashionMNIST if that is to be had, else on the sample; says which."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torchvision would wait for a silent server for ever
    try:
        data = get_task("fmnist_cnn").load(root)
        print(f"data: all of {data}, in {data_root(root).resolve()}")
        return "fmnist_cnn", data, True
    except DatasetNotFoundError as error:
        data = get_task("fmnist_sample").load(None)
        reason = " ".join(str(error.__cause__).split())
        print(
            f"data: {data} (6,000 of 60,000 images); the whole is not in "
            f"{data_root(root).resolve()} and could not be downloaded ({reason}). Give its folder "
            f"with --data-root or {DATA_VARIABLE}."
        )
        return "fmnist_sample", data, False
    finally:
        socket.setdefaulttimeout(before)


def table(labels: Mapping[str, str], records: Mapping[str, Record]) -> str:
    """One line for each optimizer, and one for the averaged weights of the learned one."""
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
    parser.add_argument("--steps", type=int, help=f"{STEPS}, or {SAMPLE_STEPS} on the sample")
    parser.add_argument("--data-root", metavar="FOLDER")
    parser.add_argument("--out", default="demo.png", metavar="FILE")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse()
    try:
        main(args.steps, args.data_root, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"demo: {error}")
