"""NG-GNN and NG-T on INRs: layers as in the paper's optimizer, with a batch axis and a head."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Topology, topology_of
from l2o_graph.layout.grids import grid_route
from l2o_graph.layout.spec import NetSpec
from l2o_graph.metanets.heads import OutputNodes, ParameterDeltas
from l2o_graph.metanets.inr_config import INRModelConfig
from l2o_graph.metanets.inr_embedding import EdgeEmbedding, NodeEmbedding
from l2o_graph.models.ng_gnn import NGGNN, keep_nodes
from l2o_graph.models.ng_t import NGT
from l2o_graph.tracing.by_order import spec_of_module


class GraphBody(nn.Module):
    """Graph model for networks of one layout: embedding, backbone and head."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        self.topology = topology_of(spec_of_layout(config.layout))
        self.both_ways, nodes = config.both_ways, config.hidden
        edges = nodes if config.model == "ng_gnn" else nodes // 2
        self.edges = EdgeEmbedding(edges, config.fourier, config.reverse, config.both_ways)
        self.nodes = NodeEmbedding(
            self.topology, nodes, config.fourier, config.probes, config.positions
        )
        self.backbone = backbone_of(config, self.topology)
        if config.task == "edit":
            self.head = ParameterDeltas(edges, nodes, config.answers)
            return
        hidden, depth = nodes, 2
        if config.model == "ng_t":
            hidden, depth = 2 * nodes, 2 if config.axial else 1
        self.head = OutputNodes(config.layout[-1], nodes, hidden, depth, config.classes)

    def forward(
        self,
        weights: Sequence[Float[Tensor, "I _ _"]],
        biases: Sequence[Float[Tensor, "I _"]],
        responses: Sequence[Float[Tensor, "I _ M"]],
    ) -> Float[Tensor, "I classes"] | tuple[list[Tensor], list[Tensor]]:
        """Compute logits, or a number for each weight and each bias: see ``inr.BODIES``."""
        reads_outputs = isinstance(self.head, OutputNodes)
        nodes = self.nodes(self.topology, biases, responses)
        edges = [self.edges(each.flatten(1)) for each in weights]
        route = grid_route(self.topology, nodes.device, both=self.both_ways, outputs=reads_outputs)
        nodes, edges = self.backbone(route, nodes, edges)
        return self.head(nodes) if reads_outputs else self.head(self.topology, nodes, edges)


def backbone_of(config: INRModelConfig, topology: Topology) -> NGGNN | NGT:
    """Build the backbone, with the paper's sizes for a number of node channels."""
    hidden, layers, dropout = config.hidden, config.layers, config.dropout
    if config.model == "ng_gnn":
        # Degrees count all edges that carry messages; the released code counts only forward ones.
        edges = grid_route(topology, torch.device("cpu"), both=config.reverse)
        delta = (edges.all.arrivals.degree + 1).log().mean().item()
        model = NGGNN(hidden, layers, delta, dropout, last_edges=False)
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
    """Describe a chain of linear layers with biases."""
    with torch.device("meta"):
        layers = [nn.Linear(of, to) for of, to in pairwise(layout)]
    return spec_of_module(nn.Sequential(*layers))
