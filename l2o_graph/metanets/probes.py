"""Probes, inputs at which networks are evaluated, and models that read only the outputs.

ProbeGen (Kahana et al., ICLR 2025, arXiv 2410.10811): outputs at learned inputs show what a network
computes, whatever its weights are. Inputs that are learned independently overfit; those from a deep
linear generator share structure. Inputs on a grid draw the image that an INR represents.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.datasets.inr.siren import OFFSET
from l2o_graph.metanets.inr_config import INRModelConfig
from l2o_graph.models.mlp import mlp

CODE = 32  # size of the code of a probe


class GeneratedProbes(nn.Module):
    """Generator of M = ``count`` probes P = B (A C): two linear maps of codes C."""

    def __init__(self, inputs: int, count: int):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(count, CODE))
        self.maps = nn.Sequential(nn.Linear(CODE, CODE), nn.Linear(CODE, inputs))

    def forward(self) -> Float[Tensor, "inputs M"]:
        """Generate the probes."""
        return self.maps(self.codes).T


class OutputBody(nn.Module):
    """Base of models that read only the outputs at the probes, by a network ``net``."""

    net: nn.Module

    def forward(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        responses: Sequence[Float[Tensor, "I _ M"]],
    ) -> Float[Tensor, "I classes"]:
        """Compute logits: see ``l2o_graph.metanets.inr.BODIES``."""
        return self.net(probe_outputs(responses))


class ProbeBody(OutputBody):
    """ProbeGen: an MLP on the networks' outputs at the probes; weights are not read."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        hidden = [config.hidden] * (config.layers - 1)
        answers = config.layout[-1] * config.probes
        self.net = mlp([answers, *hidden, config.classes], config.dropout)


class DrawnBody(OutputBody):
    """CNN on the images that networks represent; weights are not read.

    This is a reference for models that read weights: it can use everything that a picture shows.
    Each stage has two 3 x 3 convolutions and halves the image. Channels double from stage to stage.
    """

    def __init__(self, config: INRModelConfig):
        super().__init__()
        read, written, side = config.layout[-1], config.hidden, config.side
        stages: list[nn.Module] = [nn.Unflatten(1, (read, side, side))]
        for _ in range(config.layers):
            stages += [nn.Conv2d(read, written, 3, padding=1), nn.ReLU()]
            stages += [nn.Conv2d(written, written, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            read, written, side = written, 2 * written, side // 2
        last = nn.Linear(read * side**2, config.classes)
        self.net = nn.Sequential(*stages, nn.Flatten(), nn.Dropout(config.dropout), last)


def probe_outputs(responses: Sequence[Float[Tensor, "I _ M"]]) -> Float[Tensor, "I answers"]:
    """Extract the outputs at the probes, from 0 to 1, and centre and scale them."""
    return (3 * (responses[-1] - OFFSET)).flatten(1)
