"""GeneralizationPredictor: predicts the accuracy of networks from their weights; its files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.datasets.cnn.files import CNNs
from l2o_graph.metanets.baselines.cnn import NFNBody, StatNNBody
from l2o_graph.metanets.cnn_body import GraphBody
from l2o_graph.metanets.cnn_config import REGISTERED, CNNModelConfig
from l2o_graph.metanets.cnn_probes import CNNProbeBody
from l2o_graph.metanets.config import ON_GRAPHS
from l2o_graph.metanets.intervals import interval_around
from l2o_graph.storage.files import find, packaged, parse
from l2o_graph.storage.models import model_of, save_model
from l2o_graph.storage.shards import named

# In version 1 an NG-GNN without reverse edges had them all the same; in version 2 the value of
# pairs without an edge was 0 in NG-T.
FORMAT = "l2o_graph predictor of accuracy, version 3"
FOLDER = "cnn"  # of the zoo

# Module that reads the networks, for each model of a config: CNNs -> a logit for each.
BODIES: dict[str, Callable[[CNNModelConfig], nn.Module]] = {
    **dict.fromkeys(ON_GRAPHS, GraphBody),
    "probegen": CNNProbeBody,
    "stat_nn": StatNNBody,
    "nfn": NFNBody,
}


class GeneralizationPredictor(nn.Module):
    """Predictor of the test accuracy of CNNs from their weights.

    A graph model reads networks of any architectures in one batch; the prediction for a network
    does not depend on the others.

    Args:
        config: Configuration of the model; see ``cnn_config``.

    Attributes:
        config: The configuration.
        provenance: Record of how a model from a checkpoint was trained, else empty.

    Source:
        Kofinas et al. 2024, section 4.2, and the baselines there.
    """

    provenance: dict[str, Any]

    def __init__(self, config: CNNModelConfig):
        super().__init__()
        self.config, self.provenance = config, {}
        self.body = (BODIES | REGISTERED)[config.model](config)

    def forward(self, networks: CNNs) -> Float[Tensor, " I"]:
        """Predict the accuracy of networks.

        Args:
            networks: Networks of any architectures within the model's capacity; their accuracy is
                not read.

        Returns:
            Accuracy of each network, from 0 to 1, (I,).

        Raises:
            ValueError: For an architecture that exceeds the capacity, naming the parameter if
                possible; for weights that are not finite, with the indices of the networks.
        """
        return self.logits(networks).sigmoid()

    def logits(self, networks: CNNs) -> Float[Tensor, " I"]:
        """Predict the logits of the accuracies, (I,); ``forward`` takes their sigmoid."""
        _check_finite(networks)
        return self.body(networks)

    def interval(
        self, predicted: Float[Tensor, " I"], level: float
    ) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
        """Compute prediction intervals, from residuals of validation networks.

        Args:
            predicted: Result of ``forward``, (I,).
            level: Coverage, the fraction of networks of new training runs, of the kind that the
                model was trained on, whose accuracy lies inside; in (0, 1).

        Returns:
            Lower and upper ends, float64, (I,) each.

        Raises:
            ValueError: For a level out of range or too high for the number of validation runs, and
                for a model whose checkpoint has no residuals.

        Source:
            Lee, Barber and Willett 2023, arXiv 2306.06342: split conformal prediction by groups.
        """
        return interval_around(predicted, level, self.provenance.get("residuals", {}))

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path) -> "GeneralizationPredictor":
        """Load a trained model, frozen and without dropout, in float32 on the CPU.

        Args:
            checkpoint: A name of ``list_cnn_models()``, or a path to a .safetensors file.

        Raises:
            ValueError: For an unknown name, and for a file that is damaged or of another kind.
            FileNotFoundError: For a path that does not exist.
        """
        content, _, origin = find(checkpoint, packaged(FOLDER))
        tensors, metadata = parse(content, origin, FORMAT, "a predictor of accuracy")
        model, provenance = model_of(
            tensors, metadata, origin, "a CNNModelConfig",
            lambda record: cls(CNNModelConfig.from_json(record)),
        )  # fmt: skip
        model.provenance = provenance
        return model.eval()


def list_cnn_models() -> list[str]:
    """List the names of the trained predictors in the package."""
    return sorted(packaged(FOLDER))


def save_cnn_model(path: Path, model: GeneralizationPredictor, provenance: dict[str, Any]) -> None:
    """Store a model in one atomic write.

    Args:
        path: Path of the file; an existing one is kept if anything fails.
        model: Model, whose weights are stored as float32.
        provenance: Record of how it was trained, as a JSON object. "seen" has the ranges of traits
            and accuracies of its training networks, for warnings of ``predict_accuracy``;
            "residuals" the result of ``residuals_of``, for intervals.

    Raises:
        ValueError: For weights that are not finite.
        OSError: If the path cannot be written to.
    """
    save_model(path, model, FORMAT, model.config.to_json(), provenance)


def _check_finite(networks: CNNs) -> None:
    if not len(networks):
        raise ValueError("CNNs: expected one network or more, found none")
    # Cheap check first: a sum is finite only if all terms are.
    if bool(torch.stack([row.sum() for row in networks.values]).sum().isfinite()):
        return
    bad = [i for i, row in enumerate(networks.values) if not bool(row.isfinite().all())]
    if bad:
        raise ValueError(
            f"CNNs: expected finite weights, found others in {len(bad)} of {len(networks)} "
            f"networks: {named([str(i) for i in bad])}"
        )
