"""What a meta-training run is: the task, the recipe and the network, in one frozen record."""

from dataclasses import dataclass, field
from typing import Literal

from l2o_graph.rule import PAPER, Model, RuleConfig


@dataclass(frozen=True, slots=True)
class MetaConfig:
    """One run of the meta-trainer.

    Attributes:
        task: A name of ``meta_train.tasks.TASKS``.
        rule: The learned optimizer's network.
        seed: Of its weights, of the problems and of everything drawn.
        outer_steps: Updates of the meta-weights; with 0 the checkpoint is the untrained rule.
        estimator: "look_ahead" judges the direction of an update by the later batches of its
            segment, "greedy" a whole update by its own batch (the paper's), "through_time" all
            updates together by all losses of the segment, exactly; its memory grows with
            ``unroll``.
        unroll: Inner steps in a segment; one segment an outer step.
        snapshots: Inner steps of a segment whose updates are differentiated (look_ahead).
        trajectories: Networks in training at the same time; outer steps take turns on them.
        shortest: Least inner steps until a trajectory ends and a new one starts.
        longest: Most inner steps of it; its length is log-uniform between the two.
        pairs: Pairs of whole runs an outer step that judge the length of updates; 0 for none.
        vary: Train on variations of the task (widths, batch sizes) instead of the task itself.
        lr: Peak rate of the meta-optimizer; it warms up and then falls to 0 as a cosine.
        length_lr: The same for the per-tensor head.
        warmup: Outer steps of warming up.
        weight_decay: Of the meta-optimizer, decoupled unless ``greedy``.
        clip: Norm that a meta-gradient is clipped to; 0 leaves it as it is.
        evaluate_every: Outer steps between evaluations on held-out rollouts.
        evaluate_steps: Inner steps of such a rollout.
        evaluate_seeds: Rollouts in an evaluation.
        save_every: Outer steps between saved states.
    """

    task: str = "fmnist_cnn"
    rule: RuleConfig = field(default_factory=RuleConfig)
    seed: int = 0
    outer_steps: int = 40
    estimator: Literal["look_ahead", "greedy", "through_time"] = "look_ahead"
    unroll: int = 100
    snapshots: int = 10
    trajectories: int = 8
    shortest: int = 200
    longest: int = 2000
    pairs: int = 1
    vary: bool = True
    lr: float = 5e-4
    length_lr: float = 5e-2
    warmup: int = 10
    weight_decay: float = 1e-2
    clip: float = 1.0
    evaluate_every: int = 20
    evaluate_steps: int = 1000
    evaluate_seeds: int = 4
    save_every: int = 10

    def __post_init__(self) -> None:
        """Refuse what cannot run.

        Raises:
            ValueError: For a size that is not positive, more snapshots than steps, or pairs of runs
                for a rule without a per-tensor head.
        """
        sizes = (
            "unroll", "snapshots", "trajectories", "shortest",
            "evaluate_every", "evaluate_steps", "evaluate_seeds", "save_every",
        )  # fmt: skip
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if self.outer_steps < 0:
            raise ValueError(f"outer_steps: expected at least 0, found {self.outer_steps}")
        if self.snapshots > self.unroll:
            raise ValueError(
                f"snapshots: expected at most unroll = {self.unroll}, found {self.snapshots}"
            )
        if self.pairs < 0 or (self.pairs and self.rule.preset == "paper"):
            raise ValueError(f"pairs: expected 0 under 'paper', else 0 or more, found {self.pairs}")
        if self.longest < self.shortest:
            raise ValueError(
                f"longest: expected at least shortest = {self.shortest}, found {self.longest}"
            )


def default_recipe(task: str = "fmnist_cnn", model: Model = "ng_gnn") -> MetaConfig:
    """What the packaged checkpoints were made with.

    The paper's baselines see parameters, tensors and sums of rows and columns, but no matrix
    that could be made orthogonal: their nominal direction is the squashed momentum.
    """
    direction = "orthogonal" if model in ("ng_gnn", "ng_t") else "squashed"
    return MetaConfig(task=task, rule=RuleConfig(model=model, direction=direction))


def paper_recipe(task: str = "fmnist_cnn", model: Model = "ng_gnn") -> MetaConfig:
    """The recipe of Kofinas et al. 2024 (section 4.3 and their supplement).

    1,000 outer steps, each on a fresh network from its first step for 100 steps, the sum of 100
    one-step gradients on the batch that made the update, no clipping, Adam at 3e-4 with L2 of
    1e-4, cosine to 0.
    """
    return MetaConfig(
        task=task, rule=PAPER[model], outer_steps=1000, estimator="greedy", trajectories=1,
        shortest=100, longest=100, pairs=0, vary=False, lr=3e-4, warmup=0, weight_decay=1e-4,
        clip=0.0,
    )  # fmt: skip
