"""DWSNet and NFN on INRs: equivariant layers on weight spaces.

DWSNet (Navon et al. 2023) has all linear maps that commute with permutations of hidden neurons.
Depth, width, norm, pooling and head are those of AvivNavon/DWSNets on MNIST: five layers of 32
channels on the plain parameters, BatchNorm, maxima over hidden neurons, one linear layer. Within
layers the release has maxima and self-attention; the paper's linear maps, and these, have means.

NFN (Zhou et al. 2023) classifies and edits INRs under NP, with an encoding of the input or output
that a weight belongs to. That gives fewer maps than HNP, which is DWSNet's, with the same symmetry.
From AllanYangZhou/nfn are the random Fourier features of each scalar, the encoding, three layers
with ReLU and no norm, pooling by means, and a head with two hidden layers. The release's classifier
has 512 channels and some 40 million weights; here it has 48 and a million.
"""

import math
from collections.abc import Collection
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.layout.spec import Role
from l2o_graph.metanets.baselines.flat import Biases, Deltas, Weights
from l2o_graph.metanets.inr_config import INRModelConfig
from l2o_graph.models.equivariant import HNP, NP, TensorSpec, weight_space
from l2o_graph.models.mlp import mlp
from l2o_graph.models.weight_space import Features, equivariant_net, pooled, pooled_size
from l2o_graph.tracing.by_order import spec_of_parameters

# Frequencies of the encoding of inputs and outputs: from 1 to half of the release's max_freq 3.
IO_BANDS = (1.0, 1.25, 1.5)
IO_SIZE = 2 * len(IO_BANDS) + 1
FREQUENCIES, SCALE = 128, 3.0  # number of Fourier frequencies of scalars, and standard deviation
HEAD = 128  # width of NFN's head


def space_of(layout: tuple[int, ...], permutable: Collection[Role]) -> tuple[TensorSpec, ...]:
    """Describe the weight space of MLPs of given widths, tensors in the order weight, bias."""
    shapes = [shape for i, o in pairwise(layout) for shape in ((o, i), (o,))]
    return weight_space(spec_of_parameters([torch.empty(shape) for shape in shapes]), permutable)


def features_of(weights: Weights, biases: Biases) -> list[Float[Tensor, "I 1 ..."]]:
    """Convert networks to features with one channel."""
    return [t[:, None] for pair in zip(weights, biases, strict=True) for t in pair]


def deltas_of(features: Features) -> Deltas:
    """Convert features with one channel back to weights and biases."""
    tensors = [x[:, 0] for x in features]
    return tensors[::2], tensors[1::2]


class DWSNet(nn.Module):
    """DWSNet: equivariant layers, then maxima and a linear layer, or one channel of deltas."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        self.space = space_of(config.layout, HNP)
        classifies, hidden = config.task == "classify", config.hidden
        channels = [1, *[hidden] * (config.layers - 1), hidden if classifies else 1]
        self.net = equivariant_net(self.space, channels, True, config.dropout)
        read = hidden * pooled_size(self.space)
        self.readout = nn.Linear(read, config.classes) if classifies else None

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I classes"] | Deltas:
        """Compute logits or deltas."""
        features = self.net(features_of(weights, biases))
        if self.readout is None:
            return deltas_of(features)
        return self.readout(pooled(self.space, [x.relu() for x in features], torch.amax))


class NFN(nn.Module):
    """NFN: encoding and equivariant layers, then means and an MLP, or one channel of deltas.

    Args:
        config: Configuration of the model, with ``layers`` layers, and one more for editing.
    """

    def __init__(self, config: INRModelConfig):
        super().__init__()
        self.space = space_of(config.layout, NP)
        classifies, hidden = config.task == "classify", config.hidden
        self.encoding = NFNEncoding(config.layout)
        channels = [self.encoding.channels, *[hidden] * config.layers]
        last = [] if classifies else [1]
        self.net = equivariant_net(self.space, channels + last, False, config.dropout)
        widths = [hidden * pooled_size(self.space), HEAD, HEAD, config.classes]
        self.head = mlp(widths, config.dropout) if classifies else None

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I classes"] | Deltas:
        """Compute logits or deltas."""
        features = self.net(self.encoding(weights, biases))
        if self.head is None:
            return deltas_of(features)
        return self.head(pooled(self.space, [x.relu() for x in features], torch.mean))


class NFNEncoding(nn.Module):
    """Input features: cos and sin of 2 pi B x of each scalar x, and its input's or output's code.

    B are normal numbers that are drawn once and not trained.

    Args:
        layout: Widths of the networks, from input to output.
    """

    frequencies: Tensor
    inputs: Tensor
    outputs: Tensor

    def __init__(self, layout: tuple[int, ...]):
        super().__init__()
        self.register_buffer("frequencies", SCALE * torch.randn(FREQUENCIES))
        self.register_buffer("inputs", io_encoding(layout[0]), persistent=False)
        self.register_buffer("outputs", io_encoding(layout[-1]), persistent=False)
        self.channels = 2 * FREQUENCIES + IO_SIZE

    def forward(self, weights: Weights, biases: Biases) -> Features:
        """Compute features with ``channels`` channels; codes of hidden neurons are zeros."""
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


def io_encoding(count: int) -> Float[Tensor, "7 count"]:
    """Encode inputs or outputs by p from -1 to 1, and sines and cosines of it."""
    p = torch.linspace(-1, 1, count, device="cpu")  # with data even if the model is on meta
    angles = math.pi * torch.tensor(IO_BANDS, device="cpu")[:, None] * p
    return torch.cat([angles.sin(), angles.cos(), p[None]])
