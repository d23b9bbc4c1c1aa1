"""Training of models that read CNNs to predict their accuracy.

Kofinas et al. 2024, section 4.2: AdamW with AMSGrad, clipped gradients, a mean squared error or a
cross-entropy of the predicted accuracy, and of all evaluations the one that ranks the validation
split best, by Kendall's tau-b. Their recipe is for tens of thousands of networks; the default one
for a few thousand.
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
from meta_train.run import Result
from meta_train.supervised.epochs import EpochConfig, EpochTrainer, in_words

CNN_TASKS: dict[str, Zoo] = {"cnn_park": "park", "cnn_small": "small"}
SPLITS = ("train", "val", "test")
PREDICTIONS = "predictions.jsonl"
LEVELS = (0.8, 0.9)  # of intervals whose coverage is measured

Loss = Literal["mse", "bce"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CNNTrainingConfig(EpochConfig):
    """One run; ``default_recipe`` and ``paper_recipe`` say what goes with what.

    Attributes:
        task: A name of ``CNN_TASKS``.
        model: What is trained.
        loss: "mse", of the accuracy, or "bce", its cross-entropy in nats.
        piece: Networks that are worked on at once, as many as the cache holds; a step adds up
            the gradients of its pieces.
        augment: Whether networks are changed at random in training: see ``augmented``.
        hold_out: "TRAIT=VALUE", as "depth=5": networks that have it
            (``l2o_graph.metanets.descriptors``) are not trained on and not validated on, and
            only they are tested; "" for no trait.
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
        self.check_ranges(piece=COUNT)


def default_recipe(
    task: str = "cnn_park", model: str = "ng_gnn", **sizes: Any
) -> CNNTrainingConfig:
    """What learns most from a few thousand networks: see docs/generalization.md.

    Small steps, no noise of any kind, a rate that falls to 0, and for graph models weights times
    the root of their fan-in instead of their Fourier features. NG-T takes smaller batches and a
    larger rate, ProbeGen a smaller rate, as published.

    ``sizes`` are other fields of the model's configuration than the published ones.
    """
    scaled = model in ON_GRAPHS and not sizes.get("fourier")
    changes = {"dropout": 0.0, "fourier": 0.0, "scaled": scaled, **sizes}
    reads = cnn_config(model, _kind(task), **changes)
    own: dict[str, dict[str, Any]] = {"ng_t": {"lr": 3e-3, "batch": 8}, "probegen": {"lr": 3e-4}}
    return CNNTrainingConfig(task=task, model=reads, **own.get(model, {}))


def paper_recipe(task: str = "cnn_park", model: str = "ng_gnn", **sizes: Any) -> CNNTrainingConfig:
    """The recipe of Kofinas et al. 2024, section 4.2, and of their scripts: see above.

    NG-GNN's first weights (``keep_nodes``) and NG-T's pairs without an edge (``plain``) are ours
    here, too.
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
    """A split of a zoo: of ``python -m l2o_graph.datasets.zoo``, or one of the published two.

    Raises:
        ValueError: For a folder without networks of that split.
    """
    folder = Path(folder)
    if (folder / "weights.npy").exists():
        return read_small_zoo(folder, split)
    if next(folder.glob("**/checkpoint.pt"), None) is not None:
        return read_wild_park(folder, split)
    return load_cnns(folder, split)


def kendall(one: Float[Tensor, " I"], other: Float[Tensor, " I"]) -> float:
    """Kendall's tau-b of two orders, -1 to 1; 0 where one of them is none."""
    from scipy.stats import kendalltau

    found: Any = kendalltau(one.numpy(), other.numpy())
    return 0.0 if math.isnan(found.statistic) else float(found.statistic)


def held_out(splits: Mapping[str, CNNs], trait: str) -> dict[str, CNNs]:
    """Splits, by name, without the networks that have a trait; the test split has only them.

    Raises:
        ValueError: For an unknown trait, and where a split is left without networks.
    """
    key, _, value = trait.partition("=")
    if key not in (*RANGES, *NAMES) or not value:
        expected = ", ".join((*RANGES, *NAMES))
        raise ValueError(f"hold_out: expected TRAIT=VALUE, of {expected}, found '{trait}'")
    left = {}
    for split, networks in splits.items():
        found = [
            value in map(str, descriptors(structure_of(a))[key]) for a in networks.architectures
        ]
        index = (torch.tensor(found)[networks.which] == (split == "test")).nonzero().flatten()
        if not len(index):
            which = "with" if split == "test" else "without"
            raise ValueError(f"hold_out: no network of split '{split}' is {which} {trait}")
        left[split] = chosen(networks, index)
    return left


class CNNTrainer(EpochTrainer):
    """A run in progress, between two steps."""

    config: CNNTrainingConfig
    model: GeneralizationPredictor

    def __init__(
        self, config: CNNTrainingConfig, zoo: dict[str, CNNs], device: torch.device, data: str
    ):
        make = partial(GeneralizationPredictor, config.model)
        super().__init__(config, make, len(zoo["train"]), device, data)
        self.zoo = zoo
        self._predicted = torch.empty(0)  # of the split that was last evaluated
        self._residuals: dict[str, Any] = {}

    def descend(self, index: Int64[Tensor, " batch"]) -> dict[str, float]:
        """Add the gradients of the mean loss of some networks, by pieces; returns that loss."""
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
        """Mean loss and Kendall's tau of a split; keeps what is predicted of its networks.

        Of the test split also the share of accuracies within the intervals of ``LEVELS``, as
        "cover_80", where the runs of the validation split suffice for them. How far off the model
        is on these runs, which the intervals are made of, is measured before.
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
        found = {"loss": loss, "tau": kendall(self._predicted, networks.accuracy)}
        if split == "test":
            runs = self._residuals["runs"]
            for level in LEVELS:
                if level * (runs + 1) <= runs:
                    share = covered(self._predicted, networks.accuracy, level, self._residuals)
                    found[f"cover_{100 * level:.0f}"] = share
        return found

    def describe(self, point: dict[str, Any]) -> str:
        """Say in words what an evaluation found."""
        return "tau " + in_words(point, "tau", "{:.3f}")

    def score(self, point: dict[str, Any]) -> float:
        """By the order of the validation split."""
        return point["val_tau"]

    def save_best(self, path: Path) -> None:
        """Write the model as it is, for use."""
        train = self.zoo["train"]
        known = (train.architectures[i] for i in train.which.unique().tolist())
        seen = ranges_of(map(structure_of, known))
        seen["accuracy"] = [round(x.item(), 6) for x in train.accuracy.aminmax()]
        found = {"seen": seen, "residuals": self._residuals}
        save_cnn_model(path, self.model, self.provenance() | found)

    def save_shown(self, path: Path) -> None:
        """Write beside a checkpoint what it says of each network of the test split."""
        test = self.zoo["test"]
        names = "run", "step", "accuracy", "prediction"
        columns = test.run, test.step, test.accuracy, self._predicted
        rows = zip(*(column.tolist() for column in columns), strict=True)
        lines = [json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows]
        write_atomically(path.with_name(PREDICTIONS), "".join(lines).encode())

    def _loss(self, logits: Float[Tensor, " n"], networks: CNNs) -> Float[Tensor, " n"]:
        """Of each network."""
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

    Ctrl-C ends the run after the step it is in, state saved.

    Args:
        config: The run. When resuming, that of the saved state has to be the same.
        zoo: Folder of the networks: see ``load_zoo``.
        out: Folder for ``state.safetensors``, ``log.jsonl``, ``checkpoint.safetensors`` and
            ``predictions.jsonl``, a line for each network of the test split as the checkpoint
            sees it.
        device: Where the model lives.
        resume: Continue from the state in ``out`` if there is one.

    Raises:
        ValueError, OSError: For an empty split, for networks that there is no room for, and as
            ``meta_train.run.prepared``.
    """
    splits = {split: load_zoo(zoo, split) for split in SPLITS}
    if config.hold_out:
        splits = held_out(splits, config.hold_out)
    counts = ", ".join(f"{len(networks)} {split}" for split, networks in splits.items())
    new = CNNTrainer(config, splits, torch.device(device), f"{Path(zoo).name}: {counts}")
    return new.run(out, resume)
