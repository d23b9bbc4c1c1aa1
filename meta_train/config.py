"""What a run of meta-training is, in a frozen record: of the paper's rule, and of a controller."""

from dataclasses import dataclass, field
from typing import Literal

from l2o_graph.optim.controller import ControllerConfig
from l2o_graph.paper.rule import PAPER, Model, RuleConfig
from l2o_graph.ranges import (
    COUNT,
    COUNT_OR_NONE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    check_choices,
    check_ranges,
)

Estimator = Literal["greedy", "through_time"]


@dataclass(frozen=True, slots=True)
class MetaConfig:
    """One run of the meta-trainer: the defaults are the recipe of Kofinas et al. 2024.

    1,000 outer steps, each on a fresh network from its first step for 100 steps, the sum of 100
    one-step gradients on the batch that made the update, no clipping, Adam at 3e-4 with L2 of
    1e-4, cosine to 0 (section 4.3 and their supplement).

    Attributes:
        task: A name of ``meta_train.tasks.TASKS``.
        rule: The learned optimizer's network.
        seed: Seed of the rule's weights and of the problems.
        outer_steps: Number of steps of the meta-weights; with 0 the checkpoint is the untrained
            rule.
        estimator: "greedy" judges an update by its own batch, as the paper does, "through_time"
            all updates together by all losses, exactly; its memory grows with ``unroll``.
        unroll: Number of steps that a network is trained for.
        lr: Peak learning rate of the meta-optimizer; it falls to 0 as a cosine.
        weight_decay: Weight decay of the meta-optimizer, as L2.
        clip: Norm that a meta-gradient is clipped to; 0 leaves it as it is.
        evaluate_every: Number of outer steps between evaluations on held-out rollouts.
        evaluate_steps: Number of training steps of such a rollout.
        evaluate_seeds: Number of rollouts in an evaluation.
        save_every: Number of outer steps between saved states.
    """

    task: str = "fmnist_cnn"
    rule: RuleConfig = field(default_factory=RuleConfig)
    seed: int = 0
    outer_steps: int = 1000
    estimator: Estimator = "greedy"
    unroll: int = 100
    lr: float = 3e-4
    weight_decay: float = 1e-4
    clip: float = 0.0
    evaluate_every: int = 20
    evaluate_steps: int = 1000
    evaluate_seeds: int = 4
    save_every: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot run.

        Raises:
            ValueError: For a number out of its range, and for an unknown estimator.
        """
        check_ranges(
            self, seed=SEED, outer_steps=COUNT_OR_NONE, unroll=COUNT, lr=NOT_NEGATIVE,
            weight_decay=NOT_NEGATIVE, clip=NOT_NEGATIVE, evaluate_every=COUNT,
            evaluate_steps=COUNT, evaluate_seeds=COUNT, save_every=COUNT,
        )  # fmt: skip
        check_choices(self, estimator=Estimator)


def paper_recipe(task: str = "fmnist_cnn", model: Model = "ng_gnn") -> MetaConfig:
    """The recipe of Kofinas et al. 2024 with their sizes of a model."""
    return MetaConfig(task=task, rule=PAPER[model])


# Families that each task of the command line trains on, in turn; what is like most people's
# training, and what is hardest, comes more often. "memorise" is in none: it asks to fit examples to
# the end, and people with few examples ask for the opposite.
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
