"""One form for all SIRENs that are the same but for the signs and phases of their neurons.

A sine neuron z -> sin(z) says the same, up to a sign that the next layer can undo, with

    sin(z + k pi) = (-1)^k sin(z)        k half turns in its bias, the sign carried on
    sin(pi - z) = sin(z)                 its weights negated, its bias mirrored

so that each network has infinitely many equals, beside those that permutations make. Of these one
has all hidden phases omega0 b within [0, pi / 2].
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
    """Bring networks into canonical form; what they draw stays as it is.

    Args:
        weights: Weights of each layer, (I, out, in); every layer but the last is one of sines.
        biases: Biases of each layer, (I, out).
        omega0: Factor in every sine.

    Returns:
        Weights and biases in new tensors, hidden biases within [0, pi / (2 omega0)]; differentiable
        where no neuron changes its sign.

    Raises:
        ValueError: For tensors that do not make networks, naming the layer.

    Source:
        The symmetries of sines: Godfrey et al. 2022; as a canonical form before a network that
        reads weights: Kalogeropoulos et al. 2024 (ScaleGMN), appendix on sines.
    """
    layout_of(weights, biases)
    half_turn = math.pi / omega0
    of_weights, of_biases = list(weights), list(biases)
    for i in range(len(weights) - 1):
        turns = (biases[i] / half_turn).floor()
        bias = (biases[i] - turns * half_turn).clamp(0, half_turn)
        mirrored = bias > half_turn / 2
        of_biases[i] = bias.where(~mirrored, half_turn - bias)
        # +1 or -1 for each neuron: of all that it reads, and of all that reads it.
        inwards, outwards = 1 - 2 * mirrored.to(bias), 1 - 2 * turns.remainder(2)
        of_weights[i] = of_weights[i] * inwards[..., None]
        of_weights[i + 1] = of_weights[i + 1] * outwards[:, None]
    of_weights[-1], of_biases[-1] = of_weights[-1].clone(), of_biases[-1].clone()
    return of_weights, of_biases
