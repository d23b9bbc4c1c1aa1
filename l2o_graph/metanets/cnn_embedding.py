"""Initial states of edges and nodes from kernels, biases and activations.

Kofinas et al. 2024, section 3: kernels zero-padded to one size, two linear maps of their Fourier
features, a learned embedding of each position of a node and of each activation.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from l2o_graph.layout.tables import KNOWN_ACTIVATIONS, Batch
from l2o_graph.metanets.cnn_config import CNNModelConfig
from l2o_graph.models.fourier import Projection, read_both_ways

# Without Fourier features, initial weights are this many times torch's. With torch's, initial
# states of 3x3 kernels would have a standard deviation of 0.07 if weights are scaled, and of 0.01
# if not: negligible beside position embeddings with a standard deviation of 1.
GAIN = 5.0


def projection(inputs: int, size: int, sigma: float) -> Projection:
    """Build the projection of kernels or of biases."""
    made = Projection(inputs, size, sigma)
    if not sigma:
        made.first.weight.data *= GAIN
    return made


class EdgeEmbedding(nn.Module):
    """Projection of the kernel w, with K positions, of an edge and of its reverse.

    Args:
        config: Configuration of the model. With ``reverse`` a forward edge reads [w, 0, w] and its
            reverse [0, w, w]; otherwise the forward edge reads w, and its reverse, if any, 0.
            Without ``linear_as_conv`` linear layers have a projection of their own, of one weight.
        size: Number of channels C.
    """

    def __init__(self, config: CNNModelConfig, size: int):
        super().__init__()
        self.reverse, self.both_ways = config.reverse, config.both_ways
        self.centre = config.max_kernel**2 // 2
        read = 3 if config.reverse else 1
        self.kernel = projection(read * config.max_kernel**2, size, config.fourier)
        own = None if config.linear_as_conv else projection(read, size, config.fourier)
        self.linear = own

    def forward(self, batch: Batch, kernels: Float[Tensor, "E K"]) -> Float[Tensor, "D C"]:
        """Compute initial states in the order of ``batch.directed``."""
        convolutions = len(kernels) - (0 if self.linear is None else batch.dense)
        parts = [self._states(self.kernel, kernels[:convolutions])]
        if self.linear is not None:
            dense = kernels[convolutions:, self.centre : self.centre + 1]
            parts.append(self._states(self.linear, dense))
        of_reverse, of_forward = (torch.cat(states) for states in zip(*parts, strict=True))
        if not self.both_ways:
            return of_forward[batch.directed.edge]
        backward, forward = batch.directed.edge.chunk(2)
        if not self.reverse:  # a row for all convolutions, and one for all linear layers
            dense = (backward >= convolutions).long()
            backward = dense if len(of_reverse) > 1 else torch.zeros_like(dense)
        return torch.cat([of_reverse[backward], of_forward[forward]])

    def _states(
        self, maps: Projection, x: Float[Tensor, "n K"]
    ) -> tuple[Float[Tensor, "_ C"], Float[Tensor, "n C"]]:
        """Compute the states of reverse edges and of forward edges."""
        if not self.reverse:
            return maps(x.new_zeros(1, x.shape[1])), maps(x)
        forward, backward = read_both_ways(x)
        return maps(backward), maps(forward)


class NodeEmbedding(nn.Module):
    """Projection of biases, 0 for nodes without one, plus position and activation embeddings.

    There are ``positions`` position embeddings: for each input, each hidden layer and each output.
    Only hidden neurons have an activation embedding, also for no activation.
    """

    def __init__(self, config: CNNModelConfig, positions: int):
        super().__init__()
        self.bias = projection(1, config.hidden, config.fourier)
        self.table = nn.Parameter(torch.randn(positions, config.hidden))
        known = nn.Embedding(len(KNOWN_ACTIVATIONS), config.hidden)
        self.activation = known if config.activations else None

    def forward(self, batch: Batch, biases: Float[Tensor, " N"]) -> Float[Tensor, "N H"]:
        """Compute initial states."""
        states = self.bias(biases[:, None]) + _rows(self.table, batch.positions)
        if self.activation is None:
            return states
        nothing = self.table.new_zeros(1, self.table.shape[1])  # of inputs and outputs
        return states + _rows(torch.cat([self.activation.weight, nothing]), batch.activations)


def _rows(table: Float[Tensor, "rows H"], index: Int64[Tensor, " N"]) -> Float[Tensor, "N H"]:
    return table.index_select(0, index)
