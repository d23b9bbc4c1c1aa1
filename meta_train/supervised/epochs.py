"""What trainers of models that read networks share: epochs, random numbers, state, provenance."""

import copy
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from l2o_graph.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, SEED, SHARE, Range, check_ranges
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
    """What every run in epochs is configured by.

    Attributes:
        seed: Seed of a model's weights, of the order of networks and of everything drawn.
        epochs: Number of passes over the training split.
        minutes: Time that a run is to take instead of a number of epochs, by that of its first
            steps; 0 for ``epochs``.
        batch: Number of networks in a step.
        lr: Learning rate of AdamW after its warm-up.
        warmup: Number of steps over which the learning rate grows to ``lr``.
        cooldown: Fraction of all steps, the last ones, over which it falls to 0 again. The paper's
            recipe has none, and is for many more epochs.
        weight_decay: Weight decay of AdamW.
        clip: Norm that a gradient is clipped to; 0 leaves it as it is.
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

    def check_ranges(self, **more: Range) -> None:
        """Refuse numbers that are out of their range, those of further fields as well."""
        check_ranges(
            self, seed=SEED, epochs=COUNT, minutes=NOT_NEGATIVE, batch=COUNT, lr=NOT_NEGATIVE,
            warmup=COUNT_OR_NONE, cooldown=SHARE, weight_decay=NOT_NEGATIVE, clip=NOT_NEGATIVE,
            evaluate_every=COUNT, save_every=COUNT, **more,
        )  # fmt: skip


def rate_at(config: EpochConfig, step: int, steps: int) -> float:
    """The rate of one step in so many, counted from 0."""
    warm = (step + 1) / max(config.warmup, 1)
    cool = (steps - step) / (config.cooldown * steps) if config.cooldown else 1.0
    return config.lr * min(1.0, warm, cool)


def in_words(point: Mapping[str, Any], name: str, form: str) -> str:
    """Say what an evaluation found on the validation split, and on the test split if it did."""
    said = form.format(point[f"val_{name}"])
    test = point.get(f"test_{name}")
    return said if test is None else f"{said} (test {form.format(test)})"


# Seconds of steps that are timed, after others that are not.
TRIAL, WARM = 2.0, 1.0

T = TypeVar("T", bound="EpochTrainer")


class EpochTrainer(Trainer):
    """A run in progress, between two steps, of what ``make`` makes, by AdamW with AMSGrad.

    What a step draws follows from the seed and the number of the step alone, so that there is no
    state of random numbers to save. An epoch has so many ``examples``; ``data`` is what they are,
    in words.
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
        # A last batch that is not full is left out; in the next epoch it is made of others.
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
            fused=True,  # otherwise 1 in 20 of a small model's step on a CPU
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The run, as JSON holds it."""
        record = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        return {**record, "model": record["model"].to_json(), "data": self.data}

    @abstractmethod
    def descend(self, index: Int64[Tensor, " batch"]) -> dict[str, float]:
        """Add gradients of the mean "loss" on some networks; a classifier also has "accuracy"."""

    @abstractmethod
    def measure(self, split: str) -> dict[str, float]:
        """Judge the model on the split "val" or "test"."""

    @abstractmethod
    def save_shown(self, path: Path) -> None:
        """Write what there is to see of the test split beside a model, after it was measured."""

    @abstractmethod
    def score(self, point: dict[str, Any]) -> float:
        """How good an evaluation is, by the validation split; more is better."""

    def advance(self) -> dict[str, Any]:
        """Do a step; returns what there is to log of it."""
        epoch, turn = divmod(self.step, self.per_epoch)
        order = torch.randperm(self.examples, generator=self.generator(1, epoch))
        index = order[turn * self.config.batch : (turn + 1) * self.config.batch]
        rate = rate_at(self.config, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.generator(3, self.step).initial_seed())  # of the dropout
            self.model.train()
            self.optimizer.zero_grad()
            found = self.descend(index)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip or torch.inf)
        self.optimizer.step()
        self.step += 1
        more = {"gradient_norm": norm.item(), "lr": rate}
        return {"step": self.step, "epoch": epoch, **found, **more}

    def evaluate(self) -> dict[str, Any]:
        """Judge the model on the validation split, and remember the outcome."""
        found = {f"val_{key}": value for key, value in self.measure("val").items()}
        self.evaluations.append({"step": self.step, **found})
        return self.evaluations[-1]

    def judge(self, best: Path) -> dict[str, Any]:
        """Measure the best model on the test split, which nothing read before, and say so in it."""
        self.model.load_state_dict(type(self.model).from_checkpoint(best).state_dict())
        point = max(self.evaluations, key=self.score)  # of equals the first, as ``is_best``
        found = {f"test_{key}": value for key, value in self.measure("test").items()}
        self.evaluations.append(point | found)
        self.save_best(best)
        self.save_shown(best)
        return self.evaluations[-1]

    def run(self, out: Path, resume: bool) -> Result:
        """Train to the end, from the start or, with ``resume``, from the state in a folder.

        Raises:
            ValueError, OSError: As ``meta_train.run.prepared``.
        """
        with prepared(out, self.settings, resume, self.resume, self.planned) as trainer:
            result = drive(trainer, out)
            if result.finished and result.checkpoint is not None:
                point = trainer.judge(result.checkpoint)
                record_point(result.log, point)
                print(f"step {point['step']}, the best: {self.describe(point)}")
            return result

    def planned(self: T) -> T:
        """Itself, with a number of steps by the time of some, which are not part of the run."""
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
        """Whether the last evaluation is better than all before."""
        scores = [self.score(point) for point in self.evaluations]
        return scores[-1] == max(scores) and scores.count(scores[-1]) == 1

    def save(self, path: Path) -> None:
        """Write all of it."""
        tensors = {f"model.{key}": t for key, t in self.model.state_dict().items()}
        write_state(path, self.progress(), tensors | optimizer_tensors(self.optimizer))

    def resume(self: T, path: Path) -> T:
        """Take over a state that ``save`` wrote."""
        record, tensors = read_state(path)
        self.model.load_state_dict(with_prefix("model.", tensors))
        restore_optimizer(self.optimizer, tensors)
        self.go_on(record)
        return self

    def provenance(self, **more: Any) -> dict[str, Any]:
        """How the model came about, and what the last evaluation said of it."""
        count = sum(p.numel() for p in self.model.parameters())
        return super().provenance(parameters=count, **self.evaluations[-1], **more)

    def generator(self, purpose: int, number: int) -> torch.Generator:
        """Random numbers for one purpose at one time; purpose 1 is the order of an epoch."""
        seed = (self.config.seed * 8 + purpose) * 2**32 + number
        return torch.Generator().manual_seed(seed)
