"""Baselines on INRs, from no symmetry to the full one.

    MLP      flattened parameters, no symmetry
    StatNN   statistics of each layer
    Set NN   a set of neurons, each with its row of weights
    DWSNet   all linear maps that commute with permutations of hidden neurons
    NFN      the same for permutations of all neurons, with an encoding of inputs and outputs

Each reads networks of one layout: normalised weights (I, out, in) and biases (I, out) of each
layer. For "classify" it returns logits (I, classes), for "edit" deltas of the same shapes, before
they are scaled.
"""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from l2o_graph.metanets.baselines.equivariant import NFN, DWSNet
from l2o_graph.metanets.baselines.flat import Biases, Deltas, FlatMLP, Weights
from l2o_graph.metanets.baselines.sets import SetClassifier, SetEditor
from l2o_graph.metanets.inr_config import INRModelConfig
from l2o_graph.models.stat_nn import StatNN

BASELINES: dict[str, Callable[[INRModelConfig], nn.Module]] = {
    "mlp": FlatMLP,
    "stat_nn": lambda c: StatNN(len(c.layout) - 1, c.classes, c.hidden, c.dropout),
    "set_nn": lambda c: (SetClassifier if c.task == "classify" else SetEditor)(c),
    "dwsnet": DWSNet,
    "nfn": NFN,
}


class BaselineBody(nn.Module):
    """Baseline of a config, with the interface of a graph model: see ``metanets.inr.BODIES``."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        self.net = BASELINES[config.model](config)

    def forward(
        self, weights: Weights, biases: Biases, responses: Sequence[Tensor]
    ) -> Tensor | Deltas:
        """Compute logits, or a number for each weight and each bias; responses are ignored."""
        return self.net(weights, biases)
