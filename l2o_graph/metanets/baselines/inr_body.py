"""A baseline in the place of a graph model."""

from collections.abc import Sequence

from torch import Tensor, nn

from l2o_graph.metanets.baselines.flat import Biases, Deltas, Weights
from l2o_graph.metanets.baselines.inr import CLASSIFIERS, EDITORS
from l2o_graph.metanets.inr_config import INRModelConfig


class BaselineBody(nn.Module):
    """The baseline of a config: see ``l2o_graph.metanets.inr.BODIES``.

    Args:
        config: Of the model.
    """

    def __init__(self, config: INRModelConfig):
        super().__init__()
        sizes = {"hidden": config.hidden, "dropout": config.dropout}
        if config.model != "stat_nn":  # which is two layers
            sizes["layers"] = config.layers
        if config.task == "classify":
            self.net = CLASSIFIERS[config.model](config.layout, config.classes, **sizes)
        else:
            self.net = EDITORS[config.model](config.layout, **sizes)

    def forward(
        self, weights: Weights, biases: Biases, responses: Sequence[Tensor]
    ) -> Tensor | Deltas:
        """Logits, or a number for each weight and each bias; there are no probes to read."""
        return self.net(weights, biases)
