"""Networks as sets without structure: DeepSets (Zaheer et al. 2017) on rows or on parameters.

What Kofinas et al. 2024 call Set NN is the architecture of inr2vec (De Luigi et al. 2023) as
Navon et al. 2023 measured it: their figures are the same. There an element is a neuron's row of
incoming weights. The neurons of a layer are then a set, but those that they read are not, so that
a permutation of hidden neurons changes the answer.

To edit, elements are single parameters, of which all that is known is the value, the layer, and
whether it is a weight or a bias: no permutation within a tensor changes the answer, hence none of
hidden neurons, nor many others that do change the network.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.metanets.baselines.flat import Biases, Deltas, Weights, flattened, unflattened
from l2o_graph.metanets.inr_config import INRModelConfig
from l2o_graph.models.mlp import mlp


def rows(weights: Weights, biases: Biases) -> Float[Tensor, "I neurons F"]:
    """Each neuron's incoming weights, filled up with zeros to the widest layer's, and its bias."""
    widest = max(w.shape[2] for w in weights)
    padded = [nn.functional.pad(w, (0, widest - w.shape[2])) for w in weights]
    layers = zip(padded, biases, strict=True)
    return torch.cat([torch.cat([w, b[..., None]], dim=2) for w, b in layers], dim=1)


class SetEncoder(nn.Module):
    """Each element by itself: h_n = MLP(W x_n + k_n), with k_n learned for each kind of element.

    Elements are rows, of a kind for each layer, or to edit parameters, of a kind for each tensor.

    Args:
        config: Of the model, with ``layers`` linear layers, the first of them W.
    """

    kinds: Tensor

    def __init__(self, config: INRModelConfig):
        super().__init__()
        layout, hidden = config.layout, config.hidden
        self.single = config.task == "edit"
        sizes = list(layout[1:])
        if self.single:
            sizes = [inputs * outputs for inputs, outputs in pairwise(layout)] + sizes
        numbers = [kind for kind, size in enumerate(sizes) for _ in range(size)]
        kinds = torch.tensor(numbers, device="cpu")  # also where weights are to be filled in later
        self.register_buffer("kinds", kinds, persistent=False)
        self.value = nn.Linear(1 if self.single else max(layout[:-1]) + 1, hidden, bias=False)
        self.kind = nn.Embedding(len(sizes), hidden)
        deeper = mlp([hidden] * config.layers, config.dropout)
        self.deeper = nn.Sequential(nn.ReLU(), nn.Dropout(config.dropout), deeper, nn.ReLU())

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I n H"]:
        """States of all elements, in the order of ``flattened`` or of ``rows``."""
        x = flattened(weights, biases)[..., None] if self.single else rows(weights, biases)
        return self.deeper(self.value(x) + self.kind(self.kinds))


def set_pooled(states: Float[Tensor, "I n H"]) -> Float[Tensor, "I two_H"]:
    """Mean and maximum over the elements.

    inr2vec has the maximum alone, which of single parameters would keep little but extremes.
    """
    return torch.cat([states.mean(1), states.amax(1)], dim=1)


class SetClassifier(nn.Module):
    """MLP(pooled h_n)."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        self.encoder = SetEncoder(config)
        hidden = config.hidden
        self.head = mlp([2 * hidden, hidden, hidden, config.classes], config.dropout)

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I classes"]:
        """Logits of each network."""
        return self.head(set_pooled(self.encoder(weights, biases)))


class SetEditor(nn.Module):
    """A delta for each parameter, from its own state and the pooled states of all."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        hidden = config.hidden
        self.encoder = SetEncoder(config)
        self.own = nn.Linear(hidden, hidden)
        self.others = nn.Linear(2 * hidden, hidden, bias=False)
        self.delta = nn.Linear(hidden, 1)

    def forward(self, weights: Weights, biases: Biases) -> Deltas:
        """Deltas of weights and of biases."""
        states = self.encoder(weights, biases)
        hidden = self.own(states) + self.others(set_pooled(states))[:, None]
        return unflattened(self.delta(hidden.relu())[..., 0], weights, biases)
