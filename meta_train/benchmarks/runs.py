"""What is compared, and what came of each run."""

from dataclasses import dataclass, field
from pathlib import Path

FIRST_SEED = 101


FINAL = 100  # the loss reported is the mean over this many last steps


THINNING = 10  # the loss curve keeps the mean of every so many steps


@dataclass(frozen=True, slots=True)
class Settings:
    """What to compare, and how.

    Attributes:
        tasks: Names of ``meta_train.tasks.TASKS``.
        optimizers: Names of ``meta_train.benchmarks.baselines.contenders()``.
        seeds: Number of seeds, from 101 on.
        tune_seeds: How many of them choose the rate of a grid; 0 for all.
        steps: Training steps of a run.
        grid: Rates in place of an optimizer's own grid, by name.
        checkpoints: Learned optimizers beside the packaged one; see ``contenders``.
        evaluate_every: Steps between test accuracies; 0 for the end alone.
        data_root: Folder where datasets lie; see ``l2o_graph.datasets.images.data_root``.
        out: Folder of results.json, results.md and curves.png.
        device: To train on.
        jobs: Runs at the same time; with more than one, each has one thread.
    """

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    seeds: int = 5
    tune_seeds: int = 0
    steps: int = 1000
    grid: dict[str, tuple[float, ...]] = field(default_factory=dict)
    checkpoints: dict[str, str] = field(default_factory=dict)
    evaluate_every: int = 0
    data_root: str | None = None
    out: Path = Path("runs/benchmark")
    device: str = "cpu"
    jobs: int = 1


@dataclass(frozen=True, slots=True)
class Run:
    """One training run; runs that are equal here give the same result.

    Attributes:
        task: Name.
        optimizer: Name.
        rate: Learning rate.
        seed: Seed of initialisation and batches.
        steps: Training steps.
        device: Trained on.
        checkpoint: Identity of a learned optimizer's weights, else empty.
    """

    task: str
    optimizer: str
    rate: float
    seed: int
    steps: int
    device: str
    checkpoint: str


@dataclass(frozen=True, slots=True)
class Record:
    """What came of a run.

    Attributes:
        run: Which.
        accuracy: Test accuracy at the end, in [0, 1].
        final_loss: Mean training loss of the last 100 steps, in nats; None if it diverged.
        curve: Training loss, the mean of every 10 steps.
        accuracies: (steps done, test accuracy) on the way, where asked for.
        diverged: Whether the loss became non-finite, which ends a run.
        step_seconds: Median of a training step.
        update_seconds: Median of its optimizer's part.
        data: The dataset, in words.
        torch: Version.
        machine: CPU, cores, and threads used.
        date: When it ended, UTC.
    """

    run: Run
    accuracy: float
    final_loss: float | None
    curve: list[float]
    accuracies: list[tuple[int, float]]
    diverged: bool
    step_seconds: float
    update_seconds: float
    data: str
    torch: str
    machine: str
    date: str
