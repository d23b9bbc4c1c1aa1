"""What trainers of models that read networks share: epochs, random numbers, state, provenance."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from l2o_graph.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, SEED, SHARE, check_ranges
from meta_train.run import (
    commit,
    optimizer_tensors,
    read_state,
    restore_optimizer,
    starting,
    write_state,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochConfig:
    """What every run in epochs is configured by.

    Attributes:
        seed: Of a model's weights, of the order of networks and of everything drawn.
        epochs: Passes over the training split.
        batch: Networks in a step.
        lr: Rate of AdamW, once it is warm.
        warmup: Steps until then.
        cooldown: Share of all steps, the last ones, over which it falls to 0 again. The paper's
            recipe has none, and is for many more epochs.
        weight_decay: Decoupled.
        clip: Norm that a gradient is clipped to; 0 leaves it as it is.
        evaluate_every: Steps between evaluations.
        save_every: Steps between saved states.
    """

    seed: int = 0
    epochs: int
    batch: int
    lr: float = 1e-3
    warmup: int
    cooldown: float = 0.0
    weight_decay: float = 5e-4
    clip: float = 10.0
    evaluate_every: int
    save_every: int = 100

    def check_ranges(self, *sizes: str) -> None:
        """Refuse numbers that are out of their range.

        Args:
            sizes: Further fields that count something.

        Raises:
            ValueError: Naming the field.
        """
        check_ranges(
            self, seed=SEED, epochs=COUNT, batch=COUNT, lr=NOT_NEGATIVE, warmup=COUNT_OR_NONE,
            cooldown=SHARE, weight_decay=NOT_NEGATIVE, clip=NOT_NEGATIVE, evaluate_every=COUNT,
            save_every=COUNT, **dict.fromkeys(sizes, COUNT),
        )  # fmt: skip


def rate_at(config: EpochConfig, step: int, steps: int) -> float:
    """The rate of one step in so many, counted from 0."""
    warm = (step + 1) / max(config.warmup, 1)
    cool = (steps - step) / (config.cooldown * steps) if config.cooldown else 1.0
    return config.lr * min(1.0, warm, cool)


C = TypeVar("C", bound=EpochConfig)
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T", bound="EpochTrainer[Any, Any]")


class EpochTrainer(ABC, Generic[C, M]):
    """A run in progress, between two steps: most of a ``meta_train.run.Trainer``.

    What a step draws follows from the seed and the number of the step alone, so that there is no
    state of random numbers to save.

    Args:
        config: The run.
        model: What is trained, by AdamW with AMSGrad; where it lives.
        examples: Networks in an epoch.
        device: Where the model lives.
        data: What it is trained on, in words.
    """

    count = "step"

    def __init__(self, config: C, model: M, examples: int, device: torch.device, data: str):
        self.config, self.device, self.data = config, device, data
        self.model = model.to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            config.lr,
            weight_decay=config.weight_decay,
            amsgrad=True,
            fused=True,  # otherwise 1 in 20 of a small model's step on a CPU
        )
        # A last batch that is not full is left out; in the next epoch it is made of others.
        self.examples, self.per_epoch = examples, max(examples // config.batch, 1)
        self.step, self.steps = 0, config.epochs * self.per_epoch
        self.seconds = 0.0
        self.evaluations: list[dict[str, Any]] = []

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The run, as JSON holds it."""
        ...

    @abstractmethod
    def score(self, point: dict[str, Any]) -> float:
        """How good an evaluation is, by the validation split; more is better."""
        ...

    def is_best(self) -> bool:
        """Whether the last evaluation is better than all before."""
        scores = [self.score(point) for point in self.evaluations]
        return scores[-1] == max(scores) and scores.count(scores[-1]) == 1

    def save(self, path: Path) -> None:
        """Write all of it."""
        tensors = {f"model.{key}": t for key, t in self.model.state_dict().items()}
        record = {
            "config": self.settings,
            "step": self.step,
            "seconds": self.seconds,
            "evaluations": self.evaluations,
        }
        write_state(path, record, tensors | optimizer_tensors(self.optimizer))

    def resume(self: T, path: Path) -> T:
        """Take over a state that ``save`` wrote."""
        record, tensors = read_state(path)
        self.model.load_state_dict(starting("model.", tensors))
        restore_optimizer(self.optimizer, tensors)
        self.step, self.seconds = record["step"], record["seconds"]
        self.evaluations = record["evaluations"]
        return self

    def provenance(self) -> dict[str, Any]:
        """How the model came about, and what the last evaluation said of it."""
        return {
            "commit": commit(),
            "config": self.settings,
            "minutes": round(self.seconds / 60, 1),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "torch": torch.__version__,
            **self.evaluations[-1],
        }

    def epoch_and_batch(self) -> tuple[int, Int64[Tensor, " batch"]]:
        """The number of this step's epoch, and which networks it takes."""
        epoch, turn = divmod(self.step, self.per_epoch)
        order = torch.randperm(self.examples, generator=self.generator(1, epoch))
        return epoch, order[turn * self.config.batch : (turn + 1) * self.config.batch]

    def set_rate(self) -> float:
        """Give the optimizer this step's rate; returns it."""
        rate = rate_at(self.config, self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def generator(self, purpose: int, number: int) -> torch.Generator:
        """Random numbers for one purpose at one time; purpose 1 is the order of an epoch."""
        seed = (self.config.seed * 8 + purpose) * 2**32 + number
        return torch.Generator().manual_seed(seed)
