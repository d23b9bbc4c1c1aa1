"""Networks as sets without structure: DeepSets (Zaheer et al. 2017) on rows or on parameters.

What Kofinas et al. 2024 call Set NN is the architecture of inr2vec (De Luigi et al. 2023) as
Navon et al. 2023 measured it: their figures are the same. There an element is a neuron's row of
incoming weights. The neurons of a layer are then a set, but those that they read are not, so that
a permutation of hidden neurons changes the answer.

With single parameters for elements, of which all that is known is the value, the layer, and whether
it is a weight or a bias, no permutation within a tensor changes the answer, hence none of hidden
neurons, nor many others that do change the network.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.metanets.baselines.flat import Biases, Deltas, Weights, flattened, unflattened
from l2o_graph.models.mlp import mlp

Element = Literal["parameter", "row"]


def rows(weights: Weights, biases: Biases) -> Float[Tensor, "I neurons F"]:
    """Each neuron's incoming weights, filled up with zeros to the widest layer's, and its bias."""
    widest = max(w.shape[2] for w in weights)
    padded = [nn.functional.pad(w, (0, widest - w.shape[2])) for w in weights]
    layers = zip(padded, biases, strict=True)
    return torch.cat([torch.cat([w, b[..., None]], dim=2) for w, b in layers], dim=1)


class SetEncoder(nn.Module):
    """Each element by itself: h_n = MLP(W x_n + k_n), with k_n learned for each kind of element.

    Args:
        layout: Widths of the networks, from input to output.
        of: What is an element. Kinds are the tensors of parameters, or the layers of rows.
        hidden: Width H.
        layers: Linear layers, the first of them W.
        dropout: Share of each hidden layer that is dropped in training.
    """

    kinds: Tensor

    def __init__(
        self, layout: Sequence[int], of: Element, hidden: int, layers: int, dropout: float
    ):
        super().__init__()
        self.of: Element = of
        if of == "parameter":
            sizes = [i * o for i, o in pairwise(layout)] + [o for o in layout[1:]]
        else:
            sizes = list(layout[1:])
        numbers = [kind for kind, size in enumerate(sizes) for _ in range(size)]
        kinds = torch.tensor(numbers, device="cpu")  # also where weights are to be filled in later
        self.register_buffer("kinds", kinds, persistent=False)
        self.value = nn.Linear(1 if of == "parameter" else max(layout[:-1]) + 1, hidden, bias=False)
        self.kind = nn.Embedding(len(sizes), hidden)
        self.deeper = nn.Sequential(
            nn.ReLU(), nn.Dropout(dropout), mlp([hidden] * layers, dropout), nn.ReLU()
        )

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I n H"]:
        """States of all elements, in the order of ``flattened`` or of ``rows``."""
        if self.of == "parameter":
            x = flattened(weights, biases)[..., None]
        else:
            x = rows(weights, biases)
        return self.deeper(self.value(x) + self.kind(self.kinds))


def set_pooled(states: Float[Tensor, "I n H"]) -> Float[Tensor, "I two_H"]:
    """Mean and maximum over the elements.

    inr2vec has the maximum alone, which of single parameters would keep little but extremes.
    """
    return torch.cat([states.mean(1), states.amax(1)], dim=1)


class SetClassifier(nn.Module):
    """MLP(pooled MLP(element)).

    Args:
        layout: Widths of the networks, from input to output.
        classes: How many logits to answer with.
        hidden: Width.
        layers: Linear layers that each element passes alone.
        of: What is an element: "row", as in the paper, or "parameter".
        dropout: Share of each hidden layer that is dropped in training.
    """

    def __init__(
        self,
        layout: Sequence[int],
        classes: int = 10,
        hidden: int = 256,
        layers: int = 2,
        of: Element = "row",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.encoder = SetEncoder(layout, of, hidden, layers, dropout)
        self.head = mlp([2 * hidden, hidden, hidden, classes], dropout)

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I classes"]:
        """Logits of each network."""
        return self.head(set_pooled(self.encoder(weights, biases)))


class SetEditor(nn.Module):
    """A delta for each parameter, from its own state and the pooled states of all.

    Args:
        layout: Widths of the networks, from input to output.
        hidden: Width.
        layers: Linear layers that each parameter passes alone.
        dropout: Share of each hidden layer that is dropped in training.
    """

    def __init__(
        self, layout: Sequence[int], hidden: int = 256, layers: int = 2, dropout: float = 0.0
    ):
        super().__init__()
        self.encoder = SetEncoder(layout, "parameter", hidden, layers, dropout)
        self.own = nn.Linear(hidden, hidden)
        self.others = nn.Linear(2 * hidden, hidden, bias=False)
        self.delta = nn.Linear(hidden, 1)

    def forward(self, weights: Weights, biases: Biases) -> Deltas:
        """Deltas of weights and of biases."""
        states = self.encoder(weights, biases)
        hidden = self.own(states) + self.others(set_pooled(states))[:, None]
        return unflattened(self.delta(hidden.relu())[..., 0], weights, biases)
