"""Losses and accuracies over steps, and predicted against true accuracies, as PNG."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

# Okabe and Ito's palette, told apart by colour-blind readers too, and some of Tol's for what is
# rarely beside it; an optimizer keeps its colour.
COLOURS = {
    "ng": "#D55E00",
    "adam": "#0072B2",
    "muon": "#009E73",
    "adamw": "#56B4E9",
    "sgd": "#CC79A7",
    "ng_told": "#E69F00",
    "ng_averaged": "#F0E442",
    "ng_gnn": "#8C564B",
    "ng_t": "#882255",
    "nfn": "#44AA99",
    "lstm": "#332288",
    "ff": "#999999",
}
OTHER = "#555555"
SMOOTHING = 1 / 30  # fraction of a run that a point is the mean of


@dataclass(frozen=True, slots=True)
class Curve:
    """Losses of one optimizer.

    Attributes:
        name: Chooses the colour.
        label: For the legend.
        losses: One sequence a seed; they may end early.
        every: Training steps from one value to the next.
        accuracies: For each seed (training step, test accuracy in [0, 1]) on the way.
    """

    name: str
    label: str
    losses: Sequence[Sequence[float]]
    every: int = 1
    accuracies: Sequence[Sequence[tuple[int, float]]] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves to be compared.

    Attributes:
        title: Above them.
        curves: Drawn in this order.
    """

    title: str
    curves: Sequence[Curve]


def plot_curves(panels: Sequence[Panel]) -> bytes:
    """A PNG: a column for each panel, mean over seeds, their range as a band.

    Losses are on a log scale; below them the test accuracies, if any curve has them.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    tested = any(curve.accuracies for panel in panels for curve in panel.curves)
    size = (0.6 + 5.4 * len(panels), 4.2 + 3.6 * tested)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(1 + tested, len(panels), squeeze=False, sharex="col")
    for axis, panel in zip(axes[0], panels, strict=True):
        for curve in panel.curves:
            _draw_losses(axis, curve)
        axis.set_title(panel.title, fontsize=11, loc="left")
        axis.set_yscale("log")
        ticks = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.yaxis.minorticks_off()
        axis.set_ylim(*_limits(panel.curves))
        if panel.curves:
            axis.legend(frameon=False, fontsize=9)
    axes[0, 0].set_ylabel("training loss, nats (smoothed)")
    if tested:
        for axis, panel in zip(axes[1], panels, strict=True):
            for curve in panel.curves:
                _draw_accuracies(axis, curve)
        axes[1, 0].set_ylabel("test accuracy, %")
    for axis in axes.flat:
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def plot_predictions(
    predictions: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> bytes:
    """A PNG: a panel for each predictor, a point for each network.

    Args:
        predictions: By label true and predicted accuracies, in [0, 1].
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    size = (0.6 + 3.6 * len(predictions), 3.9)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    axes = figure.subplots(1, len(predictions), squeeze=False, sharex=True, sharey=True)[0]
    for axis, (label, (true, predicted)) in zip(axes, predictions.items(), strict=True):
        axis.plot([0, 100], [0, 100], color="0.8", linewidth=1)
        percent = ([100 * value for value in values] for values in (true, predicted))
        axis.scatter(*percent, s=5, color=COLOURS["adam"], alpha=0.4, linewidths=0)
        axis.set_title(label, fontsize=11, loc="left")
        axis.set_xlabel("test accuracy, %")
        axis.set_aspect("equal")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("predicted, %")
    highest = 100 * max(max(map(max, pair)) for pair in predictions.values())
    axes[0].set(xlim=(0, 1.05 * highest), ylim=(0, 1.05 * highest))
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    return file.getvalue()


def _draw_losses(axis: Any, curve: Curve) -> None:
    smooth = [_smoothed(losses) for losses in curve.losses]
    columns = [[s[i] for s in smooth if i < len(s)] for i in range(max(map(len, smooth)))]
    # A value stands in the middle of the steps that it is the mean of.
    _band(axis, curve, [(i + 0.5) * curve.every for i in range(len(columns))], columns)


def _draw_accuracies(axis: Any, curve: Curve) -> None:
    at: dict[int, list[float]] = {}
    for accuracies in curve.accuracies:
        for step, accuracy in accuracies:
            at.setdefault(step, []).append(100 * accuracy)
    if at:
        _band(axis, curve, sorted(at), [at[step] for step in sorted(at)])


def _band(
    axis: Any, curve: Curve, steps: Sequence[float | int], columns: Sequence[list[float]]
) -> None:
    """One line, the mean of each column, and the range of all."""
    colour = COLOURS.get(curve.name, OTHER)
    width = 2.2 if curve.name.startswith("ng") else 1.5
    axis.plot(steps, [fmean(c) for c in columns], color=colour, label=curve.label, linewidth=width)
    if max(map(len, columns)) > 1:
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over the neighbours on both sides."""
    half = int(len(losses) * SMOOTHING / 2)
    return [fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """The range of the values, but no higher than 5: a diverging run is cut off."""
    values = sorted(chain.from_iterable(_smoothed(s) for c in curves for s in c.losses)) or [1.0]
    return 0.9 * values[0], min(5.0, 1.1 * values[-1])
