"""Controllers side by side on networks of validation: is what was learned, is the graph, worth it?

    python -m meta_train.compare messages=FILE none=FILE start --draws 6

All train the same networks on the same batches. Reported is the mean logarithm of the loss at the
end, of the weights and of the averaged weights, relative to the start; and of each pair of
controllers the mean difference over draws of families, with a paired t-test.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from tqdm import tqdm

from l2o_graph.commands import run_command
from l2o_graph.datasets.images import DATA_VARIABLE
from l2o_graph.optim.checkpoints import load_checkpoint
from l2o_graph.optim.controller import Controller, ControllerConfig
from l2o_graph.ranges import COUNT, THREADS, check_ranges
from meta_train.benchmarks.judge import paired_p
from meta_train.benchmarks.report import table
from meta_train.controller_training import VALIDATION_SEED, mean_log_of_last, validation_losses
from meta_train.families import HELD_OUT
from meta_train.families.registry import FAMILIES

START = "start"
PAIRS = 4  # of instances


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a controller came to on a draw of a family.

    Mean logarithms of the last losses, relative to the start, and of those of averaged weights.
    """

    last: float
    averaged: float


def compare(
    controllers: dict[str, Controller],
    families: Sequence[str],
    draws: int,
    steps: int,
    told: bool = False,
    data_root: str | Path | None = None,
) -> dict[str, dict[str, list[Outcome]]]:
    """Outcomes by controller and family, one for each draw; networks are told the end or not."""
    found = {name: {family: [] for family in families} for name in controllers}
    turns = list(itertools.product(families, range(draws)))
    for family, draw in tqdm(turns, unit="draw"):
        for name, controller in controllers.items():
            losses = validation_losses(
                controller.config, controller.vector(), family, VALIDATION_SEED + draw, PAIRS,
                steps, told, data_root,
            )  # fmt: skip
            ends = Outcome(mean_log_of_last(losses[:-1]), mean_log_of_last(losses[-1:]))
            found[name][family].append(ends)
    return found


def markdown(found: dict[str, dict[str, list[Outcome]]]) -> str:
    """Tables of means by family, and of the pairs of controllers."""
    names = list(found)
    families = list(found[names[0]])
    rows = [["family", *names]]
    for family in families:
        cells = []
        for name in names:
            outcomes = found[name][family]
            last, averaged = fmean(o.last for o in outcomes), fmean(o.averaged for o in outcomes)
            cells.append(f"{last:.3f}, {averaged:.3f}")
        rows.append([family + (" (held out)" if FAMILIES[family].held_out else ""), *cells])
    pairs = [["pair", "families", "of the weights", "p", "of averaged weights", "p"]]
    groups = {
        "trained on": [f for f in families if not FAMILIES[f].held_out],
        "held out": [f for f in families if FAMILIES[f].held_out],
    }
    for (a, b), (label, chosen) in itertools.product(
        itertools.combinations(names, 2), groups.items()
    ):
        if not chosen:
            continue
        cells = []
        for key in ("last", "averaged"):
            differences = [
                getattr(x, key) - getattr(y, key)
                for family in chosen
                for x, y in zip(found[a][family], found[b][family], strict=True)
            ]
            cells += [_with_spread(differences), f"{paired_p(differences):.2g}"]
        pairs.append([f"{a} - {b}", label, *cells])
    return f"{table(rows)}\n\n{table(pairs)}"


def _with_spread(values: Sequence[float]) -> str:
    text = f"{fmean(values):+.3f}"
    return text + (f" ± {stdev(values) / len(values) ** 0.5:.3f}" if len(values) > 1 else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train, print; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.compare", description=(__doc__ or "").partition("\n")[0]
    )
    text = f"NAME=FILE, a packaged name, or '{START}' for the first one before training"
    parser.add_argument("controllers", nargs="+", help=text)
    parser.add_argument(
        "--families", nargs="+", choices=sorted(FAMILIES), help="[the held-out ones]"
    )
    parser.add_argument("--draws", type=int, default=4, help="of each family [4]")
    parser.add_argument("--steps", type=int, default=500, help="[500]")
    parser.add_argument("--told", action="store_true", help="the end is told")
    parser.add_argument("--data-root", help=f"where datasets lie [${DATA_VARIABLE} or data]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    given = parser.parse_args(arguments)
    return run_command("meta_train.compare", lambda: _compared(given), stopped="stopped")


def _compared(given: argparse.Namespace) -> list[str]:
    """Make the tables that a command line asks for."""
    check_ranges(given, draws=COUNT, steps=COUNT, threads=THREADS)
    torch.set_num_threads(given.threads)
    loaded = {}
    for text in given.controllers:
        name, _, path = text.partition("=")
        if name == START and not path:
            config = next(iter(loaded.values())).config if loaded else ControllerConfig()
            loaded[name] = Controller(config)  # its answers are 0
        else:
            loaded[name] = load_checkpoint(path or name).controller
    families = given.families or list(HELD_OUT)
    found = compare(loaded, families, given.draws, given.steps, given.told, given.data_root)
    return [
        f"mean log loss after {given.steps} steps, {given.draws} draws a family; weights, averaged",
        markdown(found),
    ]
