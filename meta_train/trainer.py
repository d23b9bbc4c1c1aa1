"""Meta-training of the paper's rule: the outer loop, with logging, saving and resuming."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from l2o_graph.paper.checkpoints import save_checkpoint
from l2o_graph.paper.rule import RuleConfig, UpdateRule, untrained
from meta_train.config import MetaConfig
from meta_train.run import (
    Result,
    Trainer,
    drive,
    optimizer_tensors,
    prepared,
    read_state,
    restore_optimizer,
    with_prefix,
    write_state,
)
from meta_train.tasks import Task, get_task
from meta_train.unroll import greedy, roll_out, through_time

# Seeds of held-out rollouts are used neither in training (1,000 and up) nor in the benchmark (101
# to 105).
HELD_OUT_SEED = 1
TRAINING_SEED = 1000

ESTIMATORS = {"greedy": greedy, "through_time": through_time}


class MetaTrainer(Trainer):
    """State of a run between two outer steps; ``data`` describes the training data."""

    config: MetaConfig
    count = "outer_step"

    def __init__(self, config: MetaConfig, device: torch.device, data: str = ""):
        super().__init__(config, config.outer_steps)
        self.device, self.data = device, data
        self.task: Task = get_task(config.task)
        self.rule: UpdateRule = untrained(config.rule, config.seed).to(device)
        self.optimizer = torch.optim.Adam(
            self.rule.parameters(), lr=config.lr, betas=(0.9, 0.99),
            weight_decay=config.weight_decay,
        )  # fmt: skip

    def advance(self) -> dict[str, Any]:
        """Make an outer step; return a record to log."""
        config = self.config
        seed = TRAINING_SEED + 100_000 * config.seed + self.step
        problem = self.task.problem(seed, self.device)
        self.optimizer.zero_grad()
        losses = ESTIMATORS[config.estimator](self.rule, problem, config.unroll)
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.rule.parameters(), config.clip or math.inf)
        )
        loss = sum(losses) / len(losses)
        sound = math.isfinite(norm) and math.isfinite(loss)
        lr = config.lr * 0.5 * (1 + math.cos(math.pi * self.step / max(self.steps, 1)))
        if sound:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.step += 1
        return {
            "outer_step": self.step, "loss": loss, "gradient_norm": norm, "lr": lr,
            "skipped": float(not sound),
        }  # fmt: skip

    def evaluate(self) -> dict[str, Any]:
        """Train the task from held-out seeds, and append the result to ``evaluations``."""
        config, final, accuracy = self.config, [], []
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + config.evaluate_seeds):
            problem = self.task.problem(seed, self.device)
            losses, parameters = roll_out(self.rule, problem, config.evaluate_steps)
            last = losses[-100:]
            final.append(sum(last) / len(last))
            accuracy.append(problem.accuracy(parameters))
        mean = sum(final) / len(final)
        point = {
            "outer_step": self.step,
            "held_out_loss": mean if math.isfinite(mean) else math.inf,
            "held_out_accuracy": sum(accuracy) / len(accuracy),
        }
        self.evaluations.append(point)
        return point

    def describe(self, point: dict[str, Any]) -> str:
        """Describe the result of an evaluation."""
        accuracy = 100 * point["held_out_accuracy"]
        return f"held-out loss {point['held_out_loss']:.4f}, accuracy {accuracy:.2f} %"

    def is_best(self) -> bool:
        """Return whether the last evaluation is the best since the first outer step.

        The criterion is the training loss, without test images. The untrained rule only counts if
        there are no outer steps.
        """
        first = min(self.config.outer_steps, 1)
        losses = [p["held_out_loss"] for p in self.evaluations if p["outer_step"] >= first]
        return bool(losses) and self.evaluations[-1]["held_out_loss"] == min(losses)

    def save(self, path: Path) -> None:
        """Save the state."""
        tensors = {f"rule.{k}": v for k, v in self.rule.state_dict().items()}
        write_state(path, self.progress(), tensors | optimizer_tensors(self.optimizer))

    def save_best(self, path: Path) -> None:
        """Save a checkpoint of the rule."""
        more = {"outer_steps": self.step, "curve": self.evaluations, "data": self.data}
        save_checkpoint(path, self.rule, self.provenance(**more))

    @staticmethod
    def resume(path: Path, device: torch.device, data: str = "") -> "MetaTrainer":
        """Load a state that ``save`` wrote; the task's data has to be loaded before."""
        record, tensors = read_state(path)
        config = record["config"]
        trainer = MetaTrainer(
            MetaConfig(**{**config, "rule": RuleConfig(**config["rule"])}), device, data
        )
        trainer.rule.load_state_dict(with_prefix("rule.", tensors))
        restore_optimizer(trainer.optimizer, tensors)
        trainer.go_on(record)
        return trainer


def meta_train(
    config: MetaConfig,
    out: Path,
    data_root: str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
) -> Result:
    """Meta-train the paper's rule. Ctrl-C saves the state after the current outer step and stops.

    Args:
        config: Configuration of the run; when resuming, the same as that of the saved state.
        out: Folder for ``state.safetensors``, ``log.jsonl`` and ``checkpoint.safetensors``.
        data_root: Folder of datasets.
        device: Device of networks and meta-weights.
        resume: Whether to continue from the state in ``out`` if there is one.

    Raises:
        DatasetNotFoundError: If the data is missing.
        ValueError, OSError: For an unknown task, and as ``meta_train.run.prepared``.
    """
    task, place = get_task(config.task), torch.device(device)
    with prepared(
        out,
        asdict(config),
        resume,
        saved=lambda path: MetaTrainer.resume(path, place, task.load(data_root)),
        new=lambda: MetaTrainer(config, place, task.load(data_root)),
    ) as trainer:
        return drive(trainer, out)
