"""Base class of supervised trainers: epochs, random numbers, saved state and evaluation."""

import copy
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from l2o_graph.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, SEED, SHARE, check_ranges
from meta_train.run import (
    Result,
    Trainer,
    drive,
    optimizer_tensors,
    prepared,
    read_state,
    record_point,
    restore_optimizer,
    with_prefix,
    write_state,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochConfig:
    """Configuration that all supervised training runs share.

    Raises:
        ValueError: For values out of range, naming the field.

    Attributes:
        seed: Seed of the initial weights, of the order of networks and of all other random numbers.
        epochs: Number of passes over the training split.
        minutes: Duration of the run, from which the number of steps follows by the time of the
            first steps; 0 for a number of ``epochs``.
        batch: Number of networks in a batch.
        lr: Learning rate of AdamW after the warm-up.
        warmup: Number of steps of linear warm-up of the learning rate.
        cooldown: Fraction of the steps, at the end, with linear decay of the learning rate to 0.
            The paper has none, but many more epochs.
        weight_decay: Weight decay of AdamW.
        clip: Norm that a gradient is clipped to; 0 for no clipping.
        evaluate_every: Number of steps between evaluations.
        save_every: Number of steps between saved states.
    """

    seed: int = 0
    epochs: int
    minutes: float = 0.0
    batch: int
    lr: float = 1e-3
    warmup: int
    cooldown: float = 0.0
    weight_decay: float = 5e-4
    clip: float = 10.0
    evaluate_every: int
    save_every: int = 100

    def __post_init__(self) -> None:
        check_ranges(
            self, seed=SEED, epochs=COUNT, minutes=NOT_NEGATIVE, batch=COUNT, lr=NOT_NEGATIVE,
            warmup=COUNT_OR_NONE, cooldown=SHARE, weight_decay=NOT_NEGATIVE, clip=NOT_NEGATIVE,
            evaluate_every=COUNT, save_every=COUNT,
        )  # fmt: skip


def rate_at(config: EpochConfig, step: int, steps: int) -> float:
    """Compute the learning rate of a step, counted from 0, for a run of a number of steps."""
    warm = (step + 1) / max(config.warmup, 1)
    cool = (steps - step) / (config.cooldown * steps) if config.cooldown else 1.0
    return config.lr * min(1.0, warm, cool)


# Duration in seconds of the steps that are timed, and of those before.
TRIAL, WARM = 2.0, 1.0

T = TypeVar("T", bound="EpochTrainer")


class EpochTrainer(Trainer):
    """Supervised training run between two steps, by AdamW with AMSGrad.

    The random numbers of a step depend only on the seed and the number of the step, so that no
    state of generators has to be saved. ``make`` creates the model, an epoch has ``examples``
    training examples, and ``data`` describes them.
    """

    count = "step"
    model: Any

    def __init__(
        self,
        config: EpochConfig,
        make: Callable[[], nn.Module],
        examples: int,
        device: torch.device,
        data: str,
    ):
        # An incomplete last batch is left out; every epoch has another order.
        self.examples, self.per_epoch = examples, max(examples // config.batch, 1)
        super().__init__(config, config.epochs * self.per_epoch)
        self.device, self.data = device, data
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = make().to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            config.lr,
            weight_decay=config.weight_decay,
            amsgrad=True,
            fused=True,  # saves 5 % of the time of a small model's step on a CPU
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Configuration of the run as a JSON object."""
        record = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        return {**record, "model": record["model"].to_json(), "data": self.data}

    @abstractmethod
    def descend(self, index: Int64[Tensor, " batch"]) -> dict[str, float]:
        """Accumulate gradients on training networks; return the mean "loss" and other metrics."""

    @abstractmethod
    def measure(self, split: str) -> dict[str, float]:
        """Compute metrics of the model on the split "val" or "test"."""

    @abstractmethod
    def save_predictions(self, path: Path) -> None:
        """Write predictions for the test split to the folder of the checkpoint ``path``."""

    @abstractmethod
    def score(self, point: dict[str, Any]) -> float:
        """Return the score of an evaluation on the validation split; larger is better."""

    def advance(self) -> dict[str, Any]:
        """Make a step; return a record to log."""
        epoch, turn = divmod(self.step, self.per_epoch)
        order = torch.randperm(self.examples, generator=self.generator(1, epoch))
        index = order[turn * self.config.batch : (turn + 1) * self.config.batch]
        rate = rate_at(self.config, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.generator(3, self.step).initial_seed())  # for dropout
            self.model.train()
            self.optimizer.zero_grad()
            found = self.descend(index)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or torch.inf)
        self.optimizer.step()
        self.step += 1
        more = {"gradient_norm": norm.item(), "lr": rate}
        return {"step": self.step, "epoch": epoch, **found, **more}

    def evaluate(self) -> dict[str, Any]:
        """Evaluate the model on the validation split."""
        found = {f"val_{key}": value for key, value in self.measure("val").items()}
        self.evaluations.append({"step": self.step, **found})
        return self.evaluations[-1]

    def describe(self, point: dict[str, Any]) -> str:
        """Describe the result of an evaluation."""
        metrics = {k: v for k, v in point.items() if k.startswith(("val_", "test_"))}
        return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())

    def judge(self, best: Path) -> dict[str, Any]:
        """Evaluate the best checkpoint on the test split, and add the result to its provenance.

        This is the only evaluation on the test split.
        """
        self.model.load_state_dict(type(self.model).from_checkpoint(best).state_dict())
        point = max(self.evaluations, key=self.score)  # the first of equal ones, as ``is_best``
        found = {f"test_{key}": value for key, value in self.measure("test").items()}
        self.evaluations.append(point | found)
        self.save_best(best)
        self.save_predictions(best)
        return self.evaluations[-1]

    def run(self, out: Path, resume: bool) -> Result:
        """Train to the end, from the start or, with ``resume``, from the state in ``out``.

        Raises:
            ValueError, OSError: See ``meta_train.run.prepared``.
        """
        with prepared(out, self.settings, resume, self.resume, self.planned) as trainer:
            result = drive(trainer, out)
            if result.finished and result.checkpoint is not None:
                point = trainer.judge(result.checkpoint)
                record_point(result.log, point)
                print(f"step {point['step']}, the best: {self.describe(point)}")
            return result

    def planned(self: T) -> T:
        """Set the number of steps for ``minutes``, by timing steps of a copy; return itself."""
        if not self.config.minutes:
            return self
        trial, steps, began = copy.deepcopy(self), 0, time.perf_counter()
        while time.perf_counter() - began < WARM:
            trial.advance()
        began = time.perf_counter()
        while (seconds := time.perf_counter() - began) < TRIAL:
            trial.advance()
            steps += 1
        self.steps = max(round(self.config.minutes * 60 * steps / seconds), 1)
        return self

    def is_best(self) -> bool:
        """Return whether the last evaluation is better than all before."""
        scores = [self.score(point) for point in self.evaluations]
        return scores[-1] == max(scores) and scores.count(scores[-1]) == 1

    def save(self, path: Path) -> None:
        """Save the state."""
        tensors = {f"model.{key}": t for key, t in self.model.state_dict().items()}
        write_state(path, self.progress(), tensors | optimizer_tensors(self.optimizer))

    def resume(self: T, path: Path) -> T:
        """Load a state that ``save`` wrote; return itself."""
        record, tensors = read_state(path)
        self.model.load_state_dict(with_prefix("model.", tensors))
        restore_optimizer(self.optimizer, tensors)
        self.go_on(record)
        return self

    def provenance(self, **more: Any) -> dict[str, Any]:
        """Return a record of how the model was trained, with the last evaluation."""
        count = sum(p.numel() for p in self.model.parameters())
        return super().provenance(parameters=count, **self.evaluations[-1], **more)

    def generator(self, purpose: int, number: int) -> torch.Generator:
        """Create a generator for order (1), augmentation (2) or dropout (3) at a step or epoch."""
        seed = (self.config.seed * 8 + purpose) * 2**32 + number
        return torch.Generator().manual_seed(seed)
