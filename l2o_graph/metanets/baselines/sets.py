"""Set NN: DeepSets (Zaheer et al. 2017) on rows of weights or on single parameters.

Set NN of Kofinas et al. 2024 is the architecture of inr2vec (De Luigi et al. 2023) as evaluated by
Navon et al. 2023, with the same figures. There an element is a neuron's row of incoming weights.
The neurons of a layer are then a set, but those that they read are not, so a permutation of hidden
neurons changes the result.

For editing, elements are single parameters, with their value, layer and kind (weight or bias). The
result then commutes with all permutations within a tensor: those of hidden neurons, but also many
that change the function of the network.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.metanets.baselines.flat import Biases, Deltas, Weights, flattened, unflattened
from l2o_graph.metanets.inr_config import INRModelConfig
from l2o_graph.models.mlp import mlp


def rows(weights: Weights, biases: Biases) -> Float[Tensor, "I neurons F"]:
    """Concatenate each neuron's incoming weights, padded to the widest layer, and its bias."""
    widest = max(w.shape[2] for w in weights)
    padded = [nn.functional.pad(w, (0, widest - w.shape[2])) for w in weights]
    layers = zip(padded, biases, strict=True)
    return torch.cat([torch.cat([w, b[..., None]], dim=2) for w, b in layers], dim=1)


class SetEncoder(nn.Module):
    """Encoder of elements: h_n = MLP(W x_n + k_n), with k_n learned for each kind of element.

    Elements are rows, with a kind for each layer; for editing, they are parameters, with a kind for
    each tensor.

    Args:
        config: Configuration of the model, with ``layers`` linear layers, including W.
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
        kinds = torch.tensor(numbers, device="cpu")  # with data even on meta
        self.register_buffer("kinds", kinds, persistent=False)
        self.value = nn.Linear(1 if self.single else max(layout[:-1]) + 1, hidden, bias=False)
        self.kind = nn.Embedding(len(sizes), hidden)
        deeper = mlp([hidden] * config.layers, config.dropout)
        self.deeper = nn.Sequential(nn.ReLU(), nn.Dropout(config.dropout), deeper, nn.ReLU())

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I n H"]:
        """Compute the states of all elements, in the order of ``flattened`` or of ``rows``."""
        x = flattened(weights, biases)[..., None] if self.single else rows(weights, biases)
        return self.deeper(self.value(x) + self.kind(self.kinds))


def set_pooled(states: Float[Tensor, "I n H"]) -> Float[Tensor, "I two_H"]:
    """Concatenate mean and maximum over the elements.

    inr2vec has only the maximum, which would keep little but extremes of single parameters.
    """
    return torch.cat([states.mean(1), states.amax(1)], dim=1)


class SetClassifier(nn.Module):
    """Classifier: MLP(pooled h_n)."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        self.encoder = SetEncoder(config)
        hidden = config.hidden
        self.head = mlp([2 * hidden, hidden, hidden, config.classes], config.dropout)

    def forward(self, weights: Weights, biases: Biases) -> Float[Tensor, "I classes"]:
        """Compute the logits of each network."""
        return self.head(set_pooled(self.encoder(weights, biases)))


class SetEditor(nn.Module):
    """Editor: a delta for each parameter, from its own state and the pooled states of all."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        hidden = config.hidden
        self.encoder = SetEncoder(config)
        self.own = nn.Linear(hidden, hidden)
        self.others = nn.Linear(2 * hidden, hidden, bias=False)
        self.delta = nn.Linear(hidden, 1)

    def forward(self, weights: Weights, biases: Biases) -> Deltas:
        """Compute deltas of weights and of biases."""
        states = self.encoder(weights, biases)
        hidden = self.own(states) + self.others(set_pooled(states))[:, None]
        return unflattened(self.delta(hidden.relu())[..., 0], weights, biases)
