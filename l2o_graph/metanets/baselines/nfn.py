"""NFN (Zhou et al. 2023) as it was published for INRs: all neurons permutable, inputs numbered.

Its authors classify and edit INRs under NP, with an encoding of which input or output a weight
belongs to: fewer maps than HNP's, and the symmetry that the networks have all the same. It is
also what tells it from DWSNet here, whose maps are HNP's.

From AllanYangZhou/nfn are the random Fourier features of each scalar, the encoding, three layers
with ReLU and no norm, means for the invariant, and a head of two hidden layers. The
release's classifier has 512 channels and some 40 million weights; here it has 48 and a million.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.metanets.baselines.flat import Biases, Deltas, Weights
from l2o_graph.metanets.baselines.inr_space import deltas_of, features_of, space_of
from l2o_graph.models.equivariant import NP
from l2o_graph.models.mlp import mlp
from l2o_graph.models.weight_space import Features, equivariant_net, pooled, pooled_size

# The lowest and the highest are 1 and half of the release's max_freq 3.
IO_BANDS = (1.0, 1.25, 1.5)
IO_SIZE = 2 * len(IO_BANDS) + 1


def io_encoding(count: int) -> Float[Tensor, "7 count"]:
    """What tells inputs, or outputs, apart: p from -1 to 1, and sines and cosines of it."""
    p = torch.linspace(-1, 1, count, device="cpu")  # also where weights are to be filled in later
    angles = math.pi * torch.tensor(IO_BANDS, device="cpu")[:, None] * p
    return torch.cat([angles.sin(), angles.cos(), p[None]])


class NFNEncoding(nn.Module):
    """First features: cos and sin of 2 pi B x of each scalar x, and its input's or output's number.

    Args:
        layout: Widths of the networks, from input to output.
        frequencies: Rows of B, normal numbers that are drawn once and not trained.
        scale: Their deviation.
    """

    frequencies: Tensor
    inputs: Tensor
    outputs: Tensor

    def __init__(self, layout: Sequence[int], frequencies: int, scale: float):
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(frequencies))
        self.register_buffer("inputs", io_encoding(layout[0]), persistent=False)
        self.register_buffer("outputs", io_encoding(layout[-1]), persistent=False)
        self.channels = 2 * frequencies + IO_SIZE

    def forward(self, weights: Weights, biases: Biases) -> Features:
        """Features of ``channels`` channels; the numbers of hidden neurons are zeros."""
        answer = []
        tensors = features_of(weights, biases)
        for n, x in enumerate(tensors):
            angles = 2 * math.pi * x * self.frequencies.view(-1, *[1] * (x.dim() - 2))
            number = x.new_zeros(IO_SIZE, *x.shape[2:])
            if n == 0:  # the first weight (out, in), by its inputs
                number = number + self.inputs[:, None]
            if n == len(tensors) - 2:  # the last weight, by its outputs
                number = number + self.outputs[..., None]
            if n == len(tensors) - 1:  # the last bias
                number = number + self.outputs
            number = number.expand(len(x), *number.shape)
            answer.append(torch.cat([angles.cos(), angles.sin(), number], dim=1))
        return answer


class NFNClassifier(nn.Module):
    """Encoding, equivariant layers, means over all neurons, two hidden layers.

    Args:
        layout: Widths of the networks, from input to output.
        classes: How many logits to answer with.
        hidden: Channels.
        layers: Equivariant layers.
        frequencies: Of the Fourier features.
        scale: Their deviation.
        head: Width of the hidden layers behind the means.
        dropout: Share of the channels, and of those hidden layers, that is dropped in training.
    """

    def __init__(
        self,
        layout: Sequence[int],
        classes: int = 10,
        hidden: int = 48,
        layers: int = 3,
        frequencies: int = 128,
        scale: float = 3.0,
        head: int = 128,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.space = space_of(layout, NP)
        self.encoding = NFNEncoding(layout, frequencies, scale)
        channels = [self.encoding.channels, *[hidden] * layers]
        self.net = equivariant_net(self.space, channels, False, dropout)
        self.head = mlp([hidden * pooled_size(self.space), head, head, classes], dropout)

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I classes"]:
        """Logits of each network."""
        features = [x.relu() for x in self.net(self.encoding(weights, biases))]
        return self.head(pooled(self.space, features, torch.mean))


class NFNEditor(nn.Module):
    """Encoding and equivariant layers, the last of them to one channel.

    Args:
        layout: Widths of the networks, from input to output.
        hidden: Channels.
        layers: Hidden equivariant layers, one less than there are.
        frequencies: Of the Fourier features.
        scale: Their deviation.
        dropout: Share of the channels that is dropped between layers in training.
    """

    def __init__(
        self,
        layout: Sequence[int],
        hidden: int = 48,
        layers: int = 3,
        frequencies: int = 128,
        scale: float = 3.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.encoding = NFNEncoding(layout, frequencies, scale)
        channels = [self.encoding.channels, *[hidden] * layers, 1]
        self.net = equivariant_net(space_of(layout, NP), channels, False, dropout)

    def forward(self, weights: Weights, biases: Biases) -> Deltas:
        """Deltas of weights and of biases."""
        return deltas_of(self.net(self.encoding(weights, biases)))
