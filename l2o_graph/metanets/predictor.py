"""GeneralizationPredictor: networks in, the accuracy that they will have out; and its files."""

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

# In version 1 an NG-GNN without reverse edges had them all the same, in version 2 pairs without an
# edge carried nothing in NG-T.
FORMAT = "l2o_graph predictor of accuracy, version 3"
FOLDER = "cnn"  # of the zoo

# What reads the networks, for each model of a config: CNNs -> a logit for each.
BODIES: dict[str, Callable[[CNNModelConfig], nn.Module]] = {
    **dict.fromkeys(ON_GRAPHS, GraphBody),
    "probegen": CNNProbeBody,
    "stat_nn": StatNNBody,
    "nfn": NFNBody,
}


class GeneralizationPredictor(nn.Module):
    """A model that predicts the accuracy of CNNs on test images from their weights.

    A graph model reads networks of any architectures in one batch; its prediction is that of a
    network alone, whatever it shares a batch with.

    Args:
        config: What the model is made of; see ``cnn_config``.

    Attributes:
        config: The configuration.
        provenance: How a model from a checkpoint was made, else empty.

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
            networks: Networks of any architectures that there is room for; their accuracy is not
                read.

        Returns:
            Accuracy of each network, from 0 to 1, (I,).

        Raises:
            ValueError: For an architecture that there is no room for, naming the parameter where
                there is one; for weights that are not finite, with the numbers of the networks.
        """
        return self.logits(networks).sigmoid()

    def logits(self, networks: CNNs) -> Float[Tensor, " I"]:
        """Predict the logits of the accuracies, (I,); ``forward`` takes their sigmoid."""
        _check_finite(networks)
        return self.body(networks)

    def interval(
        self, predicted: Float[Tensor, " I"], level: float
    ) -> tuple[Float[Tensor, " I"], Float[Tensor, " I"]]:
        """Give the intervals that accuracies lie in, by what was left over on validation networks.

        Args:
            predicted: What ``forward`` gave, (I,).
            level: Share of networks of new training runs, of the kind that the model was trained
                on, whose accuracy is to lie inside; in (0, 1).

        Returns:
            Lower and upper ends, float64, (I,) each.

        Raises:
            ValueError: For a level out of range, for one that the runs of the validation split are
                too few for, and for a model whose checkpoint has no residuals.

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
            ValueError: For an unknown name, and for a file that is damaged or something else.
            FileNotFoundError: For a path to nothing.
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
    """Store a model; the file appears whole or not at all.

    Args:
        path: Where to; what was there before stays if anything fails.
        model: Its weights are stored as float32.
        provenance: How it was made; anything that JSON can hold. Under "seen" the
            ranges of traits of the networks it was trained on, and of their accuracies, which
            ``predict_accuracy`` warns by;
            under "residuals" how far off it was on others, which intervals are made of.

    Raises:
        ValueError: For weights that are not finite.
        OSError: For a place that cannot be written to.
    """
    save_model(path, model, FORMAT, model.config.to_json(), provenance)


def _check_finite(networks: CNNs) -> None:
    if not len(networks):
        raise ValueError("CNNs: expected one network or more, found none")
    # A sum is finite only where all are; which are not is worth working out once one is not.
    if bool(torch.stack([row.sum() for row in networks.values]).sum().isfinite()):
        return
    bad = [i for i, row in enumerate(networks.values) if not bool(row.isfinite().all())]
    if bad:
        raise ValueError(
            f"CNNs: expected finite weights, found others in {len(bad)} of {len(networks)} "
            f"networks: {named([str(i) for i in bad])}"
        )
