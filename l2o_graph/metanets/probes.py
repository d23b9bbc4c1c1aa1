"""Learned inputs at which networks are evaluated, and a reader of nothing but the answers.

ProbeGen (Kahana et al., ICLR 2025, arXiv 2410.10811): what a network answers at inputs that are
learned tells what it computes, whatever its weights look like. Inputs that are each learned by
themselves overfit; those of a deep linear generator have structure in common.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.datasets.inr.siren import OFFSET
from l2o_graph.metanets.inr_config import INRModelConfig
from l2o_graph.models.mlp import mlp

CODE = 32  # entries of what a probe is made from


class GeneratedProbes(nn.Module):
    """M = ``count`` probes P = B (A C): codes C through two linear maps, nothing between them."""

    def __init__(self, inputs: int, count: int):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(count, CODE))
        self.maps = nn.Sequential(nn.Linear(CODE, CODE), nn.Linear(CODE, inputs))

    def forward(self) -> Float[Tensor, "inputs M"]:
        """Make the probes."""
        return self.maps(self.codes).T


class ProbeBody(nn.Module):
    """An MLP on what the outputs say at the probes; weights are not read."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        hidden = [config.hidden] * (config.layers - 1)
        answers = config.layout[-1] * config.probes
        self.net = mlp([answers, *hidden, config.classes], config.dropout)

    def forward(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        responses: Sequence[Float[Tensor, "I _ M"]],
    ) -> Float[Tensor, "I classes"]:
        """Logits: see ``l2o_graph.metanets.inr.BODIES``."""
        return self.net(said_of_images(responses))


def said_of_images(responses: Sequence[Float[Tensor, "I _ M"]]) -> Float[Tensor, "I answers"]:
    """What the outputs say at the probes, from 0 to 1, brought to a size of about 1."""
    return (3 * (responses[-1] - OFFSET)).flatten(1)
