"""What is in each table of models that read networks: rows, measure, figure, published numbers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from safetensors.torch import load_file
from torch import Tensor

from l2o_graph.datasets.inr.picture import contact_sheet
from l2o_graph.storage.files import expecting
from meta_train.benchmarks.plots import plot_predictions, plot_training
from meta_train.run import LOG
from meta_train.supervised.cnn import PREDICTIONS
from meta_train.supervised.inr import EDITED

PROBES = (0, 4, 16, 64)


@dataclass(frozen=True, slots=True)
class Row:
    """A model of a table."""

    label: str
    arguments: str  # of ``python -m meta_train``, after the task and --model
    published: str = ""  # what the paper says, if it does, in the units of the table

    @property
    def name(self) -> str:
        """As folders are called."""
        return "-".join(argument.strip("-") for argument in self.arguments.split())


@dataclass(frozen=True, slots=True)
class Table:
    """What is compared."""

    rows: tuple[Row, ...]
    measure: str  # of a checkpoint's provenance
    unit: str  # of the figures, for people
    scale: float  # figures are the measure times this
    digits: int  # behind the point
    figure: Callable[[Mapping[str, Path]], bytes] | None = None  # folders of runs by label -> PNG
    task: str = ""  # of ``python -m meta_train``; that of the table's name, if none is said


def edited_digits(folders: Mapping[str, Path]) -> bytes:
    """What networks draw before and after each editor, and what they should draw."""
    found: dict[str, Tensor] = {}
    for label, folder in folders.items():
        path = folder / EDITED
        with expecting(f"'{path}': expected images of networks"):
            images = load_file(path)
            drawn, edited, target = (images[name] for name in ("drawn", "edited", "target"))
            if not drawn.shape == edited.shape == target.shape or drawn.dim() != 3:
                raise ValueError(f"images of shapes {[list(x.shape) for x in images.values()]}")
        found.pop("target", None)  # the same of all, and the last
        found = {"network": drawn, **found, label: edited, "target": target}
    return contact_sheet(found)


def predictions(folders: Mapping[str, Path]) -> bytes:
    """What predictors say of the test split, against how it is."""
    found = {}
    for label, folder in folders.items():
        path = folder / PREDICTIONS
        with expecting(f"'{path}': expected accuracies and predictions, a line for each network"):
            lines = [json.loads(line) for line in path.read_bytes().splitlines()]
            true, said = ([float(x[k]) for x in lines] for k in ("accuracy", "prediction"))
            if not lines:
                raise ValueError("an empty file")
            found[label] = true, said
    return plot_predictions(found)


def training(folders: Mapping[str, Path]) -> bytes:
    """How accurate classifiers are on what they train on and on what they do not, as they train.

    As Figure 4 of Kofinas et al. 2024, with the validation split for the test split, which is read
    once.
    """
    return plot_training({label: accuracies(folder / LOG) for label, folder in folders.items()})


def accuracies(log: Path) -> list[tuple[float, float]]:
    """Accuracy at each evaluation of a run on the training and on the validation split, in [0, 1].

    That on the training split is the mean over the steps since the evaluation before, with the
    noise that these have.

    Raises:
        ValueError: For a log of something else.
        OSError: For one that is not there.
    """
    found: list[tuple[float, float]] = []
    steps: list[float] = []
    with expecting(f"'{log}': expected accuracies of steps and of evaluations"):
        for line in map(json.loads, log.read_bytes().splitlines()):
            if "val_accuracy" not in line:
                steps.append(float(line["accuracy"]))
            elif steps:  # neither before the first step nor of the best once more, at the end
                found.append((fmean(steps), float(line["val_accuracy"])))
                steps.clear()
        if not found:
            raise ValueError("no evaluation")
    return found


# What reads CNNs beyond the paper: in the order of their computation, by what they answer.
BEYOND_ON_CNNS = (
    Row("Ordered", "ordered"),
    Row("ProbeGen, 128 probes", "probegen"),
    Row("ProbeGen, 64 probes", "probegen --probes 64"),
    Row("NG-GNN, 64 probes", "ng_gnn --probes 64"),
    Row("NG-GNN, 64 probes, responses", "ng_gnn --probes 64 --responses"),
)


def _held_out(trait: str) -> list[Row]:
    """Models that are tested on what they have not seen the like of."""
    models = Row("StatNN", "stat_nn"), Row("NG-GNN", "ng_gnn"), Row("NG-T", "ng_t")
    return [
        Row(f"{row.label}, {trait} held out", f"{row.arguments} --hold-out {trait}")
        for row in (*models, *BEYOND_ON_CNNS)
    ]


def _probed(label: str, model: str, count: int, published: str = "") -> Row:
    """A model with so many probes."""
    return Row(f"{label}, {count} probes", f"{model} --probes {count}", published)


def _canonical(row: Row) -> Row:
    """The same model, which reads networks in canonical form."""
    return Row(f"{row.label}, canonical", f"{row.arguments} --canonical")


def _each_probed(published: Mapping[str, Sequence[str]]) -> list[Row]:
    """Both graph models with each number of probes, and what is published of each."""
    return [
        _probed(label, model, count, figure)
        for label, model in GRAPHS
        for count, figure in zip(PROBES, published.get(label, [""] * len(PROBES)), strict=True)
    ]


BASELINES = (
    ("MLP", "mlp"), ("Set NN", "set_nn"), ("StatNN", "stat_nn"), ("DWSNet", "dwsnet"),
    ("NFN", "nfn"),
)  # fmt: skip
GRAPHS = (("NG-GNN", "ng_gnn"), ("NG-T", "ng_t"))
# What reads INRs, beyond the paper: in canonical form, in the order of their computation, by what
# they answer.
BEYOND = (
    *[_canonical(Row(label, model)) for label, model in BASELINES],
    *[_canonical(_probed(label, model, count)) for label, model in GRAPHS for count in (0, 64)],
    Row("Ordered, 0 probes", "ordered --no-canonical"),
    _canonical(_probed("Ordered", "ordered", 0)),
    Row("Ordered, 64 probes", "ordered --probes 64 --no-canonical"),
    _canonical(_probed("Ordered", "ordered", 64)),
    Row("Ordered, 128 generated probes, canonical", "ordered --probes 128 --generated"),
    Row("ProbeGen, 128 probes", "probegen"),
    Row("ProbeGen, 128 free probes", "probegen --no-generated"),
)


def _of_inrs(published: Mapping[str, Sequence[str]], *ablated: Row) -> Table:
    """Everything that classifies INRs, with what is published of each by its label."""
    baselines = [Row(label, model, *published.get(label, ())) for label, model in BASELINES]
    rows = (*baselines, *_each_probed(published), *ablated, *BEYOND)
    return Table(rows, "test_accuracy", "accuracy, %", 100.0, 2, training)


# Kofinas et al. 2024, Tables 1 to 7; what is not in them stands here without a figure.
TABLES = {
    "mnist_inr": _of_inrs(
        {
            "MLP": ["17.6 ± 0.0"], "Set NN": ["23.7 ± 0.1"], "DWSNet": ["85.7 ± 0.6"],
            "NG-GNN": ["91.4 ± 0.6", "91.8 ± 0.5", "92.8 ± 0.3", "94.7 ± 0.3"],
            "NG-T": ["92.4 ± 0.3", "93.3 ± 0.2", "94.9 ± 0.3", "97.3 ± 0.2"],
        },
        Row("NG-GNN without positions", "ng_gnn --no-positions", "83.9 ± 0.3"),
        Row("NG-T without positions", "ng_t --no-positions", "77.9 ± 0.7"),
    ),
    "fmnist_inr": _of_inrs({
        "MLP": ["19.9 ± 0.5"], "Set NN": ["22.3 ± 0.4"], "DWSNet": ["67.1 ± 0.3"],
        "NG-GNN": ["68.0 ± 0.2", "71.9 ± 0.3", "73.1 ± 0.3", "74.2 ± 0.4"],
        "NG-T": ["72.7 ± 0.6", "73.8 ± 0.3", "74.1 ± 1.5", "74.8 ± 0.9"],
    }),
    "cifar10_inr": _of_inrs({}),
    "mnist_dilation": Table(
        (
            Row("DWSNet", "dwsnet", "2.58"),
            Row("NFN", "nfn", "2.55"),
            *_each_probed({
                "NG-GNN": ["2.38 ± 0.02", "2.26 ± 0.01", "2.17 ± 0.01", "2.06 ± 0.01"],
                "NG-T": ["1.96 ± 0.00", "1.88 ± 0.02", "1.82 ± 0.02", "1.75 ± 0.01"],
            }),
            Row("NG-GNN, 64 probes, 8 answers", "ng_gnn --probes 64 --answers 8"),
            _probed("Ordered", "ordered", 64),
            Row("Ordered, 64 probes, 8 answers", "ordered --probes 64 --answers 8"),
        ),
        "test_loss", "mean squared error of pixels, 1e-2", 100.0, 3, edited_digits,
    ),
    "cnn_park": Table(
        (
            Row("StatNN", "stat_nn", "0.719 ± 0.010"),
            Row("NG-GNN", "ng_gnn", "0.804 ± 0.009"),
            Row("NG-T", "ng_t", "0.817 ± 0.007"),
            Row("NG-GNN without activations", "ng_gnn --no-activations", "0.778 ± 0.018"),
            Row("NG-T without activations", "ng_t --no-activations", "0.728 ± 0.010"),
            *BEYOND_ON_CNNS,
        ),
        "test_tau", "Kendall's tau-b", 1.0, 3, predictions,
    ),
    "cnn_held_out": Table(
        (*_held_out("depth=5"), *_held_out("width=32"), *_held_out("activation=tanh")),
        "test_tau", "Kendall's tau-b", 1.0, 3, predictions, "cnn_park",
    ),
    "cnn_small": Table(
        (
            Row("StatNN", "stat_nn", "0.915 ± 0.002"),
            Row("NFN-HNP", "nfn", "0.934 ± 0.001"),
            Row("NG-GNN", "ng_gnn", "0.930 ± 0.001"),
            Row("NG-T", "ng_t", "0.935 ± 0.000"),
            Row("Ordered", "ordered"),
            Row("ProbeGen, 128 probes", "probegen"),
        ),
        "test_tau", "Kendall's tau-b", 1.0, 3, predictions,
    ),
}  # fmt: skip
