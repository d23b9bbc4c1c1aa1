"""Readers: networks that give a state for every cell of every parameter, as input of the head.

A reader provides the context of a scalar beyond its own features. "ng_gnn", "ng_t" and "nfn" read
the graph of neurons, "lstm" the tensors in order, and "ff" nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Topology
from l2o_graph.layout.grids import grid_route
from l2o_graph.models.mlp import linear_maps
from l2o_graph.models.nfn import NFN
from l2o_graph.models.ng_gnn import NGGNN
from l2o_graph.models.ng_t import NGT
from l2o_graph.paper.embedding import PaddedEmbedding
from l2o_graph.paper.features import NUM_FEATURES, Scalars, Span
from l2o_graph.registry import registering


@dataclass(frozen=True, slots=True, eq=False)  # a group is itself: hashed by identity
class WorkItem:
    """Parts that are processed together: all edges, all biases, or a loose parameter."""

    parts: tuple[Span, ...]
    of: Literal["edges", "nodes", "nothing"]

    def cells(self) -> list[int]:
        """Return the number of cells of each part."""
        return [part.cells for part in self.parts]


Features = Callable[[WorkItem], Scalars]
States = Callable[[WorkItem], Float[Tensor, "cells C"]]


class GraphReader(nn.Module):
    """Reader of the graph: the state of a cell is that of its edge or node, and 0 if it is loose.

    The backbone processes initial states along the graph, see ``NGGNN``. ``of_node`` maps the final
    state of a node to C = ``size`` channels, and ``of_edge`` the two states of an edge. If it is
    None, ``of_node`` maps the forward state of an edge.
    """

    def __init__(
        self,
        embedding: PaddedEmbedding,
        backbone: nn.Module,
        of_edge: nn.Module | None,
        of_node: nn.Module,
        size: int,
    ):
        super().__init__()
        self.embedding, self.backbone = embedding, backbone
        self.of_edge, self.of_node = of_edge, of_node
        self.size = size

    def forward(self, topology: Topology, groups: Sequence[WorkItem], features: Features) -> States:
        """Read the network.

        Args:
            topology: Topology of the network.
            groups: All cells of all parameters: those of edges, those of nodes, and those of each
                loose parameter.
            features: Function that returns the features of a group.

        Returns:
            Function that returns the states of a group's cells.
        """
        known = {group.of: features(group) for group in groups if group.of != "nothing"}
        no_bias = Scalars((), next(self.parameters()).new_zeros(NUM_FEATURES, 0))
        nodes = self.embedding.nodes(topology, known.get("nodes", no_bias))
        last: Float[Tensor, "2 E H"] | None = None
        if "edges" in known:
            route = grid_route(topology, nodes.device, together=True)
            nodes, (last,) = self.backbone(route, nodes, [self.embedding.edges(known["edges"])])

        def states(group: WorkItem) -> Tensor:
            if group.of == "edges" and last is not None:
                return self.of_node(last[0]) if self.of_edge is None else self.of_edge(last)
            if group.of == "nodes":
                at = [topology.bias(bias) for bias in topology.spec.biases]
                return self.of_node(torch.cat([nodes[slice(*where)] for where in at]))
            # Loose parameters have no neurons, and so no states.
            return nodes.new_zeros(sum(group.cells()), self.size)

        return states


class TensorReader(nn.Module):
    """Reader with one state for each tensor: an LSTM over the tensors, in order.

    Its input for a tensor is the mean over scalars of a small network of their features. It is
    reset at every step: it has memory of tensors, not of time.

    Source:
        The LSTM baseline of Kofinas et al. 2024, section 4.3.
    """

    def __init__(self, hidden: int):
        super().__init__()
        self.size = hidden
        self.read = nn.Sequential(*linear_maps(NUM_FEATURES, hidden, 2))
        self.cell = nn.LSTMCell(hidden, hidden)

    def forward(self, topology: Topology, groups: Sequence[WorkItem], features: Features) -> States:
        """Read the network; as for ``GraphReader``."""
        sizes = [max(math.prod(shape), 1) for shape in topology.spec.shapes]
        zero = self.cell.weight_hh.new_zeros(1, self.size)
        mean = [zero] * len(sizes)
        for group in groups:
            scalars = features(group)
            read = self.read(scalars.x.T)
            runs = read.split([part.size for part in group.parts])
            for part, run in zip(group.parts, runs, strict=True):
                i = part.parameter
                mean[i] = mean[i] + run.sum(0, keepdim=True) / sizes[i]
        memory, tensors = (zero, zero), []
        for x in mean:
            memory = self.cell(x, memory)
            tensors.append(memory[0])

        def states(group: WorkItem) -> Tensor:
            copies = zip(group.parts, group.cells(), strict=True)
            return torch.cat([tensors[part.parameter].expand(n, -1) for part, n in copies])

        return states


class NoReader(nn.Module):
    """Reader without states: scalars are independent (the FF baseline of Kofinas et al. 2024)."""

    size = 0

    def forward(self, topology: Topology, groups: Sequence[WorkItem], features: Features) -> States:
        """Read nothing."""
        return lambda group: features(group).x.new_zeros(sum(group.cells()), 0)


class ForwardEdges(nn.Sequential):
    """The paper's readout of edges: a small network on the forward state only."""

    def forward(self, input: Float[Tensor, "2 E H"]) -> Float[Tensor, "E H"]:
        """Map the forward states."""
        return super().forward(input[0])


@runtime_checkable
class Reader(Protocol):
    """Interface of a reader, which is a module.

    Attributes:
        size: Number of channels C of a state.
    """

    size: int

    def __call__(
        self, topology: Topology, groups: Sequence[WorkItem], features: Features
    ) -> States:
        """Read the network; as for ``GraphReader``."""
        ...


Build = TypeVar("Build", bound=Callable[[int, int], Reader])
REGISTERED: dict[str, Callable[[int, int], Reader]] = {}


def register_reader(name: str) -> Callable[[Build], Build]:
    """Register a reader for rules of ``PaperOptimizer``.

    A decorator of a module, or a function that builds one, called as ``build(hidden, layers)``.
    ``RuleConfig(name)`` is then a rule with it. The module is called as ``GraphReader.forward``.

    Args:
        name: Value of ``RuleConfig.model`` for this reader.

    Raises:
        ValueError: For a name that is taken.
    """
    return registering(REGISTERED, name, "reader", taken=BUILT_IN)


BUILT_IN = ("ng_gnn", "ng_t", "nfn", "lstm", "ff")


def reader_of(model: str, hidden: int, layers: int) -> Reader:
    """Build the reader for a model of Kofinas et al. 2024, by their supplement."""
    if model in REGISTERED:
        return REGISTERED[model](hidden, layers)
    if model == "ff":
        return NoReader()
    if model == "lstm":
        return TensorReader(hidden)
    if model == "ng_t":  # with axial mixing, no reverse features, one readout for edges and nodes
        backbone = NGT(hidden, layers, edge_hidden=2 * hidden, axial=True)
        embedding = PaddedEmbedding(hidden, reverse=False)
        readout = nn.Sequential(*linear_maps(hidden, hidden, 3))
        return GraphReader(embedding, backbone, None, readout, hidden)
    backbone = {"ng_gnn": NGGNN, "nfn": NFN}[model](hidden, layers)
    of_edge, of_node = (linear_maps(hidden, hidden, 2) for _ in range(2))
    embedding = PaddedEmbedding(hidden)
    return GraphReader(embedding, backbone, ForwardEdges(*of_edge), nn.Sequential(*of_node), hidden)
