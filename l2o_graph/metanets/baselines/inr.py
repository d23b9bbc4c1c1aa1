"""What graph models are compared with on INRs, from no symmetry to all of it.

    MLP      parameters in a row; every order of neurons is another network
    StatNN   statistics of each layer
    Set NN   a set of neurons, each with its row of weights
    DWSNet   all linear maps that commute with permutations of hidden neurons
    NFN      the same under permutations of all neurons, with inputs and outputs numbered

Each is made for networks of one layout, and reads their normalised weights (I, out, in) and biases
(I, out), by layer. To classify it answers with logits (I, classes), to edit with deltas of the
shapes that it read, which others scale.
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
    """The baseline of a config, in the place of a graph model: see ``metanets.inr.BODIES``."""

    def __init__(self, config: INRModelConfig):
        super().__init__()
        self.net = BASELINES[config.model](config)

    def forward(
        self, weights: Weights, biases: Biases, responses: Sequence[Tensor]
    ) -> Tensor | Deltas:
        """Logits, or a number for each weight and each bias; there are no probes to read."""
        return self.net(weights, biases)
