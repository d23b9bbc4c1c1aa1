"""INRClassifier and INREditor: models that map INRs to logits or to changed INRs; their files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from l2o_graph.datasets.inr.canonical import canonical
from l2o_graph.datasets.inr.files import named
from l2o_graph.datasets.inr.siren import coordinates, layout_of, render, responses
from l2o_graph.metanets.baselines.inr import BASELINES, BaselineBody
from l2o_graph.metanets.config import GRAPH_MODELS
from l2o_graph.metanets.inr_body import GraphBody
from l2o_graph.metanets.inr_config import REGISTERED, INRModelConfig, Task
from l2o_graph.metanets.inr_ordered import OrderedBody
from l2o_graph.metanets.probes import DrawnBody, GeneratedProbes, ProbeBody
from l2o_graph.metanets.statistics import Normalisation, Statistics
from l2o_graph.storage.files import find, packaged, parse
from l2o_graph.storage.models import model_of, save_model

M = TypeVar("M", bound="INRModel")

# In version 1 an NG-GNN without reverse edges had them all the same.
FORMAT = "l2o_graph INR model, version 2"
FOLDER = "inr"  # of the zoo

# Initial scale of an editor's changes, as in the released code of NG and of NFN (Zhou et al. 2023).
FIRST_SCALE = 0.01

# Module that reads the networks, for each model of a config. It is called with (weights, biases,
# responses): normalised (I, out, in) and (I, out) of each layer, and (I, d, M) of the inputs and of
# each layer, empty without probes. For "classify" it returns logits (I, classes), for "edit" a
# number for each weight and each bias, in two lists of the input shapes; several answers are a
# first axis.
BODIES: dict[str, Callable[[INRModelConfig], nn.Module]] = {
    **dict.fromkeys(GRAPH_MODELS, GraphBody),
    "ordered": OrderedBody,
    "probegen": ProbeBody,
    "drawn": DrawnBody,
    **dict.fromkeys(BASELINES, BaselineBody),
}


class INRModel(nn.Module):
    """Base of classifiers and editors: checks, normalisation, probes and a body."""

    task: Task
    provenance: dict[str, Any]
    probes: Tensor | None

    def __init__(self, config: INRModelConfig, statistics: Statistics | None = None):
        super().__init__()
        if config.task != self.task:
            raise ValueError(
                f"{type(self).__name__}: expected task '{self.task}', found '{config.task}'"
            )
        layers = len(config.layout) - 1
        found = None if statistics is None else len(statistics.weight_mean)
        if found != (layers if config.normalise else None):
            expected = f"statistics of {layers} layers" if config.normalise else "no statistics"
            raise ValueError(
                f"{type(self).__name__}: expected {expected} (normalise={config.normalise}), "
                f"found {'none' if found is None else f'those of {found}'}"
            )
        self.config, self.provenance = config, {}
        self.statistics = None if statistics is None else Normalisation(statistics)
        self.generator = None
        grid = coordinates(config.side, config.side) if config.model == "drawn" else None
        self.register_buffer("probes", grid)
        if config.generated:
            self.generator = GeneratedProbes(config.layout[0], config.probes)
        elif config.probes and grid is None:
            self.probes = nn.Parameter(torch.rand(config.layout[0], config.probes) * 2 - 1)
        self.body = (BODIES | REGISTERED)[config.model](config)

    def answer(
        self, weights: Sequence[Float[Tensor, "I _ _"]], biases: Sequence[Float[Tensor, "I _"]]
    ) -> Any:
        """Evaluate probes, normalise, and apply the body to checked networks."""
        probes = self.probes if self.generator is None else self.generator()
        found: list[Tensor] = []
        if probes is not None:
            found = responses(weights, biases, probes, self.config.omega0)
        if self.statistics is not None:
            weights, biases = self.statistics(weights, biases)
        return self.body(weights, biases, found)

    @classmethod
    def from_checkpoint(cls: type[M], checkpoint: str | Path) -> M:
        """Load a trained model, frozen and without dropout; see ``load_inr_model``.

        Args:
            checkpoint: A name of ``list_inr_models()``, or a path to a .safetensors file.

        Raises:
            ValueError: For a model of another task, an unknown name, and a file that is damaged or
                of another kind.
            FileNotFoundError: For a path that does not exist.
        """
        model = load_inr_model(checkpoint)
        if not isinstance(model, cls):
            raise ValueError(
                f"checkpoint '{checkpoint}': expected an {cls.__name__}, found an "
                f"{type(model).__name__}"
            )
        return model

    def prepare(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Check networks, and convert them to canonical form if the config says so."""
        self._check(weights, biases)
        if not self.config.canonical:
            return weights, biases
        return canonical(weights, biases, self.config.omega0)

    def _check(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
        layout = layout_of(weights, biases)
        if layout != tuple(self.config.layout):
            raise ValueError(
                f"INRs: expected layout {tuple(self.config.layout)}, which the model is made for, "
                f"found {layout}"
            )
        tensors = (*weights, *biases)
        like = next(self.parameters())
        for tensor in tensors:
            if (tensor.dtype, tensor.device) != (like.dtype, like.device):
                raise ValueError(
                    f"INRs: expected {like.dtype} on {like.device}, as the model is, found "
                    f"{tensor.dtype} on {tensor.device}; convert one of them by to()"
                )
        # Cheap check first: a sum is finite only if all terms are.
        if bool(torch.stack([t.sum() for t in tensors]).sum().isfinite()):
            return
        sound = torch.stack([t.flatten(1).isfinite().all(1) for t in tensors]).all(0)
        bad = (~sound).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"INRs: expected finite weights, found others in {len(bad)} of {len(sound)} "
                f"networks: {named([str(i) for i in bad])}"
            )


class INRClassifier(INRModel):
    """Classifier of INRs by their weights.

    The prediction for a network does not depend on the others in a batch.

    Args:
        config: Configuration of task "classify"; see ``inr_config``.
        statistics: Statistics of the training split, from ``statistics_of``; None if the
            configuration has ``normalise=False``.

    Attributes:
        config: The configuration.
        provenance: Record of how a model from a checkpoint was trained, else empty.

    Raises:
        ValueError: For a configuration of another task, or statistics that do not fit it.

    Source:
        Kofinas et al. 2024, section 4.1, and the baselines there.
    """

    task = "classify"

    def forward(
        self, weights: Sequence[Float[Tensor, "I _ _"]], biases: Sequence[Float[Tensor, "I _"]]
    ) -> Float[Tensor, "I classes"]:
        """Classify networks.

        Args:
            weights: Weights of each layer, (I, out, in), not normalised.
            biases: Biases of each layer, (I, out).

        Returns:
            Logits of each network, (I, classes).

        Raises:
            ValueError: For networks of another layout, type or device than the model; for weights
                that are not finite, with the indices of the networks.
        """
        return self.answer(*self.prepare(weights, biases))


class INREditor(INRModel):
    """Editor of INRs: changes their weights so that they represent another image.

    The output of the body is multiplied by a learned scale for each layer's weights and for each
    layer's biases, and added to the networks.

    Args:
        config: Configuration of task "edit"; see ``inr_config``.
        statistics: Statistics of the training split, from ``statistics_of``; None if the
            configuration has ``normalise=False``.

    Attributes:
        config: The configuration.
        provenance: Record of how a model from a checkpoint was trained, else empty.

    Raises:
        ValueError: For a configuration of another task, or statistics that do not fit it.

    Source:
        Kofinas et al. 2024, section 4.1.
    """

    task = "edit"

    def __init__(self, config: INRModelConfig, statistics: Statistics | None = None):
        super().__init__(config, statistics)
        layers = len(config.layout) - 1
        self.weight_scale = nn.Parameter(torch.full((layers,), FIRST_SCALE))
        self.bias_scale = nn.Parameter(torch.full((layers,), FIRST_SCALE))

    def forward(
        self, weights: Sequence[Float[Tensor, "I _ _"]], biases: Sequence[Float[Tensor, "I _"]]
    ) -> tuple[list[Float[Tensor, "KI _ _"]], list[Float[Tensor, "KI _"]]]:
        """Edit networks.

        Args:
            weights: Weights of each layer, (I, out, in), not normalised.
            biases: Biases of each layer, (I, out).

        Returns:
            Weights and biases of the same shapes, for ``render``. With K answers, K times I
            networks: all first answers, then all second ones. See ``draw``.

        Raises:
            ValueError: As for ``INRClassifier``.
        """
        weights, biases = self.prepare(weights, biases)
        of_weights, of_biases = self.answer(weights, biases)
        of_weights = zip(weights, self.weight_scale, of_weights, strict=True)
        of_biases = zip(biases, self.bias_scale, of_biases, strict=True)
        edited = [w + s * d for w, s, d in of_weights], [b + s * d for b, s, d in of_biases]
        if self.config.answers == 1:
            return edited
        return [w.flatten(0, 1) for w in edited[0]], [b.flatten(0, 1) for b in edited[1]]

    def draw(
        self,
        weights: Sequence[Float[Tensor, "I _ _"]],
        biases: Sequence[Float[Tensor, "I _"]],
        size: tuple[int, int] = (28, 28),
    ) -> Float[Tensor, "I *C height width"]:
        """Edit networks and draw their images; of several answers, the mean image.

        Args:
            weights: Weights of each layer, (I, out, in), not normalised.
            biases: Biases of each layer, (I, out).
            size: Height and width in pixels.

        Returns:
            Images (I, height, width), or (I, C, height, width): see ``render``.

        Raises:
            ValueError: As for ``INRClassifier``.

        Source:
            The mean of several answers: OCE (arXiv 2602.01083).
        """
        edited, moved = self(weights, biases)
        images = render(edited, moved, size, self.config.omega0)
        return images.unflatten(0, (self.config.answers, -1)).mean(0)


MODELS: dict[Task, type[INRClassifier] | type[INREditor]] = {
    "classify": INRClassifier,
    "edit": INREditor,
}


def list_inr_models() -> list[str]:
    """List the names of the trained models of INRs in the package."""
    return sorted(packaged(FOLDER))


def load_inr_model(checkpoint: str | Path) -> INRClassifier | INREditor:
    """Load a trained model, frozen and without dropout, in float32 on the CPU.

    Args:
        checkpoint: A name of ``list_inr_models()``, or a path to a .safetensors file.

    Returns:
        An ``INRClassifier`` or an ``INREditor``, depending on its task.

    Raises:
        ValueError: For an unknown name, and for a file that is damaged or of another kind.
        FileNotFoundError: For a path that does not exist.
    """
    content, _, origin = find(checkpoint, packaged(FOLDER))
    tensors, metadata = parse(content, origin, FORMAT, "a model of INRs")
    model, provenance = model_of(tensors, metadata, origin, "an INRModelConfig", _untrained)
    model.provenance = provenance
    return model.eval()


def save_inr_model(
    path: Path, model: INRClassifier | INREditor, provenance: dict[str, Any]
) -> None:
    """Store a model in one atomic write.

    Args:
        path: Path of the file; an existing one is kept if anything fails.
        model: Model, whose weights and statistics are stored as float32.
        provenance: Record of how it was trained, as a JSON object.

    Raises:
        ValueError: For weights that are not finite.
        OSError: If the path cannot be written to.
    """
    save_model(path, model, FORMAT, model.config.to_json(), provenance)


def _untrained(record: dict[str, Any]) -> INRClassifier | INREditor:
    """Build a model from a configuration in JSON."""
    config = INRModelConfig.from_json(record)
    statistics = Statistics.neutral(len(config.layout) - 1) if config.normalise else None
    return MODELS[config.task](config, statistics)
