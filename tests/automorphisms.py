"""Random symmetries of a graph, found without knowing what network it came from.

A symmetry of a neural graph maps every set of neurons to itself, inputs and outputs each to
themselves, and edges of a kernel to edges of that kernel. They are found by individualising a
pair of nodes and refining colours (McKay 1981), in two copies of the graph at once.
"""

import math
import random

import numpy as np
import torch
from torch import Tensor

from l2o_graph.architecture import Kernel, NetSpec
from l2o_graph.graph import topology_of


def grid_nodes(spec: NetSpec, kernel: Kernel) -> tuple[np.ndarray, np.ndarray]:
    """The nodes of each cell's row and column, cells in the order in which they are stored."""
    groups, rows, columns = kernel.grid
    of_rows, of_columns = topology_of(spec).sides(kernel)
    g, r, c = np.meshgrid(np.arange(groups), np.arange(rows), np.arange(columns), indexing="ij")
    return (of_rows + g * rows + r).ravel(), (of_columns + g * columns + c).ravel()


def mixed(x: np.ndarray) -> np.ndarray:
    """Numbers that have nothing to do with each other (splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class Coloured:
    """Nodes with colours that say more and more of where they lie."""

    def __init__(self, spec: NetSpec):
        colours = []
        for n, neurons in enumerate(spec.neurons):
            index = np.arange(neurons.size) if neurons.role != "hidden" else np.zeros(neurons.size)
            colours.append(mixed((index + 1).astype(np.uint64) * np.uint64(7919) + np.uint64(n)))
        for bias in spec.biases:  # two sets may be alike but for the parameters on them
            part = colours[bias.neurons][bias.neurons_start : bias.neurons_start + bias.size]
            part += mixed(np.full(bias.size, bias.parameter + 17, np.uint64))
        self.colours = np.concatenate(colours)
        topology = topology_of(spec)
        # For each kernel (grid, first node of rows, of columns, kinds of the edges both ways).
        self.kernels = []
        for k, kernel in enumerate(spec.kernels):
            ends, kinds = topology.sides(kernel), (2 * k + 10, 2 * k + 11)
            if spec.is_constant(kernel.parameter):  # edges of one constant are all alike
                kind = 2 * (kernel.parameter - len(spec.shapes))
                kinds = (kind + 1, kind) if kernel.from_rows else (kind, kind + 1)
            self.kernels.append((kernel.grid, *ends, kinds))

    def refine(self) -> None:
        """Until no colour splits any more."""
        known = 0
        while len(np.unique(self.colours)) > known:
            known = len(np.unique(self.colours))
            total = self.colours * np.uint64(3)
            for (groups, rows, columns), row, column, kinds in self.kernels:
                # All edges of a group are there: what a neuron sees is the sum over its group.
                ends = (row, rows), (column, columns)
                for (at, size), (there, other), kind in zip(ends, ends[::-1], kinds, strict=True):
                    seen = self.colours[there : there + groups * other].reshape(groups, other)
                    seen = mixed(seen + np.uint64(kind * 104729)).sum(1, keepdims=True)
                    total[at : at + groups * size].reshape(groups, size)[:] += seen
            self.colours = mixed(total)

    def marked(self, nodes: np.ndarray, marks: np.ndarray) -> "Coloured":
        """The same with some nodes told apart."""
        copy = object.__new__(Coloured)
        copy.colours, copy.kernels = self.colours.copy(), self.kernels
        copy.colours[nodes] = mixed(np.asarray(marks, np.uint64))
        copy.refine()
        return copy


def random_symmetry(spec: NetSpec, seed: int) -> np.ndarray:
    """For each node the node that it is mapped to."""
    draw = random.Random(seed)
    one = Coloured(spec)
    one.refine()
    other, mark = one, 1
    tied: set[int] = set()  # colours whose nodes cannot be exchanged as one likes
    while True:
        values, counts = np.unique(one.colours, return_counts=True)
        if counts.max() == 1:
            break
        colour = values[draw.choice(np.flatnonzero(counts > 1))]
        nodes, there = (np.flatnonzero(each.colours == colour) for each in (one, other))
        draw.shuffle(order := list(there))
        # All of them at once, which is what most layers allow; else one, as a head among heads.
        tries = [] if colour in tied else [(nodes, np.array(order))]
        node = draw.choice(list(nodes))
        tries += [(np.array([node]), np.array([each])) for each in order]
        for of_one, of_other in tries:
            marks = mark + np.arange(len(of_one))
            marked, again = one.marked(of_one, marks), other.marked(of_other, marks)
            if np.array_equal(np.sort(again.colours), np.sort(marked.colours)):
                one, other, mark = marked, again, mark + len(of_one)
                break
            tied.add(colour)
        else:
            raise AssertionError("no node of this colour can take its place")
    target = {c: i for i, c in enumerate(other.colours)}
    return np.array([target[c] for c in one.colours])


def moved(spec: NetSpec, tensors: list[Tensor], symmetry: np.ndarray) -> list[Tensor]:
    """Tensors in the shapes of the parameters, with every neuron where the symmetry puts it."""
    answer = [t.clone() for t in tensors]
    flat = [t.view(-1) for t in answer]
    topology = topology_of(spec)
    for kernel in spec.kernels:
        if spec.is_constant(kernel.parameter):
            continue
        row, column = grid_nodes(spec, kernel)
        count = spec.num_nodes
        code, wanted = row * count + column, symmetry[row] * count + symmetry[column]
        order = np.argsort(code)
        cell = order[np.searchsorted(code, wanted, sorter=order)]
        assert np.array_equal(code[cell], wanted), "not a symmetry of the graph"
        positions = math.prod(kernel.positions)
        run = slice(kernel.start, kernel.start + kernel.size)
        cells = tensors[kernel.parameter].reshape(-1)[run].view(-1, positions)
        flat[kernel.parameter][run].view(-1, positions)[torch.from_numpy(cell)] = cells
    for bias in spec.biases:
        start, stop = topology.bias(bias)
        there = torch.from_numpy(symmetry[start:stop] - start)
        run = slice(bias.start, bias.start + bias.size)
        flat[bias.parameter][run][there] = tensors[bias.parameter].reshape(-1)[run]
    return answer
