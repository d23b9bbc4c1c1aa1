"""ProbeGen on CNNs: how accurate a network is, from what it answers to learned images.

Kahana et al., ICLR 2025, arXiv 2410.10811. Weights are not read: networks run, those of one
architecture side by side.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2o_graph.datasets.cnn.architecture import FUNCTIONS, NO_SKIP, CNNArchitecture, as_wide
from l2o_graph.datasets.cnn.files import CNNs, stacked
from l2o_graph.metanets.cnn_config import CNNModelConfig
from l2o_graph.metanets.probes import CODE
from l2o_graph.models.mlp import mlp

WIDTH = 32  # channels of the generator
SMALLEST = 4  # side at which it begins, or up to twice of it
BRIGHTEST = 2.0  # normalised images lie within about this


class GeneratedImages(nn.Module):
    """Learned codes through transposed convolutions with nothing between them, then tanh.

    Args:
        channels: Number of channels of an image.
        side: Height and width of an image.
        count: Number of images M.
    """

    def __init__(self, channels: int, side: int, count: int):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(count, CODE))
        doublings, first = 0, side
        while first % 2 == 0 and first > SMALLEST:
            doublings, first = doublings + 1, first // 2
        widths = [CODE, *[WIDTH] * doublings, channels]
        self.maps = nn.Sequential(nn.ConvTranspose2d(widths[0], widths[1], first))
        for fan_in, fan_out in pairwise(widths[1:]):
            self.maps.append(nn.ConvTranspose2d(fan_in, fan_out, 4, stride=2, padding=1))

    def forward(self) -> Float[Tensor, "M C side side"]:
        """Make the images."""
        return BRIGHTEST * self.maps(self.codes[..., None, None]).tanh()


class CNNProbeBody(nn.Module):
    """An MLP on the shares of classes that networks answer with to generated images.

    Args:
        config: Of the model.
    """

    def __init__(self, config: CNNModelConfig):
        super().__init__()
        self.ends = config.inputs, config.classes
        self.images = GeneratedImages(config.inputs, config.side, config.probes)
        hidden = [config.hidden] * (config.layers - 1)
        self.net = mlp([config.probes * config.classes, *hidden, 1], config.dropout)

    def forward(self, networks: CNNs) -> Float[Tensor, " I"]:
        """Logits of the networks' accuracy.

        Raises:
            ValueError: For networks of other channels or classes.
        """
        images, found = self.images(), {}
        for which in networks.which.unique().tolist():
            architecture = networks.architectures[which]
            self._check(architecture)
            own = (networks.which == which).nonzero().flatten()
            answers = logits_of(architecture, stacked(networks, own, images), images)
            found |= zip(own.tolist(), answers.softmax(-1).flatten(1), strict=True)
        return self.net(torch.stack([found[i] for i in range(len(networks))])).squeeze(1)

    def _check(self, architecture: CNNArchitecture) -> None:
        if (architecture.channels[0], architecture.classes) != self.ends:
            raise ValueError(
                f"ProbeGen: expected networks from {self.ends[0]} channels to {self.ends[1]} "
                f"classes, found {architecture}"
            )


def logits_of(
    architecture: CNNArchitecture,
    tensors: Sequence[Float[Tensor, "n ..."]],
    images: Float[Tensor, "M C height width"],
) -> Float[Tensor, "n M classes"]:
    """What n networks of one architecture answer to images, as ``cnn_module`` would.

    Args:
        architecture: Of the networks.
        tensors: Weight and bias of each layer, of all networks.
        images: Normalised as those that the networks were trained on.
    """
    count, a = len(tensors[0]), architecture
    layers = [images[:, None].expand(-1, count, -1, -1, -1)]
    for i, (name, skip) in enumerate(zip(a.activations, a.skips, strict=True)):
        weight, bias = (t.flatten(0, 1) for t in tensors[2 * i : 2 * i + 2])
        x = F.conv2d(
            layers[-1].flatten(1, 2), weight, bias, a.strides[i], a.kernels[i] // 2, groups=count
        ).unflatten(1, (count, -1))
        if skip != NO_SKIP:
            x = x + as_wide(layers[skip], x.shape[2])
        layers.append(FUNCTIONS[name](x))
    weight, bias = tensors[-2:]
    means = layers[-1].mean((3, 4)).movedim(1, 0)
    return torch.baddbmm(bias[:, None], means, weight.mT)
