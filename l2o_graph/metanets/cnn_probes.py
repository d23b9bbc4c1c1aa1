"""Outputs and responses of CNNs for learned images: ProbeGen, and probes of graph models.

Kahana et al., ICLR 2025, arXiv 2410.10811. Networks of one architecture are evaluated as a batch.
ProbeGen reads only their outputs. A graph model may read them beside the weights, and responses of
hidden neurons: the mean and the root mean square over each image.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from l2o_graph.datasets.cnn.architecture import FUNCTIONS, NO_SKIP, CNNArchitecture, as_wide
from l2o_graph.datasets.cnn.files import CNNs, stacked
from l2o_graph.layout.spec import NetSpec
from l2o_graph.metanets.cnn_config import CNNModelConfig
from l2o_graph.metanets.probes import CODE
from l2o_graph.models.mlp import mlp

WIDTH = 32  # channels of the generator
SMALLEST = 4  # its first maps have a side of at most this, or an odd one
TINY = 1e-6  # under a root, whose slope at 0 is infinite
BRIGHTEST = 2.0  # about the range of normalised images
LOGIT_UNIT = 3.0  # logits are bounded by a tanh of this unit


class GeneratedImages(nn.Module):
    """Generator: M = ``count`` codes, transposed convolutions without activations, then tanh."""

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
        """Generate the images."""
        return BRIGHTEST * self.maps(self.codes[..., None, None]).tanh()


class Answers(nn.Module):
    """Outputs of networks for generated images, for a config with ``probes``."""

    def __init__(self, config: CNNModelConfig):
        super().__init__()
        self.ends = config.inputs, config.classes
        self.reads_logits = config.logits
        self.images = GeneratedImages(config.inputs, config.side, config.probes)

    def forward(self, networks: CNNs, hidden: bool = False) -> tuple[Tensor, Tensor | None]:
        """Evaluate networks on the generated images.

        Returns:
            Outputs as read, (I, M * classes), and with ``hidden`` the responses of all
            neurons, one network after another, (N, 2 * M), 0 for inputs and outputs.

        Raises:
            ValueError: For networks with other numbers of channels or classes.
        """
        images, found = self.images(), {}
        for which in networks.which.unique().tolist():
            architecture = networks.architectures[which]
            self._check(architecture)
            own = (networks.which == which).nonzero().flatten()
            maps, logits = responses_of(architecture, stacked(networks, own, images), images)
            outputs = self._as_read(logits).flatten(1)
            of_nodes = summed_up(maps, *self.ends) if hidden else outputs
            found |= zip(own.tolist(), zip(outputs, of_nodes, strict=True), strict=True)
        outputs, of_nodes = zip(*(found[i] for i in range(len(networks))), strict=True)
        return torch.stack(outputs), torch.cat(of_nodes) if hidden else None

    def of_module(self, module: nn.Module) -> Float[Tensor, "1 answers"]:
        """Evaluate any network that maps images to logits.

        Raises:
            ValueError: For a network that fails on the images, or returns something else.
        """
        images = self.images()
        count, shape = len(images), " x ".join(map(str, images.shape[1:]))
        expected = f"network: expected one that maps images of {shape} to {self.ends[1]} logits"
        like = next(module.parameters(), images)
        try:
            logits = module(images.to(like))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(f"{expected}, found one that fails on them: {error}") from error
        if not isinstance(logits, Tensor) or logits.shape != (count, self.ends[1]):
            answer = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"{expected}, found one that maps {count} of them to {answer}")
        return self._as_read(logits.to(images)).flatten()[None]

    def _as_read(self, logits: Float[Tensor, "*B classes"]) -> Float[Tensor, "*B classes"]:
        """Convert logits to class probabilities, or to centred logits within -1 and 1."""
        if self.reads_logits:
            return ((logits - logits.mean(-1, keepdim=True)) / LOGIT_UNIT).tanh()
        return logits.softmax(-1)

    def _check(self, architecture: CNNArchitecture) -> None:
        if (architecture.channels[0], architecture.classes) != self.ends:
            raise ValueError(
                f"probes: expected networks from {self.ends[0]} channels to {self.ends[1]} "
                f"classes, found {architecture}"
            )


class CNNProbeBody(nn.Module):
    """ProbeGen: an MLP on the outputs of networks for generated images."""

    def __init__(self, config: CNNModelConfig):
        super().__init__()
        self.answers = Answers(config)
        hidden = [config.hidden] * (config.layers - 1)
        self.net = mlp([config.probes * config.classes, *hidden, 1], config.dropout)

    def forward(self, networks: CNNs) -> Float[Tensor, " I"]:
        """Predict the logits of the networks' accuracy.

        Raises:
            ValueError: For networks with other numbers of channels or classes.
        """
        outputs, _ = self.answers(networks)
        return self.net(outputs).squeeze(1)

    def read_one(
        self, spec: NetSpec, values: Float[Tensor, " P"], module: nn.Module
    ) -> Float[Tensor, " 1"]:
        """Predict the logit of the accuracy of a network without a ``CNNArchitecture``."""
        return self.net(self.answers.of_module(module)).squeeze(1)


def responses_of(
    architecture: CNNArchitecture,
    tensors: Sequence[Float[Tensor, "n ..."]],
    images: Float[Tensor, "M C height width"],
) -> tuple[list[Float[Tensor, "M n _ _ _"]], Float[Tensor, "n M classes"]]:
    """Evaluate n networks of one architecture on images, as ``cnn_module`` would.

    Args:
        architecture: Architecture of the networks.
        tensors: Weight and bias of each layer, of all networks.
        images: Images, normalised as those that the networks were trained on.

    Returns:
        Maps after each activation, (M, n, channels, height, width), and the logits.
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
    return layers[1:], torch.baddbmm(bias[:, None], means, weight.mT)


def summed_up(
    maps: Sequence[Float[Tensor, "M n _ _ _"]], inputs: int, classes: int
) -> Float[Tensor, "n N responses"]:
    """Compute means and root mean squares over images for all nodes, 0 for inputs and outputs."""
    rows = []
    for each in maps:
        mean = each.mean((3, 4))
        size = (each.square().mean((3, 4)) + TINY).sqrt()
        rows.append(torch.cat([mean, size]).permute(1, 2, 0))
    count, _, responses = rows[0].shape
    ends = [rows[0].new_zeros(count, size, responses) for size in (inputs, classes)]
    return torch.cat([ends[0], *rows, ends[1]], dim=1)
