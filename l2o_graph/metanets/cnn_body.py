"""Graph models on CNNs of any architectures: embedding, backbone and head."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from l2o_graph.datasets.cnn.architecture import CNNArchitecture
from l2o_graph.datasets.cnn.files import CNNs
from l2o_graph.layout.spec import NetSpec
from l2o_graph.layout.tables import ArchitectureTables, Batch, Capacity, layout_of
from l2o_graph.metanets.cnn_config import CNNModelConfig
from l2o_graph.metanets.cnn_embedding import EdgeEmbedding, NodeEmbedding
from l2o_graph.metanets.cnn_probes import Answers
from l2o_graph.metanets.heads import OutputNodes
from l2o_graph.metanets.structure import structure_of
from l2o_graph.models.mlp import mlp
from l2o_graph.models.ng_gnn import NGGNN, keep_nodes
from l2o_graph.models.ng_t import NGT
from l2o_graph.models.ordered import OrderedGraph

READS = 256  # channels of the network that reads outputs at probes


class GraphBody(nn.Module):
    """Graph model with a scalar output for each network, read from its output nodes.

    With probes the head also reads the networks' outputs for generated images, and features of
    hidden nodes may include their responses.
    """

    def __init__(self, config: CNNModelConfig):
        super().__init__()
        self.room = Capacity(config.max_kernel, config.inputs, config.depth, config.classes)
        hidden, is_gnn = config.hidden, config.model != "ng_t"
        self.scaled = config.scaled
        self.edges = EdgeEmbedding(config, hidden if is_gnn else hidden // 2)
        self.nodes = NodeEmbedding(config, self.room.positions)
        self.backbone = backbone_of(config)
        width = hidden if is_gnn else 2 * hidden
        self.answers, self.reader, self.responses = None, None, None
        if config.probes:
            self.answers = Answers(config)
            self.reader = mlp([config.probes * config.classes, READS, READS, READS])
        if config.responses:
            self.responses = nn.Sequential(
                nn.Linear(2 * config.probes, hidden), nn.LayerNorm(hidden)
            )
        self.head = OutputNodes(config.classes, hidden, width, 2, 1, READS if config.probes else 0)

    def forward(self, networks: CNNs) -> Float[Tensor, " I"]:
        """Predict the logits of the networks' accuracy."""
        layouts = layouts_of(networks.architectures, self.room)
        probed = (None, None)
        if self.answers is not None:
            probed = self.answers(networks, hidden=self.responses is not None)
        return self.read(self.batch(layouts, networks.which), networks.values, *probed)

    def read_one(
        self, spec: NetSpec, values: Float[Tensor, " P"], module: nn.Module
    ) -> Float[Tensor, " 1"]:
        """Predict the logit of the accuracy of a network without a ``CNNArchitecture``.

        Raises:
            ValueError: For a model that reads responses of hidden neurons; and for a network that
                does not map images to logits, if the model has probes.
        """
        if self.responses is not None:
            raise ValueError(
                "responses: expected networks of a CNNArchitecture, whose hidden neurons respond "
                "in a known order, found a module"
            )
        layouts = ArchitectureTables([layout_of(spec, self.room)], self.room)
        batch = self.batch(layouts, torch.zeros(1, dtype=torch.long))
        outputs = None if self.answers is None else self.answers.of_module(module)
        return self.read(batch, [values], outputs)

    def batch(self, layouts: ArchitectureTables, which: Int64[Tensor, " I"]) -> Batch:
        """Assemble networks to one graph."""
        return layouts.batch(which, self.edges.both_ways)

    def read(
        self,
        batch: Batch,
        values: Sequence[Float[Tensor, " _"]],
        outputs: Float[Tensor, "I answers"] | None = None,
        of_nodes: Float[Tensor, "N responses"] | None = None,
    ) -> Float[Tensor, " I"]:
        """Predict the logits for an assembled batch, from each network's parameters.

        With probes, ``outputs`` are those for generated images; if responses are
        read, ``of_nodes`` are those of all nodes.
        """
        like = self.nodes.table
        batch, row = batch.to(like.device), torch.cat(list(values)).to(like)
        edges = self.edges(batch, batch.kernels(row, self.scaled))
        nodes = self.nodes(batch, batch.offsets(row))
        if self.responses is not None:
            nodes = nodes + self.responses(of_nodes)
        if isinstance(self.backbone, OrderedGraph):
            states = self.backbone(batch.directed, nodes, edges)
        else:
            states, _ = self.backbone(batch.directed, nodes, [edges])
        # Outputs that a network does not have get zeros, the last row.
        absent = states.new_zeros(1, states.shape[1])
        read = None if self.reader is None else self.reader(outputs)
        return self.head(torch.cat([states, absent])[batch.outputs], read).squeeze(1)


def backbone_of(config: CNNModelConfig) -> NGGNN | NGT | OrderedGraph:
    """Build the backbone: layers of NG-GNN or NG-T, or the ordered pass."""
    hidden = config.hidden
    if config.model == "ordered":
        return OrderedGraph(hidden, config.dropout)
    if config.model == "ng_gnn":
        sizes = hidden, config.layers, config.delta, config.dropout
        model = NGGNN(*sizes, last_edges=False)
        keep_nodes(model)
        return model
    return NGT(
        hidden,
        config.layers,
        config.heads,
        edge_hidden=config.edge_hidden * hidden,
        plain=True,
        edge=hidden // 2,
        attention=config.attention * hidden,
        dropout=config.dropout,
        last_edges=False,
    )


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # cached tensors may be needed in a backward pass
def layouts_of(architectures: tuple[CNNArchitecture, ...], room: Capacity) -> ArchitectureTables:
    """Compute the tables of architectures, cached.

    Raises:
        ValueError: For an architecture that exceeds the capacity.
    """
    return ArchitectureTables([layout_of(structure_of(each), room) for each in architectures], room)
