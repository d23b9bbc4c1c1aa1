"""EvolutionConfig: the configuration of meta-training a controller, and the families of tasks."""

from dataclasses import dataclass, field

from l2o_graph.optim.controller import ControllerConfig
from l2o_graph.ranges import (
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    check_ranges,
)

# Families of each task of the command line, in the order of their turns. Problems like common
# training, and the hardest ones, have several turns. No family rewards fitting all examples
# completely, because with few examples users want the opposite.
OF_IMAGES = (
    "image_cnn", "classifier", "cnn", "wide", "autoencoder", "siren", "image_cnn", "few_examples",
    "fine_tune", "wide",
)  # fmt: skip
CONTROLLER_TASKS: dict[str, tuple[str, ...]] = {
    "fmnist_cnn": OF_IMAGES,
    "general": (
        "image_cnn", "few_examples", "language", "autoencoder", "wide", "fine_tune", "patches",
        "classifier", "restore", "embedding", "few_examples", "language", "image_cnn", "regression",
        "wide", "full_cnn", "patches", "siren", "attention", "ill_posed", "restore", "few_examples",
        "recurrence", "language", "cnn",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class EvolutionConfig:
    """Configuration of a run.

    Attributes:
        task: Name in ``CONTROLLER_TASKS``.
        controller: Configuration of the controller.
        initial: Checkpoint with initial weights; "" for none.
        seed: Seed of the weights, of the courses and of everything else that is drawn.
        outer_steps: Number of outer steps.
        pairs: Number of instances of a course, over all processes.
        deviation: Standard deviation of the perturbations.
        span: Number of inner steps of a span.
        shortest: Smallest number of steps of a course.
        longest: Largest number of steps of a course. Starting with short courses would teach to
            shorten steps early, which long ones would have to unlearn.
        told: Fraction of the courses whose length the rule knows.
        lr: Peak learning rate, with warm-up and cosine decay to 0. Steps are proportional to
            gradient estimates, whose entries all have the same noise. Adam, which divides each
            entry by its own size, would amplify those that are only noise.
        weight_decay: Decoupled weight decay: a step removes lr * weight_decay of the weights.
        warmup: Number of outer steps of the warm-up.
        average: Number of outer steps, about, over which weights are averaged.
        kept: Fraction of the learned change that checkpoints keep. Estimates are noisy and come
            from small networks; for other networks, half of the change is better than all.
        evaluate_every: Number of outer steps between evaluations.
        evaluate_steps: Number of training steps of an evaluation.
        evaluate_pairs: Number of instances of each family in an evaluation.
        save_every: Number of outer steps between saved states.
    """

    task: str = "general"
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    initial: str = ""
    seed: int = 0
    outer_steps: int = 480
    pairs: int = 64
    deviation: float = 0.03
    span: int = 100
    shortest: int = 300
    longest: int = 1200
    told: float = 0.5
    lr: float = 0.01
    weight_decay: float = 0.1
    warmup: int = 20
    average: int = 100
    kept: float = 0.5
    evaluate_every: int = 480
    evaluate_steps: int = 300
    evaluate_pairs: int = 2
    save_every: int = 25

    def __post_init__(self) -> None:
        if self.task not in CONTROLLER_TASKS:
            raise ValueError(
                f"task: expected one of {sorted(CONTROLLER_TASKS)}, found '{self.task}'"
            )
        check_ranges(
            self, seed=SEED, outer_steps=COUNT_OR_NONE, pairs=COUNT,
            deviation=POSITIVE, span=COUNT, shortest=COUNT, longest=COUNT, told=SHARE, lr=POSITIVE,
            weight_decay=NOT_NEGATIVE, warmup=COUNT_OR_NONE, average=COUNT, kept=POSITIVE,
            evaluate_every=COUNT, evaluate_steps=COUNT, evaluate_pairs=COUNT, save_every=COUNT,
        )  # fmt: skip
        if self.longest < self.shortest:
            raise ValueError(
                f"longest: expected at least shortest = {self.shortest}, found {self.longest}"
            )
