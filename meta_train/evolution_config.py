"""What a run of meta-training of a controller is, and which families its tasks train on."""

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

# Families that each task of the command line trains on, in turn; what is like most people's
# training, and what is hardest, comes more often. None asks to fit examples to the end: people with
# few examples ask for the opposite.
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
    """One run of meta-training.

    Attributes:
        task: A name of ``CONTROLLER_TASKS``.
        controller: Controller that is trained.
        initial: Checkpoint whose weights it begins with; "" for none.
        seed: Seed of the weights, of the courses and of everything drawn.
        outer_steps: Number of steps of the weights.
        pairs: Number of instances of a course, in all processes together.
        deviation: Standard deviation of the perturbations.
        span: Number of training steps between two steps of the weights.
        shortest: Least number of steps of a course.
        longest: Most number of steps of a course. Courses that are short at first teach to shorten
            steps early, which long ones then have to unlearn.
        told: Fraction of the courses that are told their length.
        lr: Peak learning rate; it warms up and falls to 0 as a cosine. Steps are in proportion to
            estimates, all of whose entries have the same noise: Adam, which divides each by its
            own size, would lift those that are noise alone to the size of those that are not.
        weight_decay: Fraction of the weights, over the learning rate, that a step takes away.
        warmup: Number of outer steps of warming up.
        average: Number of the last outer steps, about, whose weights are averaged.
        kept: Fraction of what was learned that checkpoints have. Estimates are noisy and of small
            networks: for others, half of it is better than all.
        evaluate_every: Number of outer steps between evaluations.
        evaluate_steps: Number of training steps of an evaluation.
        evaluate_pairs: Number of instances of each family in an evaluation.
        save_every: Number of outer steps between saved states.
    """

    task: str = "general"
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    initial: str = ""
    seed: int = 0
    outer_steps: int = 600
    pairs: int = 48
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
    evaluate_every: int = 600
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
