"""What DWSNet and NFN share: INRs as weight spaces, their parameters in the order weight, bias."""

from collections.abc import Collection, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from l2o_graph.layout.spec import Role
from l2o_graph.metanets.baselines.flat import Biases, Deltas, Weights
from l2o_graph.models.equivariant import TensorSpec, weight_space
from l2o_graph.models.weight_space import Features
from l2o_graph.tracing.by_order import spec_of_parameters


def space_of(layout: Sequence[int], permutable: Collection[Role]) -> tuple[TensorSpec, ...]:
    """The weight space of MLPs of given widths; see ``weight_space``."""
    shapes = [shape for i, o in pairwise(layout) for shape in ((o, i), (o,))]
    return weight_space(spec_of_parameters([torch.empty(shape) for shape in shapes]), permutable)


def features_of(weights: Weights, biases: Biases) -> list[Float[Tensor, "I 1 ..."]]:
    """Networks as features of one channel."""
    return [t[:, None] for pair in zip(weights, biases, strict=True) for t in pair]


def deltas_of(features: Features) -> Deltas:
    """The way back."""
    tensors = [x[:, 0] for x in features]
    return tensors[::2], tensors[1::2]
