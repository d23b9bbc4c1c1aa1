"""MetaConfig: the configuration of meta-training the paper's rule."""

from dataclasses import dataclass, field
from typing import Literal

from l2o_graph.paper.rule import PAPER, Model, RuleConfig
from l2o_graph.ranges import COUNT, COUNT_OR_NONE, NOT_NEGATIVE, SEED, check_choices, check_ranges

Estimator = Literal["greedy", "through_time"]


@dataclass(frozen=True, slots=True)
class MetaConfig:
    """Configuration of a run; the defaults are the recipe of Kofinas et al. 2024.

    There are 1,000 outer steps. Each trains a new network for 100 steps and sums up 100 one-step
    gradients, each on the batch of the update. No clipping, Adam at 3e-4 with L2 of 1e-4, cosine
    to 0 (section 4.3 and their supplement).

    Attributes:
        task: Name in ``meta_train.tasks.TASKS``.
        rule: Configuration of the learned optimizer.
        seed: Seed of the rule's weights and of the problems.
        outer_steps: Number of outer steps; with 0 the checkpoint is the untrained rule.
        estimator: Meta-gradient: "greedy" evaluates each update on its own batch, as in the paper;
            "through_time" is the exact gradient of all losses, with memory that grows with
            ``unroll``.
        unroll: Number of inner steps.
        lr: Peak learning rate of the meta-optimizer, with cosine decay to 0.
        weight_decay: Weight decay of the meta-optimizer, as L2.
        clip: Norm that a meta-gradient is clipped to; 0 for no clipping.
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
        check_ranges(
            self, seed=SEED, outer_steps=COUNT_OR_NONE, unroll=COUNT, lr=NOT_NEGATIVE,
            weight_decay=NOT_NEGATIVE, clip=NOT_NEGATIVE, evaluate_every=COUNT,
            evaluate_steps=COUNT, evaluate_seeds=COUNT, save_every=COUNT,
        )  # fmt: skip
        check_choices(self, estimator=Estimator)


def paper_recipe(task: str = "fmnist_cnn", model: Model = "ng_gnn") -> MetaConfig:
    """Configure the recipe of Kofinas et al. 2024 with their sizes of a model."""
    return MetaConfig(task=task, rule=PAPER[model])
