"""Loss curves as PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

# Okabe and Ito's palette, told apart by colour-blind readers too; an optimizer keeps its colour.
COLOURS = {
    "ng_gnn": "#D55E00",
    "adam": "#0072B2",
    "muon": "#009E73",
    "adamw": "#56B4E9",
    "sgd": "#CC79A7",
    "ng_t": "#E69F00",
    "nfn": "#F0E442",
    "lstm": "#8C564B",
    "ff": "#999999",
}
OTHER = "#555555"
SMOOTHING = 1 / 30  # share of a run that a point is the mean of


@dataclass(frozen=True, slots=True)
class Curve:
    """Losses of one optimizer.

    Attributes:
        name: Chooses the colour.
        label: For the legend.
        losses: One sequence a seed; they may end early.
        every: Training steps from one value to the next.
    """

    name: str
    label: str
    losses: Sequence[Sequence[float]]
    every: int = 1


@dataclass(frozen=True, slots=True)
class Panel:
    """Curves to be compared.

    Attributes:
        title: Above them.
        curves: Drawn in this order.
    """

    title: str
    curves: Sequence[Curve]


def plot_losses(panels: Sequence[Panel]) -> bytes:
    """A PNG with the panels side by side: mean over seeds, their range as a band, log scale."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(0.6 + 5.4 * len(panels), 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for curve in panel.curves:
            _draw(axis, curve)
        axis.set_title(panel.title, fontsize=11, loc="left")
        axis.set_xlabel("training step")
        axis.set_yscale("log")
        ticks = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.yaxis.minorticks_off()
        axis.set_ylim(*_limits(panel.curves))
        axis.grid(axis="y", color="0.9", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9)
    axes[0].set_ylabel("training loss, nats (smoothed)")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axis: Any, curve: Curve) -> None:
    """One line and its band."""
    smooth = [_smoothed(losses) for losses in curve.losses]
    columns = [[s[i] for s in smooth if i < len(s)] for i in range(max(map(len, smooth)))]
    # A value stands in the middle of the steps that it is the mean of.
    steps = [(i + 0.5) * curve.every for i in range(len(columns))]
    colour = COLOURS.get(curve.name, OTHER)
    width = 2.2 if curve.name.startswith("ng_") else 1.5
    axis.plot(steps, [fmean(c) for c in columns], color=colour, label=curve.label, linewidth=width)
    if len(smooth) > 1:
        low, high = [min(c) for c in columns], [max(c) for c in columns]
        axis.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over the neighbours on both sides."""
    half = int(len(losses) * SMOOTHING / 2)
    return [fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """The range of the values, but no higher than 5: a diverging run is cut off."""
    values = sorted(chain.from_iterable(_smoothed(s) for c in curves for s in c.losses))
    return 0.9 * values[0], min(5.0, 1.1 * values[-1])
