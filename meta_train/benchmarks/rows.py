"""Result tables of weight-space models: rows, metrics, plots and published results."""

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
    """Row of a table: a model with options."""

    label: str
    arguments: str  # model and options of ``python -m meta_train``, after --task and --model
    published: str = ""  # result in the paper, in the unit of the table

    @property
    def name(self) -> str:
        """Name in folders."""
        return "-".join(argument.strip("-") for argument in self.arguments.split())


@dataclass(frozen=True, slots=True)
class Table:
    """Table of models on one task."""

    rows: tuple[Row, ...]
    measure: str  # key of the metric in a checkpoint's provenance
    unit: str  # metric and unit in the header
    scale: float  # factor from the metric to this unit
    digits: int  # number of decimals
    plot: Callable[[Mapping[str, Path]], bytes]  # (folders of runs by label) -> PNG
    task: str = ""  # task of ``python -m meta_train``, if not the name of the table


def edited_digits(folders: Mapping[str, Path]) -> bytes:
    """Plot images of INRs before and after each editor, and the targets.

    Raises:
        ValueError: For damaged images of a run.
        OSError: For missing ones.
    """
    found: dict[str, Tensor] = {}
    for label, folder in folders.items():
        path = folder / EDITED
        with expecting(f"'{path}': expected images of networks"):
            images = load_file(path)
            drawn, edited, target = (images[name] for name in ("drawn", "edited", "target"))
            if not drawn.shape == edited.shape == target.shape or drawn.dim() != 3:
                raise ValueError(f"images of shapes {[list(x.shape) for x in images.values()]}")
        found.pop("target", None)  # the same for all editors, and the last row
        found = {"network": drawn, **found, label: edited, "target": target}
    return contact_sheet(found)


def predictions(folders: Mapping[str, Path]) -> bytes:
    """Plot predicted against true accuracies of the test split.

    Raises:
        ValueError: For damaged predictions of a run.
        OSError: For missing ones.
    """
    found = {}
    for label, folder in folders.items():
        path = folder / PREDICTIONS
        with expecting(f"'{path}': expected accuracies and predictions, a line for each network"):
            lines = [json.loads(line) for line in path.read_bytes().splitlines()]
            true, predicted = ([float(x[k]) for x in lines] for k in ("accuracy", "prediction"))
            if not lines:
                raise ValueError("an empty file")
            found[label] = true, predicted
    return plot_predictions(found)


def training(folders: Mapping[str, Path]) -> bytes:
    """Plot validation against training accuracies, as in Figure 4 of Kofinas et al. 2024.

    The paper plots test accuracies, but the test split is for the final evaluation only.
    """
    return plot_training({label: accuracies(folder / LOG) for label, folder in folders.items()})


def accuracies(log: Path) -> list[tuple[float, float]]:
    """Read the training and validation accuracy at each evaluation of a run, in [0, 1].

    The training accuracy is the mean over the steps since the last evaluation, with augmentation
    and dropout.

    Raises:
        ValueError: For a log without accuracies.
        OSError: For a missing log.
    """
    found: list[tuple[float, float]] = []
    steps: list[float] = []
    with expecting(f"'{log}': expected accuracies of steps and of evaluations"):
        for line in map(json.loads, log.read_bytes().splitlines()):
            if "val_accuracy" not in line:
                steps.append(float(line["accuracy"]))
            elif steps:  # not before the first step, nor the final evaluation of the best
                found.append((fmean(steps), float(line["val_accuracy"])))
                steps.clear()
        if not found:
            raise ValueError("no evaluation")
    return found


# Models of CNNs beyond the paper.
BEYOND_ON_CNNS = (
    Row("Ordered", "ordered"),
    Row("ProbeGen, 128 probes", "probegen"),
    Row("ProbeGen, 64 probes", "probegen --probes 64"),
    Row("NG-GNN, 64 probes", "ng_gnn --probes 64"),
    Row("NG-GNN, 64 probes, responses", "ng_gnn --probes 64 --responses"),
)


def _held_out(trait: str) -> list[Row]:
    """List models that are tested on networks with a trait that training has not seen."""
    models = Row("StatNN", "stat_nn"), Row("NG-GNN", "ng_gnn"), Row("NG-T", "ng_t")
    return [
        Row(f"{row.label}, {trait} held out", f"{row.arguments} --hold-out {trait}")
        for row in (*models, *BEYOND_ON_CNNS)
    ]


def _probed(label: str, model: str, count: int, published: str = "") -> Row:
    """Define a model with a number of probes."""
    return Row(f"{label}, {count} probes", f"{model} --probes {count}", published)


def _canonical(row: Row) -> Row:
    """Define the same model, with networks in canonical form."""
    return Row(f"{row.label}, canonical", f"{row.arguments} --canonical")


def _each_probed(published: Mapping[str, Sequence[str]]) -> list[Row]:
    """List both graph models, and published results by label, for each number of probes."""
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
# Models of INRs beyond the paper.
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
    Row("Drawn image, CNN", "drawn --hidden 16"),
)


def _of_inrs(published: Mapping[str, Sequence[str]], *ablated: Row) -> Table:
    """Define a table of all classifiers of INRs, with published results by label."""
    baselines = [Row(label, model, *published.get(label, ())) for label, model in BASELINES]
    rows = (*baselines, *_each_probed(published), *ablated, *BEYOND)
    return Table(rows, "test_accuracy", "accuracy, %", 100.0, 2, training)


# Published results are from Tables 1 to 7 of Kofinas et al. 2024.
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
