"""What graph models are compared with on INRs, from no symmetry to all of it.

    MLP      parameters in a row; every order of neurons is another network
    StatNN   statistics of each layer
    Set NN   a set of neurons, each with its row of weights
    DWSNet   all linear maps that commute with permutations of hidden neurons
    NFN      the same under permutations of all neurons, with inputs and outputs numbered

Each is made for networks of one layout, and reads their normalised weights (I, out, in) and biases
(I, out), by layer. A classifier answers with logits (I, classes), an editor with deltas of the
shapes that it read, which others scale.
"""

from collections.abc import Callable, Sequence

from torch import nn

from l2o_graph.metanets.baselines.dwsnet import DWSNetClassifier, DWSNetEditor
from l2o_graph.metanets.baselines.flat import MLPClassifier, MLPEditor
from l2o_graph.metanets.baselines.nfn import NFNClassifier, NFNEditor
from l2o_graph.metanets.baselines.sets import SetClassifier, SetEditor
from l2o_graph.models.stat_nn import StatNN


def stat_nn_classifier(
    layout: Sequence[int], classes: int = 10, hidden: int = 1000, dropout: float = 0.0
) -> StatNN:
    """StatNN for networks of one layout."""
    return StatNN(len(layout) - 1, classes, hidden, dropout)


CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPClassifier,
    "stat_nn": stat_nn_classifier,
    "set_nn": SetClassifier,
    "dwsnet": DWSNetClassifier,
    "nfn": NFNClassifier,
}
EDITORS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPEditor,
    "set_nn": SetEditor,
    "dwsnet": DWSNetEditor,
    "nfn": NFNEditor,
}

__all__ = [
    "CLASSIFIERS",
    "EDITORS",
    "DWSNetClassifier",
    "DWSNetEditor",
    "MLPClassifier",
    "MLPEditor",
    "NFNClassifier",
    "NFNEditor",
    "SetClassifier",
    "SetEditor",
    "StatNN",
    "stat_nn_classifier",
]
