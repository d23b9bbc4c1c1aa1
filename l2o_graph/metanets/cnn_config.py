"""CNNModelConfig: the configuration of a predictor of accuracy, with the published sizes."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar, get_args

from torch import nn

from l2o_graph.datasets.cnn.architecture import CNNArchitecture
from l2o_graph.datasets.cnn.small import ARCHITECTURE
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

Model = Literal["ng_gnn", "ng_t", "ordered", "probegen", "stat_nn", "nfn"]
Zoo = Literal["park", "small"]


@dataclass(frozen=True, slots=True)
class CNNModelConfig(ReaderConfig):
    """Configuration of a predictor of accuracy, stored in the header of its checkpoint.

    Attributes:
        model: Model that reads the networks: one of the paper's models, a baseline or a registered
            one.
        inputs: Number of input channels with a position embedding each.
        depth: Number of hidden layers with a position embedding each; deeper ones share the last.
        classes: Number of output neurons with a position embedding each, which the head reads.
        max_kernel: Side that kernels are padded to; larger ones are refused.
        hidden: Number of channels of nodes, or of a baseline. NG-GNN's edges and head have as many,
            NG-T's edges half and its head twice as many.
        layers: Number of layers of NG-GNN, NG-T, NFN or ProbeGen's MLP; of StatNN the largest
            number of layers of a network. The ordered pass ignores it.
        probes: Number of learned images at which networks are evaluated. ProbeGen reads only the
            outputs, a graph model reads them beside weights; 0 for none.
        logits: Whether outputs for these images are read as logits, centred and bounded, instead of
            as class probabilities.
        responses: Whether hidden nodes of a graph model get their responses to these images.
        side: Height and width of these images in pixels.
        dropout: Dropout rate of channels.
        fourier: Standard deviation of the frequencies of random Fourier features of kernels and
            biases; 0 for no Fourier features.
        scaled: Whether weights, not biases, are multiplied by the root of their fan-in, so that
            they are about equally large in every layer.
        reverse: Whether edges against the flow read their kernels too. Without, NG-GNN has no such
            edges and NG-T, which has edges both ways, reads 0 there.
        linear_as_conv: Whether a linear layer is read as kernels of one position instead of by
            maps of its own.
        activations: Whether hidden neurons get an embedding of their activation.
        heads: Number of heads of NG-T's attention.
        attention: Number of channels of the attention, times ``hidden``.
        edge_hidden: Number of hidden channels of NG-T's networks on edges, times ``hidden``.
        delta: Mean of log(degree + 1) over nodes of the training networks.
        architecture: The only architecture that NFN reads; None for other models.
    """

    model: str
    inputs: int = 3
    depth: int = 5
    classes: int = 10
    max_kernel: int = 7
    hidden: int = 64
    layers: int = 4
    probes: int = 0
    logits: bool = False
    responses: bool = False
    side: int = 16
    dropout: float = 0.2
    fourier: float = 0.0
    scaled: bool = False
    reverse: bool = False
    linear_as_conv: bool = True
    activations: bool = True
    heads: int = 4
    attention: int = 1
    edge_hidden: int = 2
    delta: float = 1.0
    architecture: CNNArchitecture | None = None

    def __post_init__(self):
        check_choices(self, model=(*get_args(Model), *REGISTERED))
        check_ranges(
            self, inputs=COUNT, depth=COUNT, classes=COUNT, max_kernel=COUNT, hidden=COUNT,
            layers=COUNT, probes=COUNT_OR_NONE, side=COUNT, dropout=SHARE_BELOW_ONE,
            fourier=NOT_NEGATIVE, heads=COUNT,
            attention=COUNT, edge_hidden=COUNT, delta=POSITIVE,
        )  # fmt: skip
        if self.max_kernel % 2 == 0:
            raise ValueError(
                f"max_kernel: expected an odd number, which has a centre, found {self.max_kernel}"
            )
        if self.model == "ng_t" and (self.hidden % 2 or self.attention * self.hidden % self.heads):
            raise ValueError(
                f"hidden: expected an even number, and a multiple of {self.heads} heads in "
                f"{self.attention * self.hidden} channels of attention, found {self.hidden}"
            )
        if self.model in REGISTERED:
            return
        self.check_options(
            fourier=(0, ON_GRAPHS), scaled=(False, ON_GRAPHS),
            reverse=(False, GRAPH_MODELS), activations=(True, ON_GRAPHS),
            responses=(False, ON_GRAPHS), probes=(0, ("probegen", *ON_GRAPHS)),
            logits=(False, ("probegen", *ON_GRAPHS)),
        )  # fmt: skip
        if (self.model == "probegen" or self.responses) and not self.probes:
            what = "responses" if self.responses else "'probegen'"
            raise ValueError(f"probes: expected at least 1 for {what}, found 0")
        if (self.model == "nfn") != (self.architecture is not None):
            raise ValueError(
                "architecture: expected one only for 'nfn', which reads networks of a single "
                f"architecture, found {self.architecture} for '{self.model}'"
            )

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        known = self.architecture
        return {**asdict(self), "architecture": known and known.to_json()}

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "CNNModelConfig":
        """Convert from the result of ``to_json``."""
        known = content.get("architecture")
        return CNNModelConfig(
            **{**content, "architecture": known and CNNArchitecture.from_json(known)}
        )


Build = TypeVar("Build", bound=Callable[[CNNModelConfig], nn.Module])
REGISTERED: dict[str, Callable[[CNNModelConfig], nn.Module]] = {}


def register_cnn_model(name: str) -> Callable[[Build], Build]:
    """Register a predictor of accuracy: a decorator of a module, or a function that builds one.

    ``cnn_config(name)`` is then a configuration of ``GeneralizationPredictor``, which checks the
    networks, loads and saves. What is decorated takes a configuration. The module is called with
    ``CNNs`` and returns a logit of the accuracy of each of the I networks, (I,).

    Args:
        name: Value of ``CNNModelConfig.model`` for this model.

    Raises:
        ValueError: For a name that is taken.
    """
    return registering(REGISTERED, name, "model", taken=get_args(Model))


# Kofinas et al. 2024, section 4.2, and for what it does not state the scripts of
# mkofinas/neural-graphs; StatNN is that of Unterthiner et al. 2020 there. NFN's sizes are ours.
SIZES: dict[tuple[str, Zoo], dict[str, Any]] = {
    ("ng_gnn", "park"): {"fourier": 3.0},
    ("ng_gnn", "small"): {"fourier": 3.0, "hidden": 256, "linear_as_conv": False},
    ("ng_t", "park"): {"fourier": 1.0, "hidden": 32, "layers": 3},
    ("ng_t", "small"): {
        "fourier": 1.0, "hidden": 128, "heads": 8, "attention": 2, "edge_hidden": 1,
    },
    ("probegen", "park"): {"hidden": 256, "layers": 6, "probes": 128, "dropout": 0.0},
    ("probegen", "small"): {
        "hidden": 256, "layers": 6, "probes": 128, "logits": True, "dropout": 0.0,
    },
    ("stat_nn", "park"): {"hidden": 1000, "layers": 6, "dropout": 0.0},
    ("stat_nn", "small"): {"hidden": 1000, "layers": 6, "dropout": 0.0},
    ("nfn", "small"): {"hidden": 16, "layers": 3, "dropout": 0.1, "architecture": ARCHITECTURE},
}  # fmt: skip
OF_ZOO: dict[Zoo, dict[str, Any]] = {
    "park": {},
    "small": {"inputs": 1, "depth": 3, "max_kernel": 3},
}

# False: edges along the flow; values of the released code, which also has them for edges both ways.
# True: edges both ways, over networks drawn from the park.
DELTA: dict[tuple[Zoo, bool], float] = {
    ("park", False): 2.1321,
    ("small", False): 2.2048,
    ("park", True): 3.02,
    ("small", True): 3.154,
}


def cnn_config(model: str, zoo: Zoo = "park", **changes: Any) -> CNNModelConfig:
    """Configure a published predictor or a baseline for a zoo, with changes.

    Args:
        model: Model that reads the networks.
        zoo: "park", networks of mixed architectures, or "small", of one.
        changes: Fields of ``CNNModelConfig`` to override.

    Raises:
        ValueError: For values out of range, naming the field.
    """
    if zoo not in OF_ZOO:
        raise ValueError(f"zoo: expected one of {list(OF_ZOO)}, found '{zoo}'")
    sizes = OF_ZOO[zoo] | SIZES.get((model, zoo), {}) | changes
    delta = DELTA[zoo, sizes.get("reverse", False)]
    return CNNModelConfig(**{"model": model, "delta": delta, **sizes})
