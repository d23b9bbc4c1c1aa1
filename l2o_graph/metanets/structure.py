"""Architectures and modules -> NetSpec: the neurons of a CNN and what joins them."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from l2o_graph.datasets.cnn.architecture import CNNArchitecture, cnn_module
from l2o_graph.graph.neural import neural_graph
from l2o_graph.layout.contract import folded
from l2o_graph.layout.spec import NetSpec

# Of the images that an architecture's network is followed with; any would do.
SIDE = 8


@lru_cache(maxsize=4096)
@torch.inference_mode(False)  # what is cached may be needed for a backward pass later
def structure_of(architecture: CNNArchitecture) -> NetSpec:
    """Neurons and kernels of an architecture, followed once."""
    with torch.random.fork_rng(devices=[]):
        module = cnn_module(architecture)
    return structure_of_module(module, torch.zeros(1, architecture.channels[0], SIDE, SIDE))


def structure_of_module(
    module: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any]
) -> NetSpec:
    """Neurons and kernels of any network: its computation, followed through a batch."""
    return folded(neural_graph(module, inputs).spec)
