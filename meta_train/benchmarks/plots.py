"""Plots as PNG: standings of optimizers, training losses, and results of weight-space models."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from meta_train.benchmarks.judge import Standing, format_merit, gain
from meta_train.benchmarks.records import Record
from meta_train.benchmarks.strangers.task import Merit, Task

# The palette of Okabe and Ito; learned optimizers have warm colours.
COLOURS = {
    "ng": "#D55E00",
    "ng-averaged": "#E69F00",
    "ng-told": "#8C2D04",
    "adamw": "#0072B2",
    "adamw-default": "#56B4E9",
    "muon": "#009E73",
    "soap": "#CC79A7",
    "schedule-free": "#8C564B",
    "prodigy": "#999999",
    "adam": "#332288",
    "sgd": "#44AA99",
}
OTHER = "#555555"
FURTHEST = 20.0  # units behind the best at the end of the colour scale
COLUMNS = 4  # number of columns of plots of losses
SMOOTHING = 2  # number of points on either side of a running mean


def plot_standings(
    tasks: Sequence[Task],
    tables: Mapping[str, Mapping[str, Standing]],
    labels: Mapping[str, str],
) -> bytes:
    """Plot figures of merit by task and optimizer, coloured by the difference to the best.

    ``tables`` are standings by name of task and optimizer, ``labels`` titles of optimizers.
    """
    names = [name for name in labels if any(name in table for table in tables.values())]
    figure = _figure(2.6 + 0.85 * len(names), 1.5 + 0.3 * len(tasks))
    axis = figure.subplots()
    behind = [[_behind(task.merit, tables[task.name], name) for name in names] for task in tasks]
    image = axis.imshow(behind, cmap="YlGnBu_r", vmin=0, vmax=FURTHEST, aspect="auto")
    for i, task in enumerate(tasks):
        for j, name in enumerate(names):
            if name in tables[task.name]:
                axis.text(
                    j, i, format_merit(task.merit, [tables[task.name][name].entry.mean]),
                    ha="center", va="center", fontsize=7.5,
                    color="white" if behind[i][j] < 0.55 * FURTHEST else "black",
                    fontweight="normal" if behind[i][j] else "bold",
                )  # fmt: skip
    axis.set_xticks(range(len(names)), [labels[n] for n in names], rotation=30, ha="left")
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(tasks)), [task.label for task in tasks])
    axis.tick_params(length=0, labelsize=8)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, shrink=0.5, pad=0.02)
    bar.set_label("units behind the best", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return _png(figure)


def plot_losses(
    tasks: Sequence[Task],
    tables: Mapping[str, Mapping[str, Standing]],
    records: Sequence[Record],
    labels: Mapping[str, str],
) -> bytes:
    """Plot the training losses of the first seed for each task, at the best learning rates."""
    from matplotlib.ticker import NullFormatter

    columns = min(COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = _figure(0.4 + 2.9 * columns, 0.7 + 2.1 * rows, dpi=130)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    shown: dict[str, Any] = {}
    seed = min((r.run.seed for r in records), default=1)
    for axis, task in zip(axes, tasks, strict=False):
        low, high = [], []
        for name, standing in tables[task.name].items():
            if name == "ng-averaged":  # the same run as "ng"
                continue
            losses = _losses(records, task, name, standing.entry.rate, seed)
            if not losses:
                continue
            at = [(i + 0.5) * task.steps / len(losses) for i in range(len(losses))]
            width = 1.9 if standing.entry.is_learned else 1.1
            colour = COLOURS.get(name, OTHER)
            shown[name] = axis.plot(at, losses, color=colour, linewidth=width)[0]
            low.append(min(losses))
            high.append(losses[0])
        axis.set_title(task.label, fontsize=8.5, loc="left")
        if low and min(low) > 0:
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_ylim(0.9 * min(low), 1.3 * max(*high, 1.01 * min(low)))
        axis.tick_params(labelsize=7, which="both")
        axis.grid(axis="y", color="0.92", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes:
        axis.set_visible(False)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel("training loss", fontsize=9)
    if shown:
        figure.legend(
            list(shown.values()), [labels[n] for n in shown], loc="outside upper left",
            ncols=len(shown), frameon=False, fontsize=8,
        )  # fmt: skip
    return _png(figure)


def plot_predictions(
    predictions: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> bytes:
    """Plot predicted against true accuracies of networks, in one panel for each predictor.

    ``predictions`` are true and predicted accuracies in [0, 1], by title of the predictor.
    """
    figure = _figure(0.6 + 3.6 * len(predictions), 3.9)
    axes = figure.subplots(1, len(predictions), squeeze=False, sharex=True, sharey=True)[0]
    for axis, (label, (true, predicted)) in zip(axes, predictions.items(), strict=True):
        axis.plot([0, 100], [0, 100], color="0.8", linewidth=1)
        percent = ([100 * value for value in values] for values in (true, predicted))
        axis.scatter(*percent, s=5, color=COLOURS["adamw"], alpha=0.4, linewidths=0)
        axis.set_title(label, fontsize=11, loc="left")
        axis.set_xlabel("test accuracy, %")
        axis.set_aspect("equal")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("predicted, %")
    highest = 100 * max(max(map(max, pair)) for pair in predictions.values())
    axes[0].set(xlim=(0, 1.05 * highest), ylim=(0, 1.05 * highest))
    return _png(figure, bbox_inches="tight")


def plot_training(points: Mapping[str, Sequence[tuple[float, float]]]) -> bytes:
    """Plot validation against training accuracies, with one line for each classifier.

    ``points`` are the training and validation accuracy at each evaluation, in [0, 1].
    """
    figure = _figure(6.4, 4.8)
    axis = figure.subplots()
    axis.plot([0, 100], [0, 100], color="0.8", linewidth=1)
    colours = itertools.cycle(COLOURS.values())
    for (label, line), colour in zip(points.items(), colours, strict=False):
        train, val = ([100 * value for value in values] for values in zip(*line, strict=True))
        axis.plot(train, val, ".-", color=colour, linewidth=1.3, markersize=4, label=label)
        axis.plot(train[-1:], val[-1:], "o", color=colour, markersize=7)
    highest = 100 * max(max(point) for line in points.values() for point in line)
    axis.set(xlim=(0, 1.05 * highest), ylim=(0, 1.05 * highest))
    axis.set_xlabel("accuracy on the training split, %")
    axis.set_ylabel("accuracy on the validation split, %")
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    return _png(figure)


def _behind(merit: Merit, table: Mapping[str, Standing], name: str) -> float:
    """Compute the units behind the best optimizer; NaN without a figure."""
    if name not in table:
        return math.nan
    mine = table[name].entry.mean
    return max(gain(merit, s.entry.mean, mine) for s in table.values())


def _losses(
    records: Sequence[Record], task: Task, name: str, rate: float, seed: int
) -> list[float]:
    """Find the training losses of a run, as a running mean."""
    for r in records:
        if (r.run.task, r.run.optimizer, r.run.rate, r.run.seed) == (task.name, name, rate, seed):
            near = range(len(r.curve))
            return [fmean(r.curve[max(0, i - SMOOTHING) : i + SMOOTHING + 1]) for i in near]
    return []


def _figure(width: float, height: float, dpi: int = 150) -> Any:
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def _png(figure: Any, **settings: str) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", **settings)
    return file.getvalue()
