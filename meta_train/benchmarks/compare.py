"""Comparison of learned controllers on the same validation problems.

    python -m meta_train.compare messages=FILE none=FILE start --draws 6

All controllers train the same networks on the same mini-batches. The first table has, for each
family, the mean logarithm of the final loss relative to the initial one, for the weights and for
the averaged weights. The second has the mean difference of each pair of controllers over draws of
families, with a paired t-test.
"""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm

from l2o_graph.commands import run_command
from l2o_graph.datasets.images import DATA_VARIABLE
from l2o_graph.optim.checkpoints import load_checkpoint
from l2o_graph.optim.controller import Controller, ControllerConfig
from l2o_graph.ranges import COUNT, THREADS, check_ranges
from meta_train.benchmarks.judge import t_test
from meta_train.benchmarks.report import table
from meta_train.controller_training import VALIDATION_SEED, mean_log_of_last, validation_losses
from meta_train.families import HELD_OUT
from meta_train.families.registry import FAMILIES

START = "start"
PAIRS = 4  # number of instances in a draw of a family
# For each family and draw: mean logarithm of the final losses, of weights and averaged weights.
Outcomes = dict[str, list[tuple[float, float]]]


def compare(
    controllers: dict[str, Controller],
    families: Sequence[str],
    draws: int,
    steps: int,
    data_root: str | Path | None = None,
) -> dict[str, Outcomes]:
    """Train with each controller, without ``total_steps``.

    Args:
        controllers: Controllers by name.
        families: Names of families.
        draws: Number of draws of each family.
        steps: Number of training steps.
        data_root: Folder of datasets.

    Returns:
        Outcomes by name of the controller.
    """
    found: dict[str, Outcomes] = {name: {f: [] for f in families} for name in controllers}
    turns = list(itertools.product(families, range(draws)))
    for family, draw in tqdm(turns, unit="draw"):
        for name, controller in controllers.items():
            losses = validation_losses(
                controller.config, controller.vector(), family, VALIDATION_SEED + draw, PAIRS,
                steps, data_root=data_root,
            )  # fmt: skip
            ends = mean_log_of_last(losses[:-1]), mean_log_of_last(losses[-1:])
            found[name][family].append(ends)
    return found


def markdown(found: dict[str, Outcomes]) -> str:
    """Format both tables."""
    names = list(found)
    families = list(found[names[0]])
    rows = [["family", *names]]
    for family in families:
        means = [map(fmean, zip(*found[name][family], strict=True)) for name in names]
        cells = [", ".join(f"{mean:.3f}" for mean in both) for both in means]
        rows.append([family + (" (held out)" if FAMILIES[family].held_out else ""), *cells])
    pairs = [["pair", "families", "of the weights", "p", "of averaged weights", "p"]]
    for a, b in itertools.combinations(names, 2):
        for label, held_out in (("trained on", False), ("held out", True)):
            chosen = [f for f in families if FAMILIES[f].held_out == held_out]
            if not chosen:
                continue
            cells = []
            for i in (0, 1):  # the weights, and averaged weights
                both = [zip(found[a][f], found[b][f], strict=True) for f in chosen]
                differences = [x[i] - y[i] for x, y in itertools.chain(*both)]
                cells += [_with_error(differences), f"{t_test(differences):.2g}"]
            pairs.append([f"{a} - {b}", label, *cells])
    return f"{table(rows)}\n\n{table(pairs)}"


def _with_error(values: Sequence[float]) -> str:
    """Format the mean and its standard error."""
    text = f"{fmean(values):+.3f}"
    return text + (f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.compare", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    text = f"NAME=FILE, a packaged name, or '{START}' for the untrained controller"
    add("controllers", nargs="+", help=text)
    text = "families to compare on [the held-out ones]"
    add("--families", nargs="+", default=list(HELD_OUT), choices=sorted(FAMILIES), help=text)
    add("--draws", type=int, default=4, help="number of draws of each family [4]")
    add("--steps", type=int, default=500, help="number of training steps [500]")
    add("--data-root", help=f"folder of datasets [${DATA_VARIABLE} or data]")
    add("--threads", type=int, default=1, help="number of CPU threads [1]")
    given = parser.parse_args(arguments)

    def work() -> list[str]:
        check_ranges(given, draws=COUNT, steps=COUNT, threads=THREADS)
        torch.set_num_threads(given.threads)
        loaded: dict[str, Controller] = {}
        for text in given.controllers:
            name, _, path = text.partition("=")
            if name == START and not path:
                config = next(iter(loaded.values())).config if loaded else ControllerConfig()
                loaded[name] = Controller(config)  # its outputs are 0
            else:
                loaded[name] = load_checkpoint(path or name).controller
        draws, steps = given.draws, given.steps
        found = compare(loaded, given.families, draws, steps, given.data_root)
        title = f"mean log loss after {steps} steps, {draws} draws a family; weights, averaged"
        return [title, markdown(found)]

    return run_command("meta_train.compare", work, stopped="stopped")
