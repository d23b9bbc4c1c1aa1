"""Canonical form of SIRENs under the sign and phase symmetries of sine neurons.

Two changes of a neuron sin(z) preserve the network, if the next layer undoes the sign:

    sin(z + k pi) = (-1)^k sin(z)        adds k half turns to its bias
    sin(pi - z) = sin(z)                 negates its weights and mirrors its bias

So every network has infinitely many equivalent ones, in addition to permutations of neurons. In
the canonical one, all hidden phases omega0 b are within [0, pi / 2].
"""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from l2o_graph.datasets.inr.siren import OMEGA0, layout_of


def canonical(
    weights: Sequence[Float[Tensor, "I _ _"]],
    biases: Sequence[Float[Tensor, "I _"]],
    omega0: float = OMEGA0,
) -> tuple[list[Float[Tensor, "I _ _"]], list[Float[Tensor, "I _"]]]:
    """Convert networks to canonical form, which represents the same images.

    Args:
        weights: Weights of each layer, (I, out, in); all layers but the last have sines.
        biases: Biases of each layer, (I, out).
        omega0: Frequency factor of the sines.

    Returns:
        Weights and biases in new tensors, hidden biases within [0, pi / (2 omega0)]; differentiable
        where no neuron changes its sign.

    Raises:
        ValueError: For tensors that do not form networks, naming the layer.

    Source:
        Godfrey et al. 2022 for the symmetries of sines; Kalogeropoulos et al. 2024 (ScaleGMN),
        appendix on sines, for a canonical form of the inputs of a weight-space network.
    """
    layout_of(weights, biases)
    half_turn = math.pi / omega0
    new_weights, new_biases = list(weights), list(biases)
    for i in range(len(weights) - 1):
        turns = (biases[i] / half_turn).floor()
        bias = (biases[i] - turns * half_turn).clamp(0, half_turn)
        mirrored = bias > half_turn / 2
        new_biases[i] = bias.where(~mirrored, half_turn - bias)
        # Signs (I, out) of incoming and outgoing weights.
        incoming, outgoing = 1 - 2 * mirrored.to(bias), 1 - 2 * turns.remainder(2)
        new_weights[i] = new_weights[i] * incoming[..., None]
        new_weights[i + 1] = new_weights[i + 1] * outgoing[:, None]
    new_weights[-1], new_biases[-1] = new_weights[-1].clone(), new_biases[-1].clone()
    return new_weights, new_biases
