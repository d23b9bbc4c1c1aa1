"""What a step costs: of NGOptimizer, and of meta-training, beside a forward and backward pass.

    python -m meta_train.step_cost --threads 2

Each round measures everything once, one after the other, so that whatever else the machine does
falls on all alike; the figures are medians over rounds. The images are random: time does not
depend on them.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import trange

from l2o_graph import NGOptimizer
from l2o_graph.datasets.images import Images
from l2o_graph.zoo.registry import load_checkpoint
from meta_train.evolution import evolve
from meta_train.tasks.image_classification import ImageProblem, cnn
from meta_train.unroll import Trajectory, greedy, look_ahead

BATCH = 128
PASS = "forward and backward"
STEP_BAR, META_BAR = 0.4, 5.0  # at most so many forward and backward passes
WARM_UP = 2  # rounds that do not count: caches, lazy initialisation


@dataclass(frozen=True, slots=True)
class Work:
    """Something to measure.

    Attributes:
        net: Which it works on.
        name: What it is.
        run: Does it.
        steps: As many as that does.
        bar: The most that it may cost, in forward and backward passes.
    """

    net: str
    name: str
    run: Callable[[], object]
    steps: int = 1
    bar: float | None = None


@dataclass(frozen=True, slots=True)
class Cost:
    """What a piece of work took.

    Attributes:
        work: Which.
        seconds: Median of one step of it.
        passes: That, in forward and backward passes of the same net.
    """

    work: Work
    seconds: float
    passes: float


def step_costs(
    checkpoint: str = "fmnist",
    rounds: int = 20,
    unroll: int = 50,
    snapshots: int = 5,
    device: str = "cpu",
) -> list[Cost]:
    """Measure on the FashionMNIST and the CIFAR-10 net at batch 128.

    Args:
        checkpoint: The learned optimizer.
        rounds: Measurements of each.
        unroll: Inner steps of a meta-training segment.
        snapshots: Steps of it that are differentiated; meta-training's default is a tenth.
        device: To measure on.
    """
    place = torch.device(device)
    fmnist = problem_of_noise(channels=1, size=28, width=16, device=place)
    cifar10 = problem_of_noise(channels=3, size=32, width=32, device=place)
    rule = load_checkpoint(checkpoint).rule.to(place).requires_grad_(True)
    trajectory = Trajectory.start(fmnist, 0, unroll)
    generator = torch.Generator().manual_seed(0)
    greedy_steps = max(1, unroll // 10)  # each of them is differentiated, and costs accordingly

    def segment() -> None:
        rule.zero_grad()
        look_ahead(rule, fmnist, trajectory, unroll, snapshots, generator)

    def greedy_segment() -> None:
        rule.zero_grad()
        greedy(rule, fmnist, trajectory, greedy_steps)

    def pair() -> None:
        rule.zero_grad()
        evolve(rule, fmnist, greedy_steps, generator)

    costly = f"meta-training step, look-ahead, {snapshots} of {unroll} differentiated"
    fmnist_net, cifar10_net = "FashionMNIST", "CIFAR-10"
    works = [
        Work(fmnist_net, PASS, _forward_backward(fmnist)),
        Work(fmnist_net, "NGOptimizer step", _optimizer(fmnist, checkpoint).step),
        Work(fmnist_net, costly, segment, unroll, META_BAR),
        Work(fmnist_net, "meta-training step, greedy", greedy_segment, greedy_steps, META_BAR),
        Work(fmnist_net, "meta-training step, pair of runs", pair, 2 * greedy_steps, META_BAR),
        Work(cifar10_net, PASS, _forward_backward(cifar10)),
        Work(cifar10_net, "NGOptimizer step", _optimizer(cifar10, checkpoint).step, bar=STEP_BAR),
    ]
    seconds: list[list[float]] = [[] for _ in works]
    for turn in trange(rounds + WARM_UP, unit="round"):
        for work, times in zip(works, seconds, strict=True):
            begin = _now(place)
            work.run()
            if turn >= WARM_UP:
                times.append((_now(place) - begin) / work.steps)
    middle = [median(times) for times in seconds]
    base = {w.net: m for w, m in zip(works, middle, strict=True) if w.name == PASS}
    return [Cost(w, m, m / base[w.net]) for w, m in zip(works, middle, strict=True)]


def problem_of_noise(channels: int, size: int, width: int, device: torch.device) -> ImageProblem:
    """The paper's CNN on random images."""
    x = torch.randint(0, 256, (8 * BATCH, channels, size, size), dtype=torch.uint8, device=device)
    y = torch.randint(0, 10, (8 * BATCH,), device=device)
    noise = Images("noise", x, y, x, y, mean=(0.5,) * channels, std=(0.3,) * channels)
    return ImageProblem(cnn(channels, size, width).to(device), noise, BATCH, seed=0)


def markdown(costs: Sequence[Cost]) -> str:
    """The measurements as a table."""
    lines = ["| net | what | ms | passes | bar |", "|---|---|---|---|---|"]
    for cost in costs:
        work, bar = cost.work, "" if cost.work.bar is None else f"≤ {cost.work.bar:g}"
        time_and_passes = f"{1e3 * cost.seconds:.2f} | {cost.passes:.2f}"
        lines.append(f"| {work.net} | {work.name} | {time_and_passes} | {bar} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Cost]:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m meta_train.step_cost", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--threads", type=int, help="of the CPU; torch's own choice if not given")
    parser.add_argument("--checkpoint", default="fmnist", help="a name or a path")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--unroll", type=int, default=50, help="inner steps of a segment")
    parser.add_argument("--snapshots", type=int, default=5, help="differentiated steps of it")
    parser.add_argument("--device", default="cpu")
    args = vars(parser.parse_args(argv))
    threads = args.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    costs = step_costs(**args)
    print(markdown(costs))
    print(f"\nbatch {BATCH} of random images, torch {torch.__version__}, ", end="")
    print(f"CPU threads: {torch.get_num_threads()}")
    return costs


def _forward_backward(problem: ImageProblem) -> Callable[[], None]:
    """A pass that leaves gradients behind, as a training loop has it."""
    x, y = problem.batch(0)

    def run() -> None:
        problem.module.zero_grad()
        torch.nn.functional.cross_entropy(problem.module(x), y).backward()

    return run


def _optimizer(problem: ImageProblem, checkpoint: str) -> NGOptimizer:
    return NGOptimizer(problem.module.parameters(), checkpoint=checkpoint)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
