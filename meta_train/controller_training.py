"""Meta-training of a controller: each outer step advances the course of one family by a span.

    torchrun --nproc-per-node 2 -m meta_train --task general

Several processes divide the instances of every course. Only scores are exchanged, and all
processes make the same outer step.
"""

import math
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from l2o_graph.optim.checkpoints import load_checkpoint, save_controller
from l2o_graph.optim.controller import Controller, ControllerConfig, weights_from
from l2o_graph.ranges import COUNT_OR_NONE
from meta_train import evolution
from meta_train.course import (
    LEAST_LOSS,
    MOST_LOSS,
    Course,
    Draw,
    restore_course,
    score,
    start,
    tensors_of_course,
)
from meta_train.evolution_config import CONTROLLER_TASKS, EvolutionConfig
from meta_train.families import FAMILIES, HELD_OUT
from meta_train.parsing import parsed
from meta_train.run import (
    Result,
    Trainer,
    copy_in,
    drive,
    prepared,
    read_state,
    with_prefix,
    write_state,
)

VALIDATION_SEED = 7
# Gradients are averaged over about as many outer steps as there are families, because each is the
# gradient for one family.
MOMENTUM = 0.95
# A course is abandoned if more than this fraction of its networks reach the cap of the losses.
MOST_LOST = 0.5


class ControllerTrainer(Trainer):
    """State of a meta-training run between two outer steps."""

    config: EvolutionConfig
    count = "outer_step"

    def __init__(self, config: EvolutionConfig, data_root: str | Path | None = None):
        super().__init__(config, config.outer_steps)
        self.data_root = data_root
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            controller = Controller(config.controller)
        if config.initial:
            controller = load_checkpoint(config.initial).controller
            if controller.config != config.controller:
                raise ValueError(
                    f"initial: expected a checkpoint of {config.controller}, found one of "
                    f"{controller.config}"
                )
        self.first = controller.vector()
        self.weights = self.first.clone()
        self.average = self.weights.clone()
        self.velocity = torch.zeros_like(self.weights)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.families = CONTROLLER_TASKS[config.task]
        self.started = 0
        self.courses: list[Course] = []

    def mine(self, pairs: int) -> slice:
        """Return the range of this process among the instances."""
        if not dist.is_initialized():
            return slice(None)
        rank, world = dist.get_rank(), dist.get_world_size()
        return slice(pairs * rank // world, pairs * (rank + 1) // world)

    @property
    def kept(self) -> Tensor:
        """Weights of a checkpoint: between the initial weights and the average."""
        return self.first.lerp(self.average, self.config.kept)

    def begin(self) -> "ControllerTrainer":
        """Start a course of each family."""
        for family in self.families:
            self.courses.append(self._start(self._draw(family)))
        return self

    def advance(self) -> dict[str, Any]:
        """Advance the next course by a span and step the weights; return a record to log."""
        config = self.config
        turn = self.step % len(self.courses)
        course = self.courses[turn]
        draw, age = course.draw, course.age
        pairs = self._pairs(draw.family)
        noise = evolution.perturbations(draw.seed, pairs, config.controller.size)
        vectors = evolution.perturbed(self.weights, noise[self.mine(pairs)], config.deviation)
        losses = course.span(
            config.controller, weights_from(config.controller, vectors), config.span
        )
        scores = scores_of_all(torch.stack([score(losses), losses[-1]]))
        estimate, difference = evolution.gradient(scores[0], noise)
        lr = config.lr * self._share_of_peak()
        # Later spans count more: early ones favour fast progress, not good results.
        self.velocity.lerp_(estimate * (course.age / draw.length), 1 - MOMENTUM)
        self.weights.mul_(1 - lr * config.weight_decay).sub_(self.velocity, alpha=lr)
        self.step += 1
        self.average.lerp_(self.weights, 1 / min(self.step, config.average))
        lost = float((scores[1] >= MOST_LOSS).float().mean())
        if course.ended or lost > MOST_LOST:
            self.courses[turn] = self._start(self._draw(draw.family))
        return {
            "outer_step": self.step, "family": draw.family, "age": age, "length": draw.length,
            "told": float(draw.told), "loss": float(scores[0].mean()), "difference": difference,
            "gradient_norm": float(estimate.norm()), "lost": lost, "lr": lr,
        }  # fmt: skip

    def evaluate(self) -> dict[str, Any]:
        """Train validation networks from start to end with the weights of a checkpoint."""
        config, weights = self.config, self.kept

        def score_of(family: str) -> float:
            losses = [
                validation_losses(
                    config.controller, weights, family, seed, config.evaluate_pairs,
                    config.evaluate_steps, data_root=self.data_root,
                )
                for seed in (VALIDATION_SEED, VALIDATION_SEED + 1)
            ]  # fmt: skip
            return fmean(map(mean_log_of_last, losses))

        found = {f: score_of(f) for f in dict.fromkeys((*self.families, *HELD_OUT))}
        seen = [found[family] for family in dict.fromkeys(self.families)]
        unseen = [found[family] for family in HELD_OUT]
        point = {
            "outer_step": self.step,
            "score": sum(seen) / len(seen),
            "held_out_score": sum(unseen) / len(unseen),
            "scores": found,
        }
        self.evaluations.append(point)
        return point

    def describe(self, point: dict[str, Any]) -> str:
        """Describe the result of an evaluation."""
        return f"score {point['score']:.4f}, on held-out families {point['held_out_score']:.4f}"

    def is_best(self) -> bool:
        """Return True: the last weights are the best, because they are averages."""
        return True

    def save(self, path: Path) -> None:
        """Save the state; of several processes, each saves its own part."""
        tensors = {
            "weights": self.weights,
            "average": self.average,
            "velocity": self.velocity,
            "generator": self.generator.get_state(),
        }
        for i, course in enumerate(self.courses):
            tensors |= {f"course.{i}.{k}": t for k, t in tensors_of_course(course).items()}
        record = {
            **self.progress(),
            "started": self.started,
            "draws": [asdict(course.draw) for course in self.courses],
            "ages": [course.age for course in self.courses],
        }
        write_state(path, record, tensors)

    def save_best(self, path: Path) -> None:
        """Save a checkpoint of the controller with averaged weights."""
        controller = Controller(self.config.controller)
        controller.set_vector(self.kept)
        more = {"outer_steps": self.step, "curve": self.evaluations}
        save_controller(path, controller, self.provenance(**more))

    @staticmethod
    def resume(path: Path, data_root: str | Path | None = None) -> "ControllerTrainer":
        """Load a state that ``save`` wrote."""
        record, tensors = read_state(path)
        config = dict(record["config"])
        config["controller"] = ControllerConfig(**config["controller"])
        trainer = ControllerTrainer(EvolutionConfig(**config), data_root)
        for name in ("weights", "average", "velocity"):
            copy_in(getattr(trainer, name), tensors, name)
        trainer.generator.set_state(tensors["generator"])
        trainer.go_on(record)
        trainer.started = record["started"]
        COUNT_OR_NONE.check("started", trainer.started)
        draws = parsed(list[Draw], record["draws"], "draws")
        if not draws:
            raise ValueError("draws: expected a course or more, found none")
        ages = parsed(list[int], record["ages"], "ages")
        for i, (draw, age) in enumerate(zip(draws, ages, strict=True)):
            course = trainer._start(draw)
            restore_course(course, age, with_prefix(f"course.{i}.", tensors))
            trainer.courses.append(course)
        return trainer

    def _draw(self, family: str) -> Draw:
        """Draw a new course; its length is log-uniform, rounded to whole spans."""
        config = self.config
        length, told = torch.rand(2, generator=self.generator).tolist()
        steps = config.shortest * (config.longest / config.shortest) ** length
        steps = max(round(steps / config.span), 1) * config.span
        self.started += 1
        seed = 1_000_000 * (config.seed + 1) + self.started
        return Draw(family, seed, steps, told < config.told)

    def _pairs(self, family: str) -> int:
        """Return the number of instances of a course, at least one for each process."""
        world = dist.get_world_size() if dist.is_initialized() else 1
        return max(FAMILIES[family].pairs(self.config.pairs), world)

    def _start(self, draw: Draw) -> Course:
        pairs = self._pairs(draw.family)
        return start(
            draw.family, draw.seed, pairs, draw.length, draw.told, self.mine(pairs),
            data_root=self.data_root,
        )  # fmt: skip

    def _share_of_peak(self) -> float:
        """Return the fraction of the peak learning rate: linear warm-up, then cosine to 0."""
        step, config = self.step, self.config
        if step < config.warmup:
            return (step + 1) / config.warmup
        progress = (step - config.warmup) / max(config.outer_steps - config.warmup, 1)
        return 0.5 * (1 + math.cos(math.pi * progress))


def scores_of_all(scores: Tensor) -> Tensor:
    """Gather the scores of all processes, (n, networks here) -> (n, networks)."""
    if not dist.is_initialized():
        return scores
    parts: list[Tensor] = [torch.empty(0)] * dist.get_world_size()
    dist.all_gather_object(parts, scores)
    return torch.cat(parts, 1)


def validation_losses(
    config: ControllerConfig, weights: Tensor, family: str, seed: int, pairs: int, steps: int,
    told: bool = False, data_root: str | Path | None = None,
) -> Tensor:  # fmt: skip
    """Compute the losses of a whole validation course, (windows + 1, 2 pairs).

    They are defined as in ``Course.span``. ``weights`` are those of one controller, (size,).
    """
    course = start(family, seed, pairs, steps, told, validation=True, data_root=data_root)
    return course.span(config, weights_from(config, weights.expand(2 * pairs, -1)), steps)


def mean_log_of_last(losses: Tensor) -> float:
    """Compute the mean logarithm of the last tenth of the losses, relative to the start."""
    last = losses[-max(len(losses) // 10, 1) :]
    return float((last.mean(0) + LEAST_LOSS).log().mean())


def train_controller(
    config: EvolutionConfig,
    out: Path,
    data_root: str | Path | None = None,
    resume: bool = False,
) -> Result:
    """Meta-train a controller. Ctrl-C saves the state after the current outer step and stops.

    Args:
        config: Configuration of the run; when resuming, the same as that of the saved state.
        out: Folder for ``state.safetensors``, ``log.jsonl`` and ``checkpoint.safetensors``. Of
            several processes, each but the first has its own folder in it.
        data_root: Folder of datasets.
        resume: Whether to continue from the state in ``out`` if there is one.

    Raises:
        ValueError, OSError: As ``meta_train.run.prepared``.
    """
    if dist.is_initialized() and dist.get_rank():
        out = out / f"process-{dist.get_rank()}"
    with prepared(
        out,
        asdict(config),
        resume,
        saved=lambda path: ControllerTrainer.resume(path, data_root),
        new=lambda: ControllerTrainer(config, data_root).begin(),
    ) as trainer:
        return drive(trainer, out)
