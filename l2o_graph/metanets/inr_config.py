"""INRModelConfig: the configuration of a model of INRs, with the paper's sizes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from l2o_graph.datasets.inr.siren import LAYOUT, OMEGA0
from l2o_graph.metanets.config import GRAPH_MODELS, ON_GRAPHS, ReaderConfig
from l2o_graph.ranges import (
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE_BELOW_ONE,
    check_choices,
    check_ranges,
)
from l2o_graph.registry import registering

Model = Literal[
    "ng_gnn", "ng_t", "ordered", "probegen", "drawn", "mlp", "set_nn", "dwsnet", "nfn", "stat_nn"
]
Task = Literal["classify", "edit"]

OF_OUTPUTS = ("probegen", "drawn")  # models that read no weights
PROBED = (*ON_GRAPHS, *OF_OUTPUTS)


@dataclass(frozen=True, slots=True)
class INRModelConfig(ReaderConfig):
    """Configuration of a model of INRs, stored in the header of its checkpoint.

    Attributes:
        model: Model that reads the networks: one of the paper's models, a baseline or a registered
            one.
        task: "classify" for logits, "edit" for changed weights.
        layout: Widths of the networks, from input to output.
        omega0: Factor in every sine of the networks, which only probes evaluate.
        hidden: Number of channels of nodes, or the width of a baseline. NG-GNN's edges and head
            have as many, NG-T's edges half, its attention and its head twice as many.
        layers: Number of layers of NG-GNN, NG-T, ProbeGen's MLP or a baseline, or of stages of the
            CNN of "drawn". The ordered pass has as many as the networks.
        classes: Number of classes, and of logits.
        probes: Number of learned inputs at which every network is evaluated; 0 for none. For
            "drawn", number of pixels of a square image.
        generated: Whether probes come from a deep linear generator (ProbeGen) instead of being
            learned one by one.
        canonical: Whether networks are first converted to canonical form, see ``canonical``.
        answers: Number of networks that an editor returns for each, whose images are averaged
            (OCE); 1 for the usual editor.
        dropout: Dropout rate of channels.
        fourier: Standard deviation of the frequencies of random Fourier features of weights and
            biases; 0 for no Fourier features.
        reverse: Whether edges against the flow read their weights too. Without, NG-GNN has no such
            edges and NG-T, which has edges both ways, reads 0 there.
        heads: Number of heads of NG-T's attention.
        axial: Whether NG-T's layer has the size of the paper's model instead of the released
            code's, see ``NGTLayer``.
        positions: Whether nodes have position embeddings of inputs, hidden layers and outputs.
        normalise: Whether weights and biases are normalised to mean 0 and standard deviation 1.
    """

    model: str
    task: Task = "classify"
    layout: tuple[int, ...] = LAYOUT
    omega0: float = OMEGA0
    hidden: int = 64
    layers: int = 4
    classes: int = 10
    probes: int = 0
    generated: bool = False
    canonical: bool = False
    answers: int = 1
    dropout: float = 0.0
    fourier: float = 0.0
    reverse: bool = False
    heads: int = 8
    axial: bool = False
    positions: bool = True
    normalise: bool = True

    def __post_init__(self):
        check_choices(self, model=(*get_args(Model), *REGISTERED), task=Task)
        if len(self.layout) < 2 or min(self.layout) < 1:
            raise ValueError(f"layout: expected two widths or more, found {self.layout}")
        check_ranges(
            self, omega0=POSITIVE, hidden=COUNT, layers=COUNT, classes=COUNT, probes=COUNT_OR_NONE,
            answers=COUNT, dropout=SHARE_BELOW_ONE, fourier=NOT_NEGATIVE, heads=COUNT,
        )  # fmt: skip
        if self.model not in REGISTERED:
            self.check_options(
                axial=(False, GRAPH_MODELS), reverse=(False, GRAPH_MODELS),
                positions=(True, GRAPH_MODELS), fourier=(0, ON_GRAPHS),
                probes=(0, PROBED), answers=(1, ON_GRAPHS),
            )  # fmt: skip
        if self.task == "edit" and self.model in ("stat_nn", *OF_OUTPUTS):
            raise ValueError(
                f"model: '{self.model}' does not read single parameters and cannot edit them"
            )
        if self.task == "classify" and self.answers > 1:
            raise ValueError(f"answers: expected 1 to classify, found {self.answers}")
        if self.model == "probegen" and not self.probes:
            raise ValueError("probes: expected at least 1 for model 'probegen', found 0")
        if self.model == "drawn":
            self._check_image()
        if self.generated and not self.probes:
            raise ValueError("generated: expected at least 1 probe to generate, found 0")
        if self.model == "ng_t" and (2 * self.hidden) % self.heads:
            raise ValueError(
                f"heads: expected a divisor of {2 * self.hidden} channels of attention, found "
                f"{self.heads}"
            )

    @property
    def side(self) -> int:
        """Side of the square image that "drawn" reads."""
        return math.isqrt(self.probes)

    def _check_image(self) -> None:
        side = self.side
        if side**2 != self.probes or side < 2**self.layers or self.layout[0] != 2:
            raise ValueError(
                f"probes: expected the pixels of a square image of side {2**self.layers} or more, "
                f"and networks of 2 inputs, for model 'drawn'; found {self.probes} probes and "
                f"layout {self.layout}"
            )
        if self.generated:
            raise ValueError("generated: expected fixed probes for model 'drawn'")

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {**asdict(self), "layout": list(self.layout)}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "INRModelConfig":
        """Convert from the result of ``to_json``."""
        return INRModelConfig(**{**content, "layout": tuple(content["layout"])})


Build = TypeVar("Build", bound=Callable[[INRModelConfig], nn.Module])
REGISTERED: dict[str, Callable[[INRModelConfig], nn.Module]] = {}


def register_inr_model(name: str) -> Callable[[Build], Build]:
    """Register a model of INRs: a decorator of a module, or a function that builds one.

    ``inr_config(name)`` is then a configuration of ``INRClassifier`` and ``INREditor``, which check
    and normalise the networks, evaluate probes, and load and save. What is decorated takes a
    configuration. The module is called as ``module(weights, biases, responses)``: normalised
    (I, out, in) and (I, out) of each layer, and (I, width, probes) of the inputs and of each layer,
    an empty list without probes. For "classify" it returns logits (I, classes), for "edit" two
    lists of the shapes of weights and biases.

    Args:
        name: Value of ``INRModelConfig.model`` for this model.

    Raises:
        ValueError: For a name that is taken.
    """
    return registering(REGISTERED, name, "model", taken=get_args(Model))


# Kofinas et al. 2024, section 4.1, and for what it does not state the scripts of
# mkofinas/neural-graphs. NG-T's 8 heads for classification are those of the scripts. NG-GNN has
# edges against the flow only for editing, as the paper says; the scripts always have them. For
# editing, nothing is normalised there, but everything here: weights with a standard deviation of
# 0.02 are negligible beside position embeddings with 1, and with short training, editing without
# normalisation was worse than DWSNet. Sources of the baselines' sizes are given with each baseline.
SIZES: dict[tuple[str, Task], dict[str, Any]] = {
    ("ng_gnn", "classify"): {"dropout": 0.2, "fourier": 3.0},
    ("ng_gnn", "edit"): {"dropout": 0.2, "reverse": True},
    ("ng_t", "classify"): {"dropout": 0.2, "fourier": 1.0},
    ("ng_t", "edit"): {"dropout": 0.3, "fourier": 3.0, "heads": 4, "reverse": True},
    ("ordered", "classify"): {"fourier": 0.25, "canonical": True},
    ("ordered", "edit"): {"fourier": 0.25, "canonical": True},
    ("probegen", "classify"): {"hidden": 256, "layers": 6, "probes": 128, "generated": True},
    ("drawn", "classify"): {"hidden": 32, "layers": 2, "probes": 784, "dropout": 0.2},
    ("mlp", "classify"): {"hidden": 256, "layers": 3},
    ("mlp", "edit"): {"hidden": 256, "layers": 3},
    ("stat_nn", "classify"): {"hidden": 1000, "layers": 2},
    ("set_nn", "classify"): {"hidden": 256, "layers": 2},
    ("set_nn", "edit"): {"hidden": 256, "layers": 2},
    ("dwsnet", "classify"): {"hidden": 32, "layers": 5},
    ("dwsnet", "edit"): {"hidden": 32, "layers": 5},
    ("nfn", "classify"): {"hidden": 48, "layers": 3, "dropout": 0.1},
    ("nfn", "edit"): {"hidden": 48, "layers": 3},
}


def inr_config(model: str, task: Task = "classify", **changes: Any) -> INRModelConfig:
    """Configure the paper's model or a baseline for a task, with changes.

    Args:
        model: Model that reads the networks.
        task: "classify" or "edit".
        changes: Fields of ``INRModelConfig`` to override.

    Raises:
        ValueError: For values out of range, naming the field.
    """
    return INRModelConfig(model=model, task=task, **{**SIZES.get((model, task), {}), **changes})
