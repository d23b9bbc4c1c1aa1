"""Training of models that read INRs: to classify what they draw, or to edit it.

AdamW with AMSGrad, a linear warm-up, clipped gradients, and of all evaluations the one that is best
on the validation split, as in Kofinas et al. 2024, section 4.1. Their recipe is for hundreds of
epochs; the default one for a few.
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
from l2o_graph.metanets.inr_config import Task
from l2o_graph.ranges import check_choices
from l2o_graph.storage.files import write_atomically
from meta_train.run import Result
from meta_train.supervised.epochs import EpochConfig, EpochTrainer, in_words

# Name -> (dataset of the images, what a model is to do).
INR_TASKS: dict[str, tuple[str, Task]] = {
    "mnist_inr": ("mnist", "classify"),
    "fmnist_inr": ("fmnist", "classify"),
    "cifar10_inr": ("cifar10", "classify"),
    "mnist_dilation": ("mnist", "edit"),
    "sample_inr": ("fmnist_sample", "classify"),
    "sample_dilation": ("fmnist_sample", "edit"),
}
# Changes that leave a class of each dataset what it is.
SMALL = {
    "mnist": "small",
    "fmnist": "mirrored",
    "cifar10": "small-mirrored",
    "fmnist_sample": "mirrored",
}
SPLITS = ("train", "val", "test")
EVALUATION_BATCH = 128

# Beside the checkpoint of an editor: what the first networks of the test split draw as they are
# and edited, and what they should draw; "drawn", "edited" and "target", (n, 28, 28) each.
EDITED = "edited.safetensors"
SHOWN = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class INRTrainingConfig(EpochConfig):
    """One run.

    Attributes:
        task: A name of ``INR_TASKS``.
        model: What is trained.
        augment: How networks to be classified are changed at random: a name of ``AMOUNTS``, or
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
        self.check_ranges()


def default_recipe(
    task: str = "mnist_inr", model: str = "ng_gnn", **sizes: Any
) -> INRTrainingConfig:
    """What learns most in minutes from some ten thousand INRs: see docs/inr.md.

    The ordered pass and ProbeGen take steps of 32 networks (16 to edit), changed at random, at a
    rate that falls to 0. Other models take small steps, without noise of any kind, and read numbers
    as they are instead of their Fourier features.

    ``sizes`` are other fields of the model's configuration than the published ones.
    """
    recipe: dict[str, Any] = {}
    if model not in ("ordered", "probegen"):
        sizes = {"dropout": 0.0, "fourier": 0.0, **sizes}
    elif _kind(task) == "edit":
        recipe = {"epochs": 3, "batch": 16, "cooldown": 1.0, "lr": 2e-3, "clip": 1.0}
    else:
        small = SMALL[INR_TASKS[task][0]]
        recipe = {"epochs": 20, "batch": 32, "cooldown": 1.0, "augment": small}
    return INRTrainingConfig(task=task, model=_model(task, model, **sizes), **recipe)


def paper_recipe(task: str = "mnist_inr", model: str = "ng_gnn", **sizes: Any) -> INRTrainingConfig:
    """The recipe of Kofinas et al. 2024, section 4.1, and of their scripts: see above."""
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
    """A model for the networks of a task, with changes."""
    kind, source = _kind(task), INR_TASKS[task][0]
    return inr_config(model, kind, **{"layout": layout_for(source), **changes})


@dataclass(frozen=True, slots=True)
class Examples:
    """A split: networks, and what a model is to say of each.

    Attributes:
        networks: I of them.
        targets: Their classes (I,), or the images (I, 28, 28) that they are to draw.
    """

    networks: INRs
    targets: Int64[Tensor, " I"] | Float[Tensor, "I height width"]

    def of(self, index: Int64[Tensor, " n"]) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Weights, biases and targets of some networks."""
        weights = [w[index] for w in self.networks.weights]
        return weights, [b[index] for b in self.networks.biases], self.targets[index]


def load_examples(
    task: str, folder: str | Path, data_root: str | Path | None
) -> dict[str, Examples]:
    """Splits of a task from a folder that ``python -m l2o_graph.datasets.inr`` wrote.

    Only editing needs images, from where datasets lie.

    Raises:
        ValueError: For a folder without whole splits.
        DatasetNotFoundError: When images are needed and absent.
    """
    source, kind = INR_TASKS[task]
    splits = {split: load_inrs(folder, split) for split in SPLITS}
    if kind == "classify":
        return {split: Examples(inrs, inrs.labels) for split, inrs in splits.items()}
    images = load_images(source, data_root)
    return {s: Examples(inrs, dilation_targets(inrs, images, s)) for s, inrs in splits.items()}


class INRTrainer(EpochTrainer):
    """A run in progress, between two steps."""

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
        """Add the gradients of the mean loss of some networks; returns what is known of them."""
        config = self.config
        weights, biases, targets = self.splits["train"].of(index)
        if config.augment != "none" and config.model.task == "classify":
            dice, amounts = self.generator(2, self.step), AMOUNTS[config.augment]
            weights, biases = augmented(weights, biases, dice, amounts)
        found = {k: v.mean() for k, v in self._score(weights, biases, targets).items()}
        found["loss"].backward()
        return {key: value.item() for key, value in found.items()}

    @torch.no_grad()
    def measure(self, split: str) -> dict[str, float]:
        """Mean loss and, of a classifier, accuracy on a split."""
        examples = self.splits[split]
        self.model.eval()
        batches = torch.arange(len(examples.networks)).split(EVALUATION_BATCH)
        found = [self._score(*examples.of(index)) for index in batches]
        return {key: float(torch.cat([f[key] for f in found]).mean()) for key in found[0]}

    def describe(self, point: dict[str, Any]) -> str:
        """Say in words what an evaluation found."""
        if "val_accuracy" in point:
            return "accuracy " + in_words(point, "accuracy", "{:.2%}")
        return "mean squared error " + in_words(point, "loss", "{:.5f}")

    def score(self, point: dict[str, Any]) -> float:
        """By accuracy on the validation split, or without one by loss."""
        return point.get("val_accuracy", -point["val_loss"])

    def save_best(self, path: Path) -> None:
        """Write the model as it is, for use."""
        save_inr_model(path, self.model, self.provenance())

    def save_shown(self, path: Path) -> None:
        """Write ``EDITED`` beside the checkpoint of an editor."""
        if isinstance(self.model, INREditor):
            write_atomically(path.with_name(EDITED), save(self._edited(self.model)))

    @torch.no_grad()
    def _edited(self, model: INREditor) -> dict[str, Float[Tensor, "n height width"]]:
        """What some networks draw, and what they should."""
        test = self.splits["test"]
        weights, biases, target = test.of(torch.arange(min(SHOWN, len(test.networks))))
        model.eval()
        edited = model.draw(
            [w.to(self.device) for w in weights], [b.to(self.device) for b in biases]
        )
        drawn = render(weights, biases, omega0=self.config.model.omega0)
        return {"drawn": drawn, "edited": edited.cpu(), "target": target}

    def _score(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor], targets: Tensor
    ) -> dict[str, Float[Tensor, " n"]]:
        """Of each network the loss in nats and whether it is right, or the error of its pixels."""
        weights, biases = ([t.to(self.device) for t in kind] for kind in (weights, biases))
        targets = targets.to(self.device)
        if isinstance(self.model, INREditor):
            drawn = self.model.draw(weights, biases)
            return {"loss": (drawn - targets).square().mean((1, 2))}
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

    Ctrl-C ends the run after the step it is in, state saved.

    Args:
        config: The run. When resuming, that of the saved state has to be the same.
        inrs: Folder of the networks: see ``load_examples``.
        out: Folder for ``state.safetensors``, ``log.jsonl`` and ``checkpoint.safetensors``.
        data_root: Where datasets of images lie; only editing needs them.
        device: Where the model lives.
        resume: Continue from the state in ``out`` if there is one.

    Raises:
        ValueError, OSError: For networks that are absent, damaged or of another layout, and as
            ``meta_train.run.prepared``.
        DatasetNotFoundError: When images are needed and absent.
    """
    splits = load_examples(config.task, inrs, data_root)
    counts = ", ".join(f"{len(examples.networks)} {split}" for split, examples in splits.items())
    for name in ("layout", "omega0"):
        found, expected = (getattr(x, name) for x in (splits["train"].networks, config.model))
        if found != expected:
            raise ValueError(f"INRs '{inrs}': expected {name} {expected}, found {found}")
    new = INRTrainer(config, splits, torch.device(device), f"{Path(inrs).name}: {counts}")
    return new.run(out, resume)
