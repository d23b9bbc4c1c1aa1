"""A picture of a graph: neurons as dots, weights as lines between them.

Sets of neurons are drawn from left to right in the order of the computation. Of large sets, only
some evenly spaced neurons and some edges are shown, each edge between the nearest neurons shown.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from l2o_graph.graph.neural import NeuralGraph
from l2o_graph.layout.spec import Kernel, NetSpec

if TYPE_CHECKING:  # a slow import, and only pictures need it
    from matplotlib.figure import Figure

MOST_SHOWN = 12  # neurons of a set
WIDTH, HEIGHT, DOT = 2.2, 0.9, 0.18  # width of a set, height of its label and a neuron, in inches
PIXELS = 2**16 - 1  # Agg's limit on a side of a PNG

ROLE_COLOURS = {"input": "#009E73", "hidden": "#444444", "output": "#CC79A7"}
POSITIVE, NEGATIVE, CONSTANT = "#D55E00", "#0072B2", "#AAAAAA"


def draw(graph: NeuralGraph, path: str | Path) -> None:
    """Save a picture, see :func:`picture`, in the format of the path's suffix.

    Raises:
        ValueError: For an unknown suffix.
        OSError: If the path cannot be written to.
    """
    figure = picture(graph)
    figure.savefig(path, dpi=min(100.0, PIXELS / max(figure.get_size_inches())))


def picture(graph: NeuralGraph) -> "Figure":
    """Draw a graph.

    The colour of a line is the sign of the weight (the mean over positions), and its opacity the
    size relative to the largest weight of the kernel; edges of constants are grey. Green dots are
    inputs, purple ones outputs. Each set is labelled with its name, its number of neurons, and
    their activation if it is known.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    spec = graph.spec
    columns = _columns(spec)
    places = _places(spec, columns)
    height = max((-float(place[-1, 1]) for place in places), default=0.0) + HEIGHT
    figure = Figure(figsize=(WIDTH * (max(columns, default=0) + 1), height), layout="tight")
    axes = figure.add_subplot()
    axes.set_axis_off()
    for kernel in spec.kernels:
        source, target, values = _lines(graph, kernel)
        start, stop = (
            places[s][_dot(neurons, spec.neurons[s].size, len(places[s]))]
            for s, neurons in ((kernel.source, source), (kernel.target, target))
        )
        lines = _curves(start, stop, columns[kernel.target] - columns[kernel.source])
        strength = (values.abs() / values.abs().max().clamp(min=1e-30)).tolist()
        constant = spec.is_constant(kernel.parameter)
        colours = [CONSTANT if constant else POSITIVE if v > 0 else NEGATIVE for v in values]
        axes.add_collection(
            LineCollection(lines.tolist(), colors=colours, linewidths=0.6, alpha=strength, zorder=1)
        )
    for neurons, place in zip(spec.neurons, places, strict=True):
        x, y = place.T.tolist()
        axes.scatter(x, y, s=14, c=ROLE_COLOURS[neurons.role], zorder=2)
        text = f"{neurons.name}\n[{neurons.size}] {neurons.activation}".rstrip()
        axes.annotate(
            text, (x[0], y[0]), (0, 7), textcoords="offset points", ha="center", va="bottom",
            fontsize=7,
        )  # fmt: skip
    axes.autoscale_view()
    return figure


def _columns(spec: NetSpec) -> list[int]:
    """Compute the longest path from the inputs to each set."""
    columns = [0] * len(spec.neurons)
    for k in spec.kernels:  # in the order of the computation
        if k.source != k.target:
            columns[k.target] = max(columns[k.target], columns[k.source] + 1)
    return columns


def _spread(size: int) -> Int64[Tensor, " n"]:
    """Choose the indices below ``size`` that are shown, including the first and the last."""
    return torch.linspace(0, size - 1, min(size, MOST_SHOWN)).round().long()


def _places(spec: NetSpec, columns: Sequence[int]) -> list[Float[Tensor, "n 2"]]:
    """Compute the coordinates of the shown neurons of each set."""
    below: dict[int, float] = {}  # lower end of each column so far
    places = []
    for column, neurons in zip(columns, spec.neurons, strict=True):
        top = below.get(column, 0.0) + HEIGHT
        down = top + DOT * torch.arange(min(neurons.size, MOST_SHOWN))
        below[column] = float(down[-1])
        places.append(torch.stack([torch.full_like(down, WIDTH * column), -down], dim=1))
    return places


def _lines(
    graph: NeuralGraph, kernel: Kernel
) -> tuple[Int64[Tensor, " n"], Int64[Tensor, " n"], Float[Tensor, " n"]]:
    """Choose evenly spaced edges of a kernel: source and target within their sets, and weight."""
    groups, rows, columns = kernel.grid
    row = _spread(groups * rows)[:, None]
    column = _spread(columns)[None] + row.div(rows, rounding_mode="floor") * columns
    row, column = (each.flatten() for each in torch.broadcast_tensors(row, column))
    scalars = graph.scalars(kernel)[0].detach().float().cpu()
    values = scalars.view(groups * rows, columns, -1).mean(-1)[row, column % columns]
    source, target = (row, column) if kernel.from_rows else (column, row)
    return source + kernel.source_start, target + kernel.target_start, values


def _curves(
    start: Float[Tensor, "n 2"], stop: Float[Tensor, "n 2"], span: int
) -> Float[Tensor, "n T 2"]:
    """Compute lines: straight to the next column, bent around the neurons in between otherwise."""
    along = torch.tensor([0.0, 1.0]) if span == 1 else torch.linspace(0, 1, 17)
    bend = torch.tensor([0.0, -0.3 * (abs(span) - 1) ** 0.5] if span else [WIDTH / 4, 0.0])
    t = along[None, :, None]
    return (1 - t) * start[:, None] + t * stop[:, None] + 4 * t * (1 - t) * bend


def _dot(neuron: Int64[Tensor, " n"], size: int, dots: int) -> Int64[Tensor, " n"]:
    """Return the dot nearest to each neuron of a set."""
    return (neuron * (dots - 1) / max(size - 1, 1)).round().long()
