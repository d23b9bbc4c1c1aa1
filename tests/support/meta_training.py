"""Meta-training that takes a second: few pairs, few steps, families that are cheap to draw."""

from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from l2o_graph.optim.controller import ControllerConfig
from meta_train import controller_training
from meta_train.controller_training import (
    CONTROLLER_TASKS,
    ControllerTrainer,
    EvolutionConfig,
    train_controller,
)
from meta_train.run import Result

FAMILIES = ("regression", "ill_posed")


@contextmanager
def little():
    """A task "little" of these families, and one family to compare designs on."""
    with (
        patch.dict(CONTROLLER_TASKS, little=FAMILIES),
        patch.object(controller_training, "HELD_OUT", ("pinn",)),
    ):
        yield


with little():
    TINY = EvolutionConfig(
        "little", ControllerConfig(channels=2), outer_steps=8, pairs=2, span=5,
        shortest=5, longest=10, warmup=2, average=3, evaluate_every=5, evaluate_steps=5,
        evaluate_pairs=1, save_every=2,
    )  # fmt: skip


def train(config: EvolutionConfig, data, out: Path, resume: bool = False) -> Result:
    with little():
        return train_controller(config, out, data, resume)


def trainer_of(config: EvolutionConfig, data) -> ControllerTrainer:
    with little():
        return ControllerTrainer(config, data).begin()
