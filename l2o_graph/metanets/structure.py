"""Specifications (NetSpec) of CNN architectures and modules."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from l2o_graph.datasets.cnn.architecture import CNNArchitecture, cnn_module
from l2o_graph.graph.neural import neural_graph
from l2o_graph.layout.contract import folded
from l2o_graph.layout.spec import NetSpec

# Side of the images with which an architecture's network is traced, an arbitrary choice.
SIDE = 8


@lru_cache(maxsize=4096)
@torch.inference_mode(False)  # cached tensors may be needed in a backward pass
def structure_of(architecture: CNNArchitecture) -> NetSpec:
    """Compute the specification of an architecture, cached."""
    with torch.random.fork_rng(devices=[]):
        module = cnn_module(architecture)
    return structure_of_module(module, torch.zeros(1, architecture.channels[0], SIDE, SIDE))


def structure_of_module(
    module: nn.Module, inputs: Tensor | Sequence[Any] | Mapping[str, Any]
) -> NetSpec:
    """Compute the specification of any network, from a call with a batch."""
    return folded(neural_graph(module, inputs).spec)
