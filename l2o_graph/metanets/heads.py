"""Heads: outputs for whole networks, and for each of their weights and biases."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.blocks import Topology
from l2o_graph.models.mlp import linear_maps


class OutputNodes(nn.Module):
    """MLP with ``depth`` hidden layers on the concatenated states of the output nodes.

    It also reads ``more`` features of each network.
    """

    def __init__(
        self, outputs: int, size: int, hidden: int, depth: int, answers: int, more: int = 0
    ):
        super().__init__()
        self.outputs = outputs
        self.maps = nn.Sequential(
            *linear_maps(outputs * size + more, hidden, depth),
            nn.ReLU(),
            nn.Linear(hidden, answers),
        )

    def forward(
        self, nodes: Float[Tensor, "*B N H"], more: Float[Tensor, "*B more"] | None = None
    ) -> Float[Tensor, "*B answers"]:
        """Compute outputs from the last nodes, which are the network's outputs, and ``more``."""
        read = nodes[..., -self.outputs :, :].flatten(-2)
        return self.maps(read if more is None else torch.cat([read, more], dim=-1))


class ParameterDeltas(nn.Module):
    """MLPs that give a number for each weight, from its edge, and each bias, from its node.

    The released code counted biases from node 0 on, as if inputs had biases, and so changed the
    biases of the wrong neurons. Edges and nodes have ``edge`` and ``node`` channels; K =
    ``answers`` numbers are given for each.
    """

    def __init__(self, edge: int, node: int, answers: int = 1):
        super().__init__()
        self.of_edge, self.of_node = (
            nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, answers))
            for size in (edge, node)
        )

    def forward(
        self,
        topology: Topology,
        nodes: Float[Tensor, "*B N H"],
        edges: Iterable[Float[Tensor, "... C"]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Compute numbers of kernels, (*B, out, in), and biases, (*B, out); K > 1 comes first."""
        forward = torch.cat([each[..., 0, :, :] for each in edges], dim=-2)
        kernels, biases = topology.spec.kernels, topology.spec.biases
        runs = answers_first(self.of_edge(forward)).split([k.size for k in kernels], dim=-1)
        of_weights = [run.unflatten(-1, k.grid[1:]) for run, k in zip(runs, kernels, strict=True)]
        of_nodes = answers_first(self.of_node(nodes))
        return of_weights, [of_nodes[..., slice(*topology.bias(bias))] for bias in biases]


def answers_first(found: Float[Tensor, "*B K"]) -> Tensor:
    """Move K to the front: (*B, K) -> (K, *B), or (*B) for K = 1."""
    return found.squeeze(-1) if found.shape[-1] == 1 else found.movedim(-1, 0)
