"""Training of models that predict the accuracy of CNNs.

Kofinas et al. 2024, section 4.2: AdamW with AMSGrad, gradient clipping, and mean squared error or
cross-entropy of the predicted accuracy. The best evaluation is that with the largest Kendall's
tau-b on the validation split. The paper's recipe is for tens of thousands of networks, the default
recipe for a few thousand.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from l2o_graph.cnn import (
    CNNModelConfig,
    CNNs,
    GeneralizationPredictor,
    augmented,
    chosen,
    cnn_config,
    load_cnns,
    save_cnn_model,
)
from l2o_graph.datasets.cnn.published import read_small_zoo, read_wild_park
from l2o_graph.metanets.cnn_config import Zoo
from l2o_graph.metanets.config import ON_GRAPHS
from l2o_graph.metanets.descriptors import NAMES, RANGES, descriptors, ranges_of
from l2o_graph.metanets.intervals import covered, residuals_of
from l2o_graph.metanets.structure import structure_of
from l2o_graph.ranges import COUNT, check_choices
from l2o_graph.storage.files import write_atomically
from l2o_graph.storage.shards import SPLITS
from meta_train.run import Result
from meta_train.supervised.epochs import EpochConfig, EpochTrainer

CNN_TASKS: dict[str, Zoo] = {"cnn_park": "park", "cnn_small": "small"}
PREDICTIONS = "predictions.jsonl"
LEVELS = (0.8, 0.9)  # nominal coverage of the prediction intervals that are evaluated

Loss = Literal["mse", "bce"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CNNTrainingConfig(EpochConfig):
    """Configuration of a run; see ``default_recipe`` and ``paper_recipe``.

    Attributes:
        task: Key of ``CNN_TASKS``.
        model: Configuration of the model.
        loss: Loss: "mse", the squared error of the accuracy, or "bce", its cross-entropy in nats.
        piece: Number of networks in a micro-batch, which should fit in the cache; gradients are
            accumulated over the micro-batches of a batch.
        augment: Whether networks are augmented in training; see ``augmented``.
        hold_out: Trait "TRAIT=VALUE" of networks for testing only, such as "depth=5", from
            ``l2o_graph.metanets.descriptors``. Training and validation have only networks without
            it; "" for all networks.
    """

    task: str = "cnn_park"
    model: CNNModelConfig = field(default_factory=lambda: cnn_config("ng_gnn"))
    loss: Loss = "bce"
    epochs: int = 6
    batch: int = 16
    piece: int = 16
    warmup: int = 100
    cooldown: float = 0.5
    augment: bool = False
    hold_out: str = ""
    evaluate_every: int = 250

    def __post_init__(self) -> None:
        _kind(self.task)
        check_choices(self, loss=Loss)
        EpochConfig.__post_init__(self)
        COUNT.check("piece", self.piece)


def default_recipe(
    task: str = "cnn_park", model: str = "ng_gnn", **sizes: Any
) -> CNNTrainingConfig:
    """Return the best recipe for a few thousand networks; see docs/generalization.md.

    Small batches, no dropout or augmentation, decay of the learning rate to 0, and for graph
    models weights times the root of their fan-in instead of Fourier features. NG-T has smaller
    batches and a larger learning rate; ProbeGen has a smaller one on the park, as published.
    ``sizes`` override fields of the model's configuration.

    Raises:
        ValueError: For an unknown task, and values out of range.
    """
    scaled = model in ON_GRAPHS and not sizes.get("fourier")
    changes = {"dropout": 0.0, "fourier": 0.0, "scaled": scaled, **sizes}
    reads = cnn_config(model, _kind(task), **changes)
    of_probegen = {"lr": 3e-4 if task == "cnn_park" else 1e-3}
    own: dict[str, dict[str, Any]] = {"ng_t": {"lr": 3e-3, "batch": 8}, "probegen": of_probegen}
    return CNNTrainingConfig(task=task, model=reads, **own.get(model, {}))


def paper_recipe(task: str = "cnn_park", model: str = "ng_gnn", **sizes: Any) -> CNNTrainingConfig:
    """Return the recipe of Kofinas et al. 2024, section 4.2, and their code.

    Unlike there, NG-GNN's initial weights (``keep_nodes``) and NG-T's attention between nodes
    without an edge (``plain``) are those of this package. Arguments and errors are those of
    ``default_recipe``.
    """
    kind = _kind(task)
    recipe: dict[str, Any] = {"epochs": 10, "batch": 128}
    if kind == "small":
        recipe = {"epochs": 300, "batch": 192 if model == "ng_t" else 128, "augment": True}
        recipe["loss"] = "mse" if model == "ng_gnn" else "bce"
    return CNNTrainingConfig(
        task=task, model=cnn_config(model, kind, **sizes), warmup=0, cooldown=0.0,
        evaluate_every=100, **recipe,
    )  # fmt: skip


def _kind(task: str) -> Zoo:
    if task not in CNN_TASKS:
        raise ValueError(f"unknown task '{task}', expected one of {sorted(CNN_TASKS)}")
    return CNN_TASKS[task]


def load_zoo(folder: str | Path, split: str) -> CNNs:
    """Load a split of a zoo: one of ``python -m l2o_graph.datasets.zoo``, or a published one.

    Raises:
        ValueError: For a folder without networks of the split.
    """
    folder = Path(folder)
    if (folder / "weights.npy").exists():
        return read_small_zoo(folder, split)
    if next(folder.glob("**/checkpoint.pt"), None) is not None:
        return read_wild_park(folder, split)
    return load_cnns(folder, split)


def kendall(one: Float[Tensor, " I"], other: Float[Tensor, " I"]) -> float:
    """Compute Kendall's tau-b, from -1 to 1; 0 if one of the variables is constant."""
    from scipy.stats import kendalltau

    found: Any = kendalltau(one.numpy(), other.numpy())
    return 0.0 if math.isnan(found.statistic) else float(found.statistic)


def held_out(splits: Mapping[str, CNNs], trait: str) -> dict[str, CNNs]:
    """Hold out networks with a trait, such as "depth=5", from all splits but "test".

    The test split keeps only these networks.

    Raises:
        ValueError: For an unknown trait, and if no network of a split is left.
    """
    key, _, value = trait.partition("=")
    if key not in (*RANGES, *NAMES) or not value:
        expected = ", ".join((*RANGES, *NAMES))
        raise ValueError(f"hold_out: expected TRAIT=VALUE, of {expected}, found '{trait}'")
    selected = {}
    for split, networks in splits.items():
        found = [
            value in map(str, descriptors(structure_of(a))[key]) for a in networks.architectures
        ]
        index = (torch.tensor(found)[networks.which] == (split == "test")).nonzero().flatten()
        if not len(index):
            which = "with" if split == "test" else "without"
            raise ValueError(
                f"hold_out: expected networks of split '{split}' {which} {trait}, found none"
            )
        selected[split] = chosen(networks, index)
    return selected


class CNNTrainer(EpochTrainer):
    """Training run of a predictor of accuracy between two steps."""

    config: CNNTrainingConfig
    model: GeneralizationPredictor

    def __init__(
        self, config: CNNTrainingConfig, zoo: dict[str, CNNs], device: torch.device, data: str
    ):
        make = partial(GeneralizationPredictor, config.model)
        super().__init__(config, make, len(zoo["train"]), device, data)
        self.zoo = zoo
        self._predicted = torch.empty(0)  # predictions for the last evaluated split, (I,)
        self._residuals: dict[str, Any] = {}  # see ``residuals_of``

    def descend(self, index: Int64[Tensor, " batch"]) -> dict[str, float]:
        """Accumulate gradients of the mean loss on a batch, over micro-batches."""
        config = self.config
        networks = chosen(self.zoo["train"], index)
        if config.augment:
            networks = augmented(networks, self.generator(2, self.step))
        total = 0.0
        for piece in torch.arange(len(networks)).split(config.piece):
            own = chosen(networks, piece)
            loss = self._loss(self.model.logits(own), own).sum() / len(networks)
            loss.backward()
            total += loss.item()
        return {"loss": total}

    @torch.no_grad()
    def measure(self, split: str) -> dict[str, float]:
        """Compute mean loss and Kendall's tau on a split, and keep the predictions.

        For the test split also the coverage of the prediction intervals of ``LEVELS``, as
        "cover_80", if the validation split has enough runs for them. The intervals come from
        residuals on the validation split, which are computed first.
        """
        networks = self.zoo[split]
        if split == "test":
            self.measure("val")
            val = self.zoo["val"]
            self._residuals = residuals_of(self._predicted, val.accuracy, val.run)
        self.model.eval()
        pieces = torch.arange(len(networks)).split(self.config.piece)
        logits = torch.cat([self.model.logits(chosen(networks, piece)) for piece in pieces])
        self._predicted = logits.sigmoid().cpu()
        loss = self._loss(logits, networks).mean().item()
        metrics = {"loss": loss, "tau": kendall(self._predicted, networks.accuracy)}
        if split == "test":
            runs = self._residuals["runs"]
            for level in LEVELS:
                if level * (runs + 1) <= runs:
                    coverage = covered(self._predicted, networks.accuracy, level, self._residuals)
                    metrics[f"cover_{100 * level:.0f}"] = coverage
        return metrics

    def score(self, point: dict[str, Any]) -> float:
        """Return Kendall's tau on the validation split."""
        return point["val_tau"]

    def save_best(self, path: Path) -> None:
        """Save a checkpoint, with the ranges of traits in the training split in its provenance."""
        train = self.zoo["train"]
        architectures = (train.architectures[i] for i in train.which.unique().tolist())
        seen = ranges_of(map(structure_of, architectures))
        seen["accuracy"] = [round(x.item(), 6) for x in train.accuracy.aminmax()]
        more = {"seen": seen, "residuals": self._residuals}
        save_cnn_model(path, self.model, self.provenance() | more)

    def save_predictions(self, path: Path) -> None:
        """Write ``PREDICTIONS``, a line for each network of the test split."""
        test = self.zoo["test"]
        names = "run", "step", "accuracy", "prediction"
        columns = test.run, test.step, test.accuracy, self._predicted
        rows = zip(*(column.tolist() for column in columns), strict=True)
        lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows]
        write_atomically(path.with_name(PREDICTIONS), "".join(lines).encode())

    def _loss(self, logits: Float[Tensor, " n"], networks: CNNs) -> Float[Tensor, " n"]:
        """Compute the loss of each network."""
        accuracy = networks.accuracy.to(logits)
        if self.config.loss == "mse":
            return (logits.sigmoid() - accuracy).square()
        return F.binary_cross_entropy_with_logits(logits, accuracy, reduction="none")


def train_cnn_model(
    config: CNNTrainingConfig,
    zoo: str | Path,
    out: Path,
    device: str = "cpu",
    resume: bool = False,
) -> Result:
    """Train a model that predicts the accuracy of CNNs.

    Ctrl-C saves the state after the current step and ends the run.

    Args:
        config: Configuration of the run; the same as that of the state if the run is resumed.
        zoo: Folder of the networks; see ``load_zoo``.
        out: Folder for ``state.safetensors``, ``log.jsonl``, ``checkpoint.safetensors`` and
            ``predictions.jsonl``, with a line for each network of the test split.
        device: Device of the model.
        resume: Whether to continue from the state in ``out``, if there is one.

    Raises:
        ValueError, OSError: For an empty split, for networks that exceed the capacity of the
            model, and as in ``meta_train.run.prepared``.
    """
    splits = {split: load_zoo(zoo, split) for split in SPLITS}
    if config.hold_out:
        splits = held_out(splits, config.hold_out)
    counts = ", ".join(f"{len(networks)} {split}" for split, networks in splits.items())
    trainer = CNNTrainer(config, splits, torch.device(device), f"{Path(zoo).name}: {counts}")
    return trainer.run(out, resume)
