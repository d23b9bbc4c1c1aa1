"""The outer loop: pick a trajectory, unroll a segment, step the meta-weights; log, save, resume."""

import dataclasses
import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

from l2o_graph.rule import RuleConfig, UpdateRule, untrained
from l2o_graph.step import State
from l2o_graph.zoo.files import write_atomically
from l2o_graph.zoo.registry import save_checkpoint
from meta_train.config import MetaConfig
from meta_train.evolution import evolve
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


@dataclass(frozen=True, slots=True)
class MetaResult:
    """What a run left behind.

    Attributes:
        checkpoint: The best learned optimizer, by its held-out rollouts; None before the first.
        state: From which the run can be resumed.
        log: One line of JSON for each outer step and evaluation.
        outer_steps: How far it got.
        finished: Whether that is all of it.
    """

    checkpoint: Path | None
    state: Path
    log: Path
    outer_steps: int
    finished: bool


class MetaTrainer:
    """A run in progress, between two outer steps.

    Everything that the next step depends on is in here and in the saved state: a resumed run
    comes to the same weights as one that was never interrupted.
    """

    def __init__(self, config: MetaConfig, device: torch.device):
        self.config, self.device = config, device
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
        self.outer_step = 0
        self.started = 0  # trajectories so far
        self.seconds = 0.0
        self.curve: list[dict[str, Any]] = []
        self.trajectories: list[Trajectory] = []
        self.problems: list[Problem] = []

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
        turn = self.outer_step % config.trajectories
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
        self.outer_step += 1
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        return {
            "outer_step": self.outer_step, "age": age, "loss": loss, "gradient_norm": norm,
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
            "outer_step": self.outer_step,
            "held_out_loss": mean if math.isfinite(mean) else math.inf,
            "held_out_accuracy": sum(accuracy) / len(accuracy),
        }
        self.curve.append(point)
        return point

    def is_best(self) -> bool:
        """Whether the last evaluation is the best since training began.

        By training loss: no test image votes. The untrained rule is no candidate, unless no
        training was asked for.
        """
        first = min(self.config.outer_steps, 1)
        losses = [p["held_out_loss"] for p in self.curve if p["outer_step"] >= first]
        return bool(losses) and self.curve[-1]["held_out_loss"] == min(losses)

    def save(self, path: Path) -> None:
        """Write all of it as safetensors with a JSON header; no pickle."""
        tensors = {f"rule.{k}": v for k, v in self.rule.state_dict().items()}
        tensors["generator"] = self.generator.get_state()
        for i, p in enumerate(self.rule.parameters()):
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{i}.{key}"] = value
        for i, t in enumerate(self.trajectories):
            for j, (p, s) in enumerate(zip(t.parameters, t.state, strict=True)):
                tensors[f"trajectory.{i}.{j}.parameter"] = p
                tensors[f"trajectory.{i}.{j}.momenta"] = s.momenta
                tensors[f"trajectory.{i}.{j}.step"] = s.step
        record = {
            "config": asdict(self.config),
            "outer_step": self.outer_step,
            "started": self.started,
            "seconds": self.seconds,
            "curve": self.curve,
            "trajectories": [(t.seed, t.length, t.age) for t in self.trajectories],
        }
        content = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        write_atomically(path, save(content, {"record": json.dumps(record)}))

    @staticmethod
    def resume(path: Path, device: torch.device) -> "MetaTrainer":
        """Read a state that ``save`` wrote; the task's data has to be loaded."""
        with safe_open(path, framework="pt") as file:
            record = json.loads(file.metadata()["record"])
            # safe_open has keys() but is not iterable, which the linter cannot know.
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = record["config"]
        trainer = MetaTrainer(
            MetaConfig(**{**config, "rule": RuleConfig(**config["rule"])}), device
        )
        trainer.rule.load_state_dict(
            {k.removeprefix("rule."): v for k, v in tensors.items() if k.startswith("rule.")}
        )
        trainer.generator.set_state(tensors["generator"])
        for i, p in enumerate(trainer.rule.parameters()):
            start = f"optimizer.{i}."
            found = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            if found:
                trainer.optimizer.state[p] = {
                    k: v if k == "step" else v.to(device) for k, v in found.items()
                }
        for name in ("outer_step", "started", "seconds", "curve"):
            setattr(trainer, name, record[name])
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
        step, config = self.outer_step, self.config
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
) -> MetaResult:
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
    state, log, best = (
        out / n for n in ("state.safetensors", "log.jsonl", "checkpoint.safetensors")
    )
    task = get_task(config.task)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "config.json", json.dumps(asdict(config), indent=2).encode())
    if state.exists() and not resume:
        raise FileExistsError(f"{out} holds a run already; resume it or choose another folder")
    data = task.load(data_root)
    place = torch.device(device)
    if state.exists():
        trainer = MetaTrainer.resume(state, place)
        if trainer.config != config:
            raise ValueError(f"{state} is of another configuration: {_difference(trainer, config)}")
        _forget_after(log, trainer.outer_step)
    else:
        trainer = MetaTrainer(config, place).begin()
        _forget_after(log, -1)
    stop = _StopOnInterrupt()
    with log.open("a") as lines, stop, _Board(out) as board:
        bar = tqdm(total=config.outer_steps, initial=trainer.outer_step, unit="outer step")

        def report(record: dict[str, Any]) -> None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()
            board.add(record)

        def evaluate() -> None:
            point = trainer.evaluate()
            report(point)
            bar.write(
                f"outer step {trainer.outer_step}: held-out loss {point['held_out_loss']:.4f}, "
                f"accuracy {100 * point['held_out_accuracy']:.2f} %"
            )
            if trainer.is_best():
                save_checkpoint(best, trainer.rule, _provenance(trainer, data))

        if trainer.outer_step == 0 and not trainer.curve:
            evaluate()
        while trainer.outer_step < config.outer_steps and not stop.asked:
            record = trainer.advance()
            report(record)
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.3f}", age=int(record["age"]))
            last = trainer.outer_step == config.outer_steps
            if trainer.outer_step % config.evaluate_every == 0 or last:
                evaluate()
            if trainer.outer_step % config.save_every == 0 or last:
                trainer.save(state)
        bar.close()
    if stop.asked:
        trainer.save(state)
    finished = trainer.outer_step == config.outer_steps
    return MetaResult(best if best.exists() else None, state, log, trainer.outer_step, finished)


class _StopOnInterrupt:
    """Ctrl-C asks to stop at the next chance; a second one stops at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_StopOnInterrupt":
        try:
            self._before = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not in the main thread: nobody can press Ctrl-C here
            self._before = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


class _Board:
    """TensorBoard, where it is installed."""

    def __init__(self, out: Path):
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError:
            self._writer = None
        else:
            self._writer = SummaryWriter(str(out / "tensorboard"))

    def __enter__(self) -> "_Board":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, record: dict[str, Any]) -> None:
        """Log every number of a record at its outer step."""
        if self._writer is not None:
            for key, value in record.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(key, value, record["outer_step"])


def _difference(trainer: MetaTrainer, config: MetaConfig) -> str:
    found, expected = asdict(trainer.config), asdict(config)
    return ", ".join(
        f"{key} is {found[key]}, not {expected[key]}"
        for key in found
        if found[key] != expected[key]
    )


def _forget_after(log: Path, outer_step: int) -> None:
    """Drop what was logged after the saved state; a resumed run logs it again."""
    if not log.exists():
        return
    records = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    kept = [json.dumps(r) + "\n" for r in records if r["outer_step"] <= outer_step]
    write_atomically(log, "".join(kept).encode())


def _provenance(trainer: MetaTrainer, data: str) -> dict[str, Any]:
    return {
        "command": "python -m meta_train " + " ".join(sys.argv[1:]),
        "commit": _commit(),
        "data": data,
        "config": dataclasses.asdict(trainer.config),
        "outer_steps": trainer.outer_step,
        "minutes": round(trainer.seconds / 60, 1),
        "torch": torch.__version__,
        "curve": trainer.curve,
    }


def _commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()
