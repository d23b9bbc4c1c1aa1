"""The outer loop: pick a trajectory, unroll a segment, step the meta-weights; log, save, resume."""

import dataclasses
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from l2o_graph.rule import RuleConfig, UpdateRule, untrained
from l2o_graph.step import State
from l2o_graph.zoo.registry import save_checkpoint
from meta_train.config import MetaConfig
from meta_train.evolution import evolve
from meta_train.run import (
    Result,
    begin,
    commit,
    drive,
    optimizer_tensors,
    prepare,
    read_state,
    restore_optimizer,
    starting,
    write_state,
)
from meta_train.tasks import Problem, Task, get_task
from meta_train.through_time import through_time
from meta_train.unroll import Trajectory, greedy, look_ahead, roll_out

# A segment whose mean loss is this many times that of guessing has left the road.
LOST = 1.5
GUESSING = math.log(10)

# Held-out rollouts start from seeds that neither training (1,000 and up) nor the benchmark
# (101 to 105) uses.
HELD_OUT_SEED = 1
TRAINING_SEED = 1000


class MetaTrainer:
    """A run in progress, between two outer steps: a ``meta_train.run.Trainer``.

    Args:
        config: The run.
        device: Where networks and meta-weights live.
        data: What it is trained on, in words.
    """

    count = "outer_step"

    def __init__(self, config: MetaConfig, device: torch.device, data: str = ""):
        self.config, self.device, self.data = config, device, data
        self.task: Task = get_task(config.task)
        self.rule: UpdateRule = untrained(config.rule, config.seed).to(device)
        kind = torch.optim.Adam if config.estimator == "greedy" else torch.optim.AdamW
        self._peaks = (config.lr, config.length_lr)
        groups = [
            {"params": self.rule.of_direction(), "weight_decay": config.weight_decay},
            {"params": self.rule.of_length(), "weight_decay": 0.0},
        ]
        self.optimizer = kind(groups, lr=config.lr, betas=(0.9, 0.99))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step, self.steps = 0, config.outer_steps
        self.started = 0  # trajectories so far
        self.seconds = 0.0
        self.evaluations: list[dict[str, Any]] = []
        self.trajectories: list[Trajectory] = []
        self.problems: list[Problem] = []

    @property
    def settings(self) -> dict[str, Any]:
        """The run, as JSON holds it."""
        return asdict(self.config)

    def begin(self) -> "MetaTrainer":
        """Start all trajectories, at staggered ages: the first ones end early."""
        for _ in range(self.config.trajectories):
            problem, trajectory = self._new_trajectory()
            stagger = float(torch.rand((), generator=self.generator))
            trajectory.length = max(math.ceil(trajectory.length * stagger), self.config.unroll)
            self.problems.append(problem)
            self.trajectories.append(trajectory)
        return self

    def advance(self) -> dict[str, Any]:
        """One outer step; returns what there is to log of it."""
        config, begin = self.config, time.perf_counter()
        turn = self.step % config.trajectories
        problem, trajectory = self.problems[turn], self.trajectories[turn]
        age = trajectory.age
        self.optimizer.zero_grad()
        if config.estimator == "greedy":
            losses = greedy(self.rule, problem, trajectory, config.unroll)
        elif config.estimator == "through_time":
            losses = through_time(self.rule, problem, trajectory, config.unroll)
        else:
            losses = look_ahead(
                self.rule, problem, trajectory, config.unroll, config.snapshots, self.generator
            )
        pairs = [self._pair() for _ in range(config.pairs)]
        # The two groups differ in how their gradients come about, and so in scale.
        norm, length_norm = (
            float(torch.nn.utils.clip_grad_norm_(group["params"], config.clip or math.inf))
            for group in self.optimizer.param_groups
        )
        loss = sum(losses) / len(losses)
        sound = math.isfinite(norm) and math.isfinite(loss)
        share = self._share_of_peak()
        if sound:
            for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = peak * share
            self.optimizer.step()
        lost = config.estimator != "greedy" and loss > LOST * GUESSING
        if not sound or lost or trajectory.age >= trajectory.length:
            self.problems[turn], self.trajectories[turn] = self._new_trajectory()
        self.step += 1
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        return {
            "outer_step": self.step, "age": age, "loss": loss, "gradient_norm": norm,
            "length_gradient_norm": length_norm, "lr": config.lr * share,
            "pairs": pairs, "skipped": float(not sound), "seconds": seconds,
        }  # fmt: skip

    def _pair(self) -> tuple[float, float]:
        """Train a fresh problem twice, for the gradient of the lengths."""
        problem, trajectory = self._new_trajectory()
        return evolve(self.rule, problem, trajectory.length, self.generator)

    def evaluate(self) -> dict[str, Any]:
        """Train the task itself from held-out seeds, and remember the outcome."""
        begin = time.perf_counter()
        config, final, accuracy = self.config, [], []
        for seed in range(HELD_OUT_SEED, HELD_OUT_SEED + config.evaluate_seeds):
            problem = self.task.problem(seed, self.device)
            losses, parameters = roll_out(self.rule, problem, config.evaluate_steps)
            last = losses[-100:]
            final.append(sum(last) / len(last))
            accuracy.append(problem.accuracy(parameters))
        self.seconds += time.perf_counter() - begin
        mean = sum(final) / len(final)
        point = {
            "outer_step": self.step,
            "held_out_loss": mean if math.isfinite(mean) else math.inf,
            "held_out_accuracy": sum(accuracy) / len(accuracy),
        }
        self.evaluations.append(point)
        return point

    def is_best(self) -> bool:
        """Whether the last evaluation is the best since training began.

        By training loss: no test image votes. The untrained rule is no candidate, unless no
        training was asked for.
        """
        first = min(self.config.outer_steps, 1)
        losses = [p["held_out_loss"] for p in self.evaluations if p["outer_step"] >= first]
        return bool(losses) and self.evaluations[-1]["held_out_loss"] == min(losses)

    def save(self, path: Path) -> None:
        """Write all of it."""
        tensors = {f"rule.{k}": v for k, v in self.rule.state_dict().items()}
        tensors["generator"] = self.generator.get_state()
        for i, t in enumerate(self.trajectories):
            for j, (p, s) in enumerate(zip(t.parameters, t.state, strict=True)):
                tensors[f"trajectory.{i}.{j}.parameter"] = p
                tensors[f"trajectory.{i}.{j}.momenta"] = s.momenta
                tensors[f"trajectory.{i}.{j}.step"] = s.step
        record = {
            "config": asdict(self.config),
            "outer_step": self.step,
            "started": self.started,
            "seconds": self.seconds,
            "curve": self.evaluations,
            "trajectories": [(t.seed, t.length, t.age) for t in self.trajectories],
        }
        write_state(path, record, tensors | optimizer_tensors(self.optimizer))

    def save_best(self, path: Path) -> None:
        """Write the learned optimizer as it is, a checkpoint."""
        save_checkpoint(path, self.rule, _provenance(self))

    @staticmethod
    def resume(path: Path, device: torch.device, data: str = "") -> "MetaTrainer":
        """Read a state that ``save`` wrote; the task's data has to be loaded."""
        record, tensors = read_state(path)
        config = record["config"]
        trainer = MetaTrainer(
            MetaConfig(**{**config, "rule": RuleConfig(**config["rule"])}), device, data
        )
        trainer.rule.load_state_dict(starting("rule.", tensors))
        trainer.generator.set_state(tensors["generator"])
        restore_optimizer(trainer.optimizer, tensors)
        trainer.step, trainer.evaluations = record["outer_step"], record["curve"]
        trainer.started, trainer.seconds = record["started"], record["seconds"]
        for i, (seed, length, age) in enumerate(record["trajectories"]):
            problem = trainer._problem(seed)
            parameters, state = [], []
            for j in range(len(problem.spec.shapes)):
                at = f"trajectory.{i}.{j}."
                p, m, s = (tensors[at + key].to(device) for key in ("parameter", "momenta", "step"))
                parameters.append(p)
                state.append(State(m, s))
            trainer.problems.append(problem)
            trainer.trajectories.append(Trajectory(seed, length, age, parameters, state))
        return trainer

    def _share_of_peak(self) -> float:
        """How much of their peak the rates have: a linear warm-up, then a cosine to 0."""
        step, config = self.step, self.config
        if step < config.warmup:
            return (step + 1) / config.warmup
        progress = (step - config.warmup) / max(config.outer_steps - config.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * progress))

    def _problem(self, seed: int) -> Problem:
        make = self.task.variation if self.config.vary else self.task.problem
        return make(seed, self.device)

    def _new_trajectory(self) -> tuple[Problem, Trajectory]:
        """A fresh problem, for a log-uniform number of inner steps."""
        seed = TRAINING_SEED + 100_000 * self.config.seed + self.started
        self.started += 1
        draw = float(torch.rand((), generator=self.generator))
        shortest, longest = self.config.shortest, self.config.longest
        length = round(shortest * (longest / shortest) ** draw)
        problem = self._problem(seed)
        return problem, Trajectory.start(problem, seed, length)


def meta_train(
    config: MetaConfig,
    out: Path,
    data_root: str | Path | None = None,
    device: str = "cpu",
    resume: bool = False,
) -> Result:
    """Meta-train a learned optimizer.

    Args:
        config: The run. When resuming, that of the saved state has to be the same.
        out: Folder for ``state.safetensors``, ``log.jsonl`` and ``checkpoint.safetensors``.
        data_root: Where datasets lie.
        device: Where networks and meta-weights live.
        resume: Continue from the state in ``out`` if there is one.

    Returns:
        Where everything is. Ctrl-C ends the run after the outer step it is in, state saved.

    Raises:
        ValueError: For an unknown task, or a state of another configuration.
        FileExistsError: When ``out`` holds a run and ``resume`` is off.
        OSError: When ``out`` cannot be written.
        DatasetNotFoundError: When the data is absent.
    """
    task = get_task(config.task)
    settings = asdict(config)
    state = prepare(out, settings, resume)
    data, place = task.load(data_root), torch.device(device)
    trainer = begin(
        state,
        settings,
        resume=lambda path: MetaTrainer.resume(path, place, data),
        new=lambda: MetaTrainer(config, place, data).begin(),
    )

    def describe(point: dict[str, Any]) -> str:
        accuracy = 100 * point["held_out_accuracy"]
        return f"held-out loss {point['held_out_loss']:.4f}, accuracy {accuracy:.2f} %"

    return drive(trainer, state, config.evaluate_every, config.save_every, describe)


def _provenance(trainer: MetaTrainer) -> dict[str, Any]:
    return {
        "command": "python -m meta_train " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "data": trainer.data,
        "config": dataclasses.asdict(trainer.config),
        "outer_steps": trainer.step,
        "minutes": round(trainer.seconds / 60, 1),
        "torch": torch.__version__,
        "curve": trainer.evaluations,
    }
