"""FashionMNIST with the learned optimizer, Adam and Muon side by side: a table and a plot.

    python examples/demo.py [--data-root FOLDER] [--steps N] [--out demo.png]

All three start at the same initialisation and see the same batches. The learned optimizer averages
its weights as it goes; their accuracy is shown as well. Without the dataset, and without a network
to download it, the sample of FashionMNIST in the package has to do.
"""

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median

import torch
from tqdm import tqdm

from l2o_graph.datasets.images import DATA_VARIABLE, DatasetNotFoundError, data_root
from l2o_graph.ranges import COUNT
from l2o_graph.zoo.files import write_atomically
from meta_train.baselines import BEST_RATES, PACKAGED, contenders, label_of
from meta_train.benchmark import check_writable
from meta_train.plots import Curve, Panel, plot_curves
from meta_train.tasks import Task, get_task
from meta_train.training import Training

SEED = 101
OPTIMIZERS = ("adam", "muon", "ng")
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
    task, data, full = choose_task(root)
    steps = steps or (STEPS if full else SAMPLE_STEPS)
    known = contenders()
    labels = {
        name: known[name].label + ("" if name in PACKAGED else f", {BEST_RATES[name]:g}")
        for name in OPTIMIZERS
    }
    trainings = {
        name: Training(
            task.problem(SEED, torch.device("cpu")), known[name], BEST_RATES[name], steps
        )
        for name in OPTIMIZERS
    }
    with tqdm(range(steps), unit="step", mininterval=0.5) as progress:
        for step in progress:
            for training in trainings.values():
                training.step()
            if step % 10 == 0:
                losses = {n: f"{fmean(t.losses[-20:]):.3f}" for n, t in trainings.items()}
                progress.set_postfix(losses)
    print(table(labels, trainings))
    curves = [Curve(name, labels[name], [t.losses]) for name, t in trainings.items()]
    write_atomically(out, plot_curves([Panel(data, curves)]))
    print(f"\nwrote {out}")
    return out


def choose_task(root: str | None) -> tuple[Task, str, bool]:
    """The task on all of FashionMNIST if that is to be had, else on the sample; says which."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torchvision would wait for a silent server for ever
    try:
        task = get_task("fmnist_cnn")
        data = task.load(root)
        print(f"data: all of {data}, in {data_root(root).resolve()}")
        return task, data, True
    except DatasetNotFoundError as error:
        task = get_task("fmnist_sample")
        data = task.load(None)
        reason = " ".join(str(error.__cause__).split())
        print(
            f"data: {data} (6,000 of 60,000 images); the whole is not in "
            f"{data_root(root).resolve()} and could not be downloaded ({reason}). Give its folder "
            f"with --data-root or {DATA_VARIABLE}."
        )
        return task, data, False
    finally:
        socket.setdefaulttimeout(before)


def table(labels: dict[str, str], trainings: dict[str, Training]) -> str:
    """One line for each optimizer, and one for the averaged weights of the learned one."""
    lines = [
        "",
        f"{'optimizer':40} {'test accuracy':>14} {'loss, last 100':>15} {'ms/update':>10} "
        f"{'ms/step':>8}",
    ]
    for name, t in trainings.items():
        lines.append(
            f"{labels[name]:40} {t.accuracy():14.2%} {fmean(t.losses[-100:]):15.3f} "
            f"{1e3 * median(t.update_seconds):10.1f} {1e3 * median(t.step_seconds):8.1f}"
        )
        if name in PACKAGED:
            lines.append(f"{label_of(f'{name}_averaged'):40} {t.accuracy(averaged=True):14.2%}")
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
