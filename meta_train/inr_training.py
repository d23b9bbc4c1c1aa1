"""Training of models that read INRs: to classify what they draw, or to edit it.

AdamW with AMSGrad, a linear warm-up, clipped gradients, and of all evaluations the one that is best
on the validation split, as in Kofinas et al. 2024, section 4.1. Their recipe is for hundreds of
epochs; the default one for a few.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors.torch import save
from torch import Tensor, nn

from l2o_graph.datasets.images import load_images
from l2o_graph.inr import (
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
from l2o_graph.inr.config import Model, Task
from l2o_graph.zoo.files import write_atomically
from meta_train.epochs import EpochConfig, EpochTrainer
from meta_train.run import Result, begin, drive, prepared

# Name -> (dataset of the images, what a model is to do).
INR_TASKS: dict[str, tuple[str, Task]] = {
    "mnist_inr": ("mnist", "classify"),
    "fmnist_inr": ("fmnist", "classify"),
    "mnist_dilation": ("mnist", "edit"),
    "sample_inr": ("fmnist_sample", "classify"),
    "sample_dilation": ("fmnist_sample", "edit"),
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
        augment: Whether networks to be classified are changed at random: see ``augmented``.
    """

    task: str = "mnist_inr"
    model: INRModelConfig = field(default_factory=lambda: inr_config("ng_gnn"))
    epochs: int = 5
    batch: int = 8
    warmup: int = 100
    cooldown: float = 0.5
    augment: bool = False
    evaluate_every: int = 1000
    save_every: int = 500

    def __post_init__(self) -> None:
        """Refuse what cannot run.

        Raises:
            ValueError: For an unknown task, a model of another one, or a size out of range.
        """
        kind = _kind(self.task)
        if self.model.task != kind:
            raise ValueError(
                f"task '{self.task}': expected a model to {kind}, found one to {self.model.task}"
            )
        self.check_ranges()


def default_recipe(
    task: str = "mnist_inr", model: Model = "ng_gnn", **sizes: Any
) -> INRTrainingConfig:
    """What learns most in five epochs of ten thousand INRs: see docs/inr.md.

    Small steps, no noise of any kind, a rate that falls to 0, and numbers as they are instead of
    their Fourier features.

    Args:
        task: A name of ``INR_TASKS``.
        model: What is trained.
        sizes: Other fields of its configuration than the published ones.
    """
    changes = {"dropout": 0.0, "fourier": 0.0, **sizes}
    return INRTrainingConfig(task=task, model=inr_config(model, _kind(task), **changes))


def paper_recipe(
    task: str = "mnist_inr", model: Model = "ng_gnn", **sizes: Any
) -> INRTrainingConfig:
    """The recipe of Kofinas et al. 2024, section 4.1, and of their scripts: see above."""
    kind = _kind(task)
    config = INRTrainingConfig(
        task=task, model=inr_config(model, kind, **sizes), epochs=100, batch=128, warmup=1000,
        cooldown=0.0, augment=True,
    )  # fmt: skip
    if kind == "edit":
        return dataclasses.replace(config, epochs=200, warmup=10_000, clip=1.0, augment=False)
    return dataclasses.replace(config, epochs=150) if task == "fmnist_inr" else config


def _kind(task: str) -> Task:
    if task not in INR_TASKS:
        raise ValueError(f"unknown task '{task}', expected one of {sorted(INR_TASKS)}")
    return INR_TASKS[task][1]


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


def load_examples(task: str, folder: str | Path, data_root: str | Path | None) -> list[Examples]:
    """Training, validation and test split of a task.

    Args:
        task: A name of ``INR_TASKS``.
        folder: What ``python -m l2o_graph.datasets.inr`` wrote.
        data_root: Where the images lie, which only editing needs.

    Raises:
        ValueError: For a folder without whole splits.
        DatasetNotFoundError: When images are needed and absent.
    """
    source, kind = INR_TASKS[task]
    splits = {split: load_inrs(folder, split) for split in SPLITS}
    if kind == "classify":
        return [Examples(inrs, inrs.labels) for inrs in splits.values()]
    images = load_images(source, data_root)
    return [Examples(inrs, dilation_targets(inrs, images, split)) for split, inrs in splits.items()]


class INRTrainer(EpochTrainer[INRTrainingConfig, INRClassifier | INREditor]):
    """A run in progress, between two steps: a ``meta_train.run.Trainer``."""

    def __init__(
        self, config: INRTrainingConfig, examples: list[Examples], device: torch.device, data: str
    ):
        self.train, self.val, self.test = examples
        networks = self.train.networks
        statistics = None
        if config.model.normalise:
            statistics = statistics_of(networks.weights, networks.biases)
        kind = INRClassifier if config.model.task == "classify" else INREditor
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = kind(config.model, statistics)
        super().__init__(config, model, len(networks), device, data)

    @property
    def settings(self) -> dict[str, Any]:
        """The run, as JSON holds it."""
        record = dataclasses.asdict(self.config)
        record["model"]["layout"] = list(self.config.model.layout)
        return {**record, "data": self.data}

    def advance(self) -> dict[str, Any]:
        """One step; returns what there is to log of it."""
        config, started = self.config, time.perf_counter()
        epoch, index = self.epoch_and_batch()
        weights, biases, targets = self.train.of(index)
        if config.augment and config.model.task == "classify":
            weights, biases = augmented(weights, biases, self.generator(2, self.step))
        rate = self.set_rate()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.generator(3, self.step).initial_seed())  # of the dropout
            self.model.train()
            loss = self._score(weights, biases, targets)["loss"].mean()
            self.optimizer.zero_grad()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.clip or torch.inf)
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return {
            "step": self.step, "epoch": epoch, "loss": loss.item(), "gradient_norm": norm.item(),
            "lr": rate, "seconds": seconds,
        }  # fmt: skip

    def evaluate(self) -> dict[str, Any]:
        """Loss and, of a classifier, accuracy on the validation and the test split."""
        started = time.perf_counter()
        point: dict[str, Any] = {"step": self.step}
        for name, examples in (("val", self.val), ("test", self.test)):
            point |= {f"{name}_{key}": value for key, value in self._measure(examples).items()}
        self.seconds += time.perf_counter() - started
        self.evaluations.append(point)
        return point

    def score(self, point: dict[str, Any]) -> float:
        """By accuracy on the validation split, or without one by loss."""
        return point.get("val_accuracy", -point["val_loss"])

    def save_best(self, path: Path) -> None:
        """Write the model as it is, for use; beside the checkpoint of an editor ``EDITED``."""
        save_inr_model(path, self.model, self.provenance())
        if isinstance(self.model, INREditor):
            write_atomically(path.with_name(EDITED), save(self._edited(self.model)))

    @torch.no_grad()
    def _edited(self, model: INREditor) -> dict[str, Float[Tensor, "n height width"]]:
        """What some networks draw, and what they should."""
        weights, biases, target = self.test.of(torch.arange(min(SHOWN, len(self.test.networks))))
        model.eval()
        edited = model([w.to(self.device) for w in weights], [b.to(self.device) for b in biases])
        omega0 = self.config.model.omega0
        pixels = {
            "drawn": render(weights, biases, omega0=omega0),
            "edited": render(*edited, omega0=omega0).cpu(),
        }
        return {**pixels, "target": target}

    def _score(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor], targets: Tensor
    ) -> dict[str, Float[Tensor, " n"]]:
        """Of each network the loss in nats and whether it is right, or the error of its pixels."""
        answer = self.model(
            [w.to(self.device) for w in weights], [b.to(self.device) for b in biases]
        )
        targets = targets.to(self.device)
        if isinstance(answer, Tensor):
            loss = nn.functional.cross_entropy(answer, targets, reduction="none")
            return {"loss": loss, "accuracy": (answer.argmax(1) == targets).to(loss)}
        drawn = render(*answer, omega0=self.config.model.omega0)
        return {"loss": (drawn - targets).square().mean((1, 2))}

    @torch.no_grad()
    def _measure(self, examples: Examples) -> dict[str, float]:
        """Means over a split."""
        self.model.eval()
        batches = torch.arange(len(examples.networks)).split(EVALUATION_BATCH)
        found = [self._score(*examples.of(index)) for index in batches]
        return {key: float(torch.cat([f[key] for f in found]).mean()) for key in found[0]}


def train_inr_model(
    config: INRTrainingConfig,
    inrs: str | Path,
    out: Path,
    data_root: str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
) -> Result:
    """Train a model that reads INRs.

    Args:
        config: The run. When resuming, that of the saved state has to be the same.
        inrs: Folder of the networks: see ``load_examples``.
        out: Folder for ``state.safetensors``, ``log.jsonl`` and ``checkpoint.safetensors``.
        data_root: Where datasets of images lie; only editing needs them.
        device: Where the model lives.
        resume: Continue from the state in ``out`` if there is one.

    Returns:
        Where everything is. Ctrl-C ends the run after the step it is in, state saved.

    Raises:
        ValueError: For networks that are absent, damaged or of another layout, or a state of
            another configuration.
        FileExistsError: When ``out`` holds a run and ``resume`` is off.
        BlockingIOError: When another process is writing to ``out``.
        OSError: When ``out`` cannot be written.
        DatasetNotFoundError: When images are needed and absent.
    """
    examples = load_examples(config.task, inrs, data_root)
    counts = ", ".join(f"{len(e.networks)} {s}" for s, e in zip(SPLITS, examples, strict=True))
    for name in ("layout", "omega0"):
        found, expected = (getattr(x, name) for x in (examples[0].networks, config.model))
        if found != expected:
            raise ValueError(f"INRs '{inrs}': expected {name} {expected}, found {found}")
    new = INRTrainer(config, examples, torch.device(device), f"{Path(inrs).name}: {counts}")

    def describe(point: dict[str, Any]) -> str:
        if "val_accuracy" in point:
            return f"accuracy {point['val_accuracy']:.2%} (test {point['test_accuracy']:.2%})"
        return f"mean squared error {point['val_loss']:.5f} (test {point['test_loss']:.5f})"

    with prepared(out, new.settings, resume) as state:
        trainer = begin(state, new.settings, resume=new.resume, new=lambda: new)
        return drive(trainer, state, config.evaluate_every, config.save_every, describe)
