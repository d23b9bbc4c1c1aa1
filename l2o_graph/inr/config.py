"""INRModelConfig: all that a model of INRs is made of, with the paper's sizes."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from l2o_graph.inr.siren import LAYOUT, OMEGA0

Model = Literal["ng_gnn", "ng_t", "mlp", "set_nn", "dwsnet", "nfn", "stat_nn"]
Task = Literal["classify", "edit"]


@dataclass(frozen=True, slots=True)
class INRModelConfig:
    """What a model of INRs is made of; stored in the header of its checkpoint.

    Attributes:
        model: What reads the networks.
        task: "classify" answers with logits, "edit" with other weights.
        layout: Widths of the networks, from input to output.
        omega0: Factor in every sine of the networks, which only probes evaluate.
        hidden: Channels of nodes. Everything else follows: NG-GNN's edges and head have as many,
            NG-T's edges half, its attention and its head twice as many.
        layers: Rounds of messages.
        classes: Of the logits.
        probes: Inputs that are learned, and that every network is evaluated at; 0 for none.
        dropout: Share of channels that training leaves out.
        fourier: Deviation of the frequencies that weights and biases are first turned into; 0
            for weights and biases as they are.
        reverse: Whether an edge against the flow reads its weight too, rather than 0.
        heads: Of NG-T's attention.
        axial: NG-T's layer with the size of the paper's model, not of the released code: see
            ``NGTLayer``.
        positions: Whether nodes are told which input, hidden layer or output they are.
        normalise: Whether weights and biases are first brought to mean 0 and deviation 1.
    """

    model: Model
    task: Task = "classify"
    layout: tuple[int, ...] = LAYOUT
    omega0: float = OMEGA0
    hidden: int = 64
    layers: int = 4
    classes: int = 10
    probes: int = 0
    dropout: float = 0.0
    fourier: float = 0.0
    reverse: bool = True
    heads: int = 8
    axial: bool = False
    positions: bool = True
    normalise: bool = True

    def __post_init__(self):
        for name, known in (("model", Model), ("task", Task)):
            if getattr(self, name) not in get_args(known):
                expected = " or ".join(map(repr, get_args(known)))
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")
        if len(self.layout) < 2 or min(self.layout) < 1:
            raise ValueError(f"layout: expected two widths or more, found {self.layout}")
        for name, least in (("hidden", 1), ("layers", 1), ("classes", 1), ("heads", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, found {getattr(self, name)}")
        for name in ("probes", "fourier"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, found {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 or more, less than 1, found {self.dropout}")
        if self.model == "ng_t" and (2 * self.hidden) % self.heads:
            raise ValueError(
                f"heads: expected a divisor of {2 * self.hidden} channels of attention, found "
                f"{self.heads}"
            )


# Kofinas et al. 2024, section 4.1, and where it is silent the scripts of mkofinas/neural-graphs.
# Editing normalises nothing there; NG-T's 8 heads for classification are those of the scripts.
PAPER: dict[tuple[Model, Task], dict[str, Any]] = {
    ("ng_gnn", "classify"): {"dropout": 0.2, "fourier": 3.0},
    ("ng_gnn", "edit"): {"dropout": 0.2, "normalise": False},
    ("ng_t", "classify"): {"dropout": 0.2, "fourier": 1.0, "reverse": False},
    ("ng_t", "edit"): {"dropout": 0.3, "fourier": 3.0, "heads": 4, "normalise": False},
}


def inr_config(model: Model, task: Task = "classify", **changes: Any) -> INRModelConfig:
    """The paper's model for a task, with changes.

    Args:
        model: What reads the networks.
        task: "classify" or "edit".
        changes: Other fields than the paper's.

    Raises:
        ValueError: For values out of range, naming the field.
    """
    return INRModelConfig(model=model, task=task, **{**PAPER.get((model, task), {}), **changes})
