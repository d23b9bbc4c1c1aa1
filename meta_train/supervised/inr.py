"""Training of models that read INRs, to classify or edit their images.

Kofinas et al. 2024, section 4.1: AdamW with AMSGrad, linear warm-up and gradient clipping; the best
evaluation on the validation split counts. The paper's recipe is for hundreds of epochs, the default
recipe for a few.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors.torch import save
from torch import Tensor, nn

from l2o_graph.datasets.images import load_images
from l2o_graph.datasets.inr.generate import layout_for
from l2o_graph.inr import (
    AMOUNTS,
    INRClassifier,
    INREditor,
    INRModelConfig,
    INRs,
    augmented,
    dilation_targets,
    inr_config,
    load_inrs,
    render,
    save_inr_model,
    statistics_of,
)
from l2o_graph.metanets.inr import MODELS
from l2o_graph.metanets.inr_config import OF_OUTPUTS, Task
from l2o_graph.ranges import check_choices
from l2o_graph.storage.files import write_atomically
from l2o_graph.storage.shards import SPLITS
from meta_train.run import Result
from meta_train.supervised.epochs import EpochConfig, EpochTrainer

# Dataset of the images, and task of the model, by name.
INR_TASKS: dict[str, tuple[str, Task]] = {
    "mnist_inr": ("mnist", "classify"),
    "fmnist_inr": ("fmnist", "classify"),
    "cifar10_inr": ("cifar10", "classify"),
    "mnist_dilation": ("mnist", "edit"),
    "sample_inr": ("fmnist_sample", "classify"),
    "sample_dilation": ("fmnist_sample", "edit"),
}
# Augmentation that preserves the classes of each dataset, a key of AMOUNTS.
SMALL = {
    "mnist": "small",
    "fmnist": "mirrored",
    "cifar10": "small-mirrored",
    "fmnist_sample": "mirrored",
}
EVALUATION_BATCH = 128

# File with images of the first SHOWN networks of the test split, for editors: "drawn" without
# editing, "edited" and "target", (n, 28, 28) each.
EDITED = "edited.safetensors"
SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class INRTrainingConfig(EpochConfig):
    """Configuration of a run; see ``default_recipe`` and ``paper_recipe``.

    Attributes:
        task: Key of ``INR_TASKS``.
        model: Configuration of the model.
        augment: Augmentation of networks in training of classifiers, a key of ``AMOUNTS``, or
            "none".
    """

    task: str = "mnist_inr"
    model: INRModelConfig = field(default_factory=lambda: inr_config("ng_gnn"))
    epochs: int = 5
    batch: int = 8
    warmup: int = 100
    cooldown: float = 0.5
    augment: str = "none"
    evaluate_every: int = 1000
    save_every: int = 500

    def __post_init__(self) -> None:
        kind = _kind(self.task)
        if self.model.task != kind:
            raise ValueError(
                f"task '{self.task}': expected a model to {kind}, found one to {self.model.task}"
            )
        check_choices(self, augment=("none", *AMOUNTS))
        EpochConfig.__post_init__(self)


def default_recipe(
    task: str = "mnist_inr", model: str = "ng_gnn", **sizes: Any
) -> INRTrainingConfig:
    """Return the best recipe for minutes of training on about ten thousand INRs; see docs/inr.md.

    The ordered pass and models that read outputs have batches of 32 augmented networks (16 without
    augmentation for editing) and decay of the learning rate to 0. Other models have small batches,
    no dropout or augmentation, and no Fourier features. ``sizes`` override fields of the model's
    configuration.

    Raises:
        ValueError: For an unknown task, and values out of range.
    """
    recipe: dict[str, Any] = {}
    if model not in ("ordered", *OF_OUTPUTS):
        sizes = {"dropout": 0.0, "fourier": 0.0, **sizes}
    elif _kind(task) == "edit":
        recipe = {"epochs": 3, "batch": 16, "cooldown": 1.0, "lr": 2e-3, "clip": 1.0}
    else:
        small = SMALL[INR_TASKS[task][0]]
        recipe = {"epochs": 20, "batch": 32, "cooldown": 1.0, "augment": small}
    return INRTrainingConfig(task=task, model=_model(task, model, **sizes), **recipe)


def paper_recipe(task: str = "mnist_inr", model: str = "ng_gnn", **sizes: Any) -> INRTrainingConfig:
    """Return the recipe of Kofinas et al. 2024, section 4.1, and their code.

    Arguments and errors are those of ``default_recipe``.
    """
    recipe: dict[str, Any] = {"epochs": 200, "warmup": 10_000, "clip": 1.0}
    if _kind(task) == "classify":
        epochs = 150 if task == "fmnist_inr" else 100
        recipe = {"epochs": epochs, "warmup": 1000, "augment": "published"}
    model_config = _model(task, model, **sizes)
    return INRTrainingConfig(task=task, model=model_config, batch=128, cooldown=0.0, **recipe)


def _kind(task: str) -> Task:
    if task not in INR_TASKS:
        raise ValueError(f"unknown task '{task}', expected one of {sorted(INR_TASKS)}")
    return INR_TASKS[task][1]


def _model(task: str, model: str, **changes: Any) -> INRModelConfig:
    """Configure a model for the networks of a task, with changes."""
    kind, source = _kind(task), INR_TASKS[task][0]
    return inr_config(model, kind, **{"layout": layout_for(source), **changes})


@dataclass(frozen=True, slots=True)
class Examples:
    """Split of a task.

    Attributes:
        networks: I networks.
        targets: Classes (I,), or target images (I, height, width) of editing.
    """

    networks: INRs
    targets: Int64[Tensor, " I"] | Float[Tensor, "I height width"]

    def batch(self, index: Int64[Tensor, " n"]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Select weights (n, out, in), biases (n, out) and targets of networks by index."""
        weights = [w[index] for w in self.networks.weights]
        return weights, [b[index] for b in self.networks.biases], self.targets[index]


def load_examples(
    task: str, folder: str | Path, data_root: str | Path | None
) -> dict[str, Examples]:
    """Load the splits of a task from a folder that ``python -m l2o_graph.datasets.inr`` wrote.

    Only editing needs ``data_root``, the folder of image datasets.

    Raises:
        ValueError: For missing or damaged shards.
        DatasetNotFoundError: If images are needed and not found.
    """
    source, kind = INR_TASKS[task]
    splits = {split: load_inrs(folder, split) for split in SPLITS}
    if kind == "classify":
        return {split: Examples(inrs, inrs.labels) for split, inrs in splits.items()}
    images = load_images(source, data_root)
    return {s: Examples(inrs, dilation_targets(inrs, images, s)) for s, inrs in splits.items()}


class INRTrainer(EpochTrainer):
    """Training run of a classifier or editor between two steps."""

    config: INRTrainingConfig
    model: INRClassifier | INREditor

    def __init__(
        self,
        config: INRTrainingConfig,
        splits: dict[str, Examples],
        device: torch.device,
        data: str,
    ):
        self.splits, networks, statistics = splits, splits["train"].networks, None
        if config.model.normalise:
            statistics = statistics_of(networks.weights, networks.biases)
        make = partial(MODELS[config.model.task], config.model, statistics)
        super().__init__(config, make, len(networks), device, data)

    def descend(self, index: Int64[Tensor, " batch"]) -> dict[str, float]:
        """Accumulate gradients of the mean loss on a batch; return the metrics."""
        config = self.config
        weights, biases, targets = self.splits["train"].batch(index)
        if config.augment != "none" and config.model.task == "classify":
            generator, amounts = self.generator(2, self.step), AMOUNTS[config.augment]
            weights, biases = augmented(weights, biases, generator, amounts)
        metrics = {k: v.mean() for k, v in self._metrics(weights, biases, targets).items()}
        metrics["loss"].backward()
        return {key: value.item() for key, value in metrics.items()}

    @torch.no_grad()
    def measure(self, split: str) -> dict[str, float]:
        """Compute mean loss and, for classifiers, accuracy on a split."""
        examples = self.splits[split]
        self.model.eval()
        batches = torch.arange(len(examples.networks)).split(EVALUATION_BATCH)
        found = [self._metrics(*examples.batch(index)) for index in batches]
        return {key: float(torch.cat([f[key] for f in found]).mean()) for key in found[0]}

    def score(self, point: dict[str, Any]) -> float:
        """Return the accuracy on the validation split or, for editors, the negative loss."""
        return point.get("val_accuracy", -point["val_loss"])

    def save_best(self, path: Path) -> None:
        """Save a checkpoint."""
        save_inr_model(path, self.model, self.provenance())

    @torch.no_grad()
    def save_predictions(self, path: Path) -> None:
        """Write ``EDITED``, images of some networks of the test split, for an editor."""
        if not isinstance(self.model, INREditor):
            return
        test = self.splits["test"]
        weights, biases, target = test.batch(torch.arange(min(SHOWN, len(test.networks))))
        self.model.eval()
        edited = self.model.draw(
            [w.to(self.device) for w in weights], [b.to(self.device) for b in biases]
        )
        drawn = render(weights, biases, omega0=self.config.model.omega0)
        images = {"drawn": drawn, "edited": edited.cpu(), "target": target}
        write_atomically(path.with_name(EDITED), save(images))

    def _metrics(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor], targets: Tensor
    ) -> dict[str, Float[Tensor, " n"]]:
        """Compute cross-entropy in nats and correctness of each network, or the MSE of pixels."""
        weights, biases = ([t.to(self.device) for t in kind] for kind in (weights, biases))
        targets = targets.to(self.device)
        if isinstance(self.model, INREditor):
            edited = self.model.draw(weights, biases)
            return {"loss": (edited - targets).square().mean((1, 2))}
        logits = self.model(weights, biases)
        loss = nn.functional.cross_entropy(logits, targets, reduction="none")
        return {"loss": loss, "accuracy": (logits.argmax(1) == targets).to(loss)}


def train_inr_model(
    config: INRTrainingConfig,
    inrs: str | Path,
    out: Path,
    data_root: str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
) -> Result:
    """Train a model that reads INRs.

    Ctrl-C saves the state after the current step and ends the run.

    Args:
        config: Configuration of the run; the same as that of the state if the run is resumed.
        inrs: Folder of the networks; see ``load_examples``.
        out: Folder for ``state.safetensors``, ``log.jsonl`` and ``checkpoint.safetensors``; for
            editors also ``edited.safetensors``.
        data_root: Folder of image datasets, which only editing needs.
        device: Device of the model.
        resume: Whether to continue from the state in ``out``, if there is one.

    Raises:
        ValueError, OSError: For networks that are missing, damaged or of another layout, and as in
            ``meta_train.run.prepared``.
        DatasetNotFoundError: If images are needed and not found.
    """
    splits = load_examples(config.task, inrs, data_root)
    counts = ", ".join(f"{len(examples.networks)} {split}" for split, examples in splits.items())
    for name in ("layout", "omega0"):
        found, expected = (getattr(x, name) for x in (splits["train"].networks, config.model))
        if found != expected:
            raise ValueError(f"INRs '{inrs}': expected {name} {expected}, found {found}")
    trainer = INRTrainer(config, splits, torch.device(device), f"{Path(inrs).name}: {counts}")
    return trainer.run(out, resume)
