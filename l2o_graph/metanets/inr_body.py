"""NG-GNN and NG-T on INRs: the optimizer's layers, with a batch axis and a head."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Chunk, Topology, topology_of
from l2o_graph.layout.spec import NetSpec
from l2o_graph.metanets.heads import OutputNodes, ParameterDeltas
from l2o_graph.metanets.inr_config import INRModelConfig
from l2o_graph.metanets.inr_embedding import EdgeEmbedding, NodeEmbedding
from l2o_graph.models.ng_gnn import NGGNN, keep_nodes
from l2o_graph.models.ng_t import NGT
from l2o_graph.tracing.by_order import spec_of_module


class GraphBody(nn.Module):
    """Networks of one layout as graphs: first states, rounds of messages, and an answer."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        self.topology = topology_of(spec_of_layout(config.layout))
        self.chunks = by_kernel(self.topology)
        spec, nodes = self.topology.spec, config.hidden
        edges = nodes if config.model == "ng_gnn" else nodes // 2
        self.edges = EdgeEmbedding(edges, config.fourier, config.reverse, config.both_ways)
        self.nodes = NodeEmbedding(
            self.topology, nodes, config.fourier, config.probes, config.positions
        )
        self.backbone = backbone_of(config, self.topology)
        if config.task == "edit":
            self.head, self.last = ParameterDeltas(edges, nodes, config.answers), self.chunks
            return
        hidden, depth = nodes, 2
        if config.model == "ng_t":
            hidden, depth = 2 * nodes, 2 if config.axial else 1
        self.head = OutputNodes(config.layout[-1], nodes, hidden, depth, config.classes)
        # Only output nodes are read: the last round needs no more than what leads to them.
        role = [spec.neurons[kernel.target].role for kernel in spec.kernels]
        self.last = tuple(c for c in self.chunks if role[c[0].kernel] == "output")

    def forward(
        self,
        weights: Sequence[Float[Tensor, "I _ _"]],
        biases: Sequence[Float[Tensor, "I _"]],
        responses: Sequence[Float[Tensor, "I _ M"]],
    ) -> Float[Tensor, "I classes"] | tuple[list[Tensor], list[Tensor]]:
        """Logits, or a number for each weight and each bias: see ``models.BODIES``."""

        def first_edges(chunk: Chunk) -> Tensor:
            (block,) = chunk
            return self.edges(weights[block.kernel].flatten(1))

        nodes = self.nodes(self.topology, biases, responses)
        nodes, edges = self.backbone(self.topology, self.chunks, nodes, first_edges, self.last)
        if isinstance(self.head, OutputNodes):
            return self.head(nodes)
        return self.head(self.topology, self.chunks, nodes, edges)


def backbone_of(config: INRModelConfig, topology: Topology) -> NGGNN | NGT:
    """The rounds of messages, of the paper's sizes for a number of node channels."""
    hidden, layers, dropout = config.hidden, config.layers, config.dropout
    if config.model == "ng_gnn":
        # The edges that messages come along count; the released code counts forward ones alone.
        degree = topology.degree if config.reverse else topology.in_degree
        delta = (degree + 1).log().mean().item()
        model = NGGNN(hidden, layers, delta, dropout, last_edges=False, reverse=config.reverse)
        keep_nodes(model)
        return model
    return NGT(
        hidden,
        layers,
        config.heads,
        edge_hidden=hidden,
        axial=config.axial,
        edge=hidden // 2,
        attention=2 * hidden,
        dropout=dropout,
        last_edges=config.task == "edit",
    )


def spec_of_layout(layout: Sequence[int]) -> NetSpec:
    """A chain of linear layers with biases."""
    with torch.device("meta"):
        layers = [nn.Linear(of, to) for of, to in pairwise(layout)]
    return spec_of_module(nn.Sequential(*layers))


def by_kernel(topology: Topology) -> tuple[Chunk, ...]:
    """A chunk for each kernel: what no one asks for is not worked out, what one does not joined."""
    return tuple((block,) for block in topology.blocks)
