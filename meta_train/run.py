"""Training runs: steps, evaluations, a log, a state to resume from, and the best checkpoint."""

import json
import signal
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from l2o_graph.ranges import NOT_NEGATIVE, Range
from l2o_graph.storage.files import expecting, write_atomically
from l2o_graph.storage.lock import held

# Log of a run in its folder, a line for each step and evaluation.
LOG = "log.jsonl"

T = TypeVar("T", bound="Trainer")


class Trainer(ABC):
    """State of a training run between two steps.

    ``save`` writes everything that the next step depends on, so that a resumed run gives the same
    weights as one that was never interrupted.
    """

    count: str  # name of the step number in the log

    def __init__(self, config: Any, steps: int):
        self.config = config  # has ``evaluate_every`` and ``save_every``
        self.step, self.steps = 0, steps  # number of steps so far, and in all
        self.seconds = 0.0  # time of steps and evaluations so far
        self.evaluations: list[dict[str, Any]] = []  # results of evaluations

    @property
    def settings(self) -> dict[str, Any]:
        """Configuration of the run as a JSON object."""
        return asdict(self.config)

    def progress(self) -> dict[str, Any]:
        """Return the part of a state that all runs have, for ``write_state``."""
        return {
            "config": self.settings, self.count: self.step, "steps": self.steps,
            "seconds": self.seconds, "evaluations": self.evaluations,
        }  # fmt: skip

    def go_on(self, record: Mapping[str, Any]) -> None:
        """Restore the progress of a saved run."""
        self.step, self.steps = record[self.count], record.get("steps", self.steps)
        self.seconds = record["seconds"]
        self.evaluations = record["curve" if "curve" in record else "evaluations"]  # earlier name

    def provenance(self, **more: Any) -> dict[str, Any]:
        """Return a record of how the checkpoint was trained."""
        return {
            "command": "python -m meta_train " + " ".join(sys.argv[1:]),
            "commit": commit(),
            "config": self.settings,
            "minutes": round(self.seconds / 60, 1),
            "torch": torch.__version__,
            **more,
        }

    @abstractmethod
    def advance(self) -> dict[str, Any]:
        """Make a step; return a record to log, with the step number under ``count``."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """Evaluate the current weights, and append the result to ``evaluations``."""

    @abstractmethod
    def describe(self, point: dict[str, Any]) -> str:
        """Describe the result of an evaluation."""

    @abstractmethod
    def is_best(self) -> bool:
        """Return whether the last evaluation is the best so far."""

    @abstractmethod
    def save(self, path: Path) -> None:
        """Save the state."""

    @abstractmethod
    def save_best(self, path: Path) -> None:
        """Save a checkpoint for use."""


@dataclass(frozen=True, slots=True)
class Result:
    """Files and progress of a run."""

    checkpoint: Path | None  # the best checkpoint
    state: Path  # state to resume from
    log: Path  # one line of JSON for each step and evaluation
    steps: int  # number of steps so far
    finished: bool  # whether these are all steps


@contextmanager
def prepared(
    out: Path,
    settings: Mapping[str, Any],
    resume: bool,
    saved: Callable[[Path], T],
    new: Callable[[], T],
) -> Iterator[T]:
    """Lock the folder of a run, and yield its trainer.

    Args:
        out: Folder of the run, which is created if needed.
        settings: Settings of the trainer.
        resume: Whether to continue from the state in the folder, if there is one.
        saved: Function that loads a trainer's state.
        new: Function that creates a trainer.

    Raises:
        ValueError: For a state with other settings, and a damaged state or log.
        FileExistsError: If the folder holds a run and ``resume`` is off.
        BlockingIOError: If another process uses the folder.
        OSError: If it cannot be written to.
    """
    with held(out):
        state = out / "state.safetensors"
        if not state.exists():
            write_atomically(out / "config.json", json.dumps(settings, indent=2).encode())
            trainer, known = new(), -1
        elif resume:
            trainer = _restored(state, settings, saved)
            known = trainer.step
        else:
            raise FileExistsError(f"{out} holds a run already; resume it or choose another folder")
        _forget_after(out / LOG, trainer.count, known)
        yield trainer


def _restored(state: Path, settings: Mapping[str, Any], saved: Callable[[Path], T]) -> T:
    expected = f"'{state}': expected the state of a run"
    with expecting(expected), safe_open(state, framework="pt") as file:
        found = dict(json.loads(file.metadata()["record"])["config"])
    if found != settings:
        difference = ", ".join(
            f"{key} is {found.get(key)}, not {settings.get(key)}"
            for key in {**found, **settings}
            if found.get(key) != settings.get(key)
        )
        raise ValueError(f"{state} is of another configuration: {difference}")
    with expecting(expected):
        trainer = saved(state)
        # Refuse impossible values.
        Range(0, trainer.steps, whole=True).check(trainer.count, trainer.step)
        NOT_NEGATIVE.check("seconds", trainer.seconds)
        if trainer.evaluations:
            trainer.is_best()  # reads all of them
    return trainer


def write_state(path: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a state as safetensors with a JSON header, in one atomic write.

    The entry "config" of the record has the settings of the run.
    """
    content = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    write_atomically(path, save(content, {"record": json.dumps(record)}))


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a state that ``write_state`` wrote."""
    with safe_open(path, framework="pt") as file:
        # safe_open has keys() but is not iterable, unlike the linter assumes.
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()["record"]), tensors


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer, with names that include the index of the parameter."""
    state = optimizer.state_dict()["state"]
    return {f"optimizer.{i}.{key}": t for i, found in state.items() for key, t in found.items()}


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the result of ``optimizer_tensors`` into an optimizer like Adam.

    Raises:
        ValueError: For a state that does not fit its parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found = with_prefix(f"optimizer.{i}.", tensors)
        if not found:
            continue
        if not {"step", "exp_avg", "exp_avg_sq"} <= found.keys():
            raise ValueError(f"optimizer.{i}: expected the state of Adam, found {sorted(found)}")
        for key, tensor in found.items():
            shape = torch.Size() if key == "step" else p.shape
            _check_shape(tensor, shape, f"optimizer.{i}.{key}")
        state[i] = found
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select the tensors whose names start with a prefix, and remove it."""
    return {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}


def copy_in(into: Tensor, tensors: dict[str, Tensor], name: str) -> None:
    """Copy a tensor of a state into another one of the same shape."""
    _check_shape(tensors[name], into.shape, name)
    into.copy_(tensors[name])


def _check_shape(tensor: Tensor, shape: torch.Size, name: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")


def drive(trainer: Trainer, out: Path) -> Result:
    """Train to the end. Ctrl-C saves the state after the current step and stops.

    State, log and checkpoint are in the folder ``out``.
    """
    state, log = out / "state.safetensors", out / LOG
    best = out / "checkpoint.safetensors"
    with log.open("a") as lines, _stopping() as stop:
        bar = tqdm(total=trainer.steps, initial=trainer.step, unit=trainer.count.replace("_", " "))

        def report(record: dict[str, Any]) -> None:
            lines.write(json.dumps(record) + "\n")
            lines.flush()

        def evaluate() -> None:
            began = time.perf_counter()
            point = trainer.evaluate()
            trainer.seconds += time.perf_counter() - began
            report(point)
            bar.write(f"{bar.unit} {trainer.step}: {trainer.describe(point)}")
            if trainer.is_best():
                trainer.save_best(best)

        if trainer.step == 0 and not trainer.evaluations:
            evaluate()
        while trainer.step < trainer.steps and not stop:
            began = time.perf_counter()
            record = trainer.advance()
            seconds = time.perf_counter() - began
            trainer.seconds += seconds
            report({**record, "seconds": seconds})
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.3f}")
            last = trainer.step == trainer.steps
            if trainer.step % trainer.config.evaluate_every == 0 or last:
                evaluate()
            if trainer.step % trainer.config.save_every == 0 or last:
                trainer.save(state)
        bar.close()
    if stop:
        trainer.save(state)
    finished = trainer.step == trainer.steps
    return Result(best if best.exists() else None, state, log, trainer.step, finished)


def record_point(log: Path, point: dict[str, Any]) -> None:
    """Append a record to the log of a finished run, unless it is there already."""
    line = json.dumps(point)
    if line not in log.read_text().splitlines():
        with log.open("a") as lines:
            lines.write(line + "\n")


def commit() -> str:
    """Return the commit of the running code, "unknown" outside of its repository."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


@contextmanager
def _stopping() -> Iterator[list[int]]:
    """Yield a list that is not empty after the first Ctrl-C; a second one stops at once."""
    stop: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    if threading.current_thread() is not threading.main_thread():  # only that one gets Ctrl-C
        yield stop
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _forget_after(log: Path, count: str, step: int) -> None:
    """Remove lines that were logged after the saved state; a resumed run logs them again.

    Raises:
        ValueError: For lines that are not from a run.
    """
    if not log.exists():
        return
    kept = []
    for number, line in enumerate(log.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # a run was killed while writing
            break
        with expecting(
            f"'{log}', line {number}: expected a record of a run, JSON with '{count}' (move "
            "the file away to continue without it)"
        ):
            if json.loads(line)[count] <= step:
                kept.append(line)
    write_atomically(log, b"".join(kept))
