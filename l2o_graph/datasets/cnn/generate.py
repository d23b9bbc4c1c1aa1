"""Train many CNNs, and store checkpoints of each with their test accuracies.

    python -m l2o_graph.datasets.zoo --kind park --dataset cifar10 --runs 300 --out data/cnn_park
    python -m l2o_graph.datasets.zoo --kind small --dataset cifar10 --runs 1000 --out data/cnn_small

"park" trains networks of random architectures (``park``), "small" networks of one architecture
with random hyperparameters (``small``). ``l2o_graph.cnn.load_cnns`` loads them. By default, images
are halved in size by averages over 2 x 2 pixels, rounded.

All checkpoints of a run are in the same split: of every 20 runs, 12 are for training, 3 for
validation and 5 for the test. The random numbers of a run depend only on the seed, the kind, the
dataset and the number of the run, except for the dropout masks of small networks, which depend on
the other runs of the file. Files are written atomically, and the same command continues an
interrupted one.

The defaults suit two cores: 300 runs of the park with 10 checkpoints each take 2 hours (45 s of a
core per run, up to 500 s for five layers of 32 channels and kernels of 7x7), 1,000 small networks
with 5 each take 40 minutes (4.8 s of a core each). On CIFAR-10, accuracies then range from chance
level to about 50 % for the park and to 42 % for small networks; ``--steps`` for more.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from l2o_graph.commands import ERRORS, run_command
from l2o_graph.datasets.cnn.files import (
    KIND,
    read_shard,
    split_of,
    write_manifest,
    write_shard,
)
from l2o_graph.datasets.cnn.park import train_park
from l2o_graph.datasets.cnn.recipe import Recipe, Train
from l2o_graph.datasets.cnn.small import train_small
from l2o_graph.datasets.images import Images, load_images
from l2o_graph.datasets.shards import Shard, generator_of, make, quantiles, shards_of
from l2o_graph.ranges import COUNT, COUNT_OR_NONE, SEED, check_ranges
from l2o_graph.storage.lock import held
from l2o_graph.storage.shards import SPLITS

DATASETS = ("cifar10", "fmnist", "mnist", "fmnist_sample")
RESIZE_BATCH = 1000  # number of images
PARK_OPTIONS = ("longest", "cost", "channels", "strides")  # fields of a recipe for the park only


class Kind(NamedTuple):
    """Kind of zoo, with its defaults."""

    train: Train  # function that trains the runs of a shard
    grey: bool  # whether images are converted to grey
    recipe: Recipe  # recipe for the times above
    test_images: int  # number of test images
    shard: int  # number of runs in a file


KINDS = {
    "park": Kind(train_park, False, Recipe(2200, 32, 10), test_images=2500, shard=4),
    "small": Kind(train_small, True, Recipe(3000, 64, 5), test_images=10_000, shard=16),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a zoo."""

    kind: str  # key of KINDS
    dataset: str  # one of DATASETS
    runs: int  # number of networks to train
    out: Path  # folder of the shards and manifest.json
    recipe: Recipe  # training recipe
    size: int  # side of the images in pixels, a divisor of the dataset's; 0 for half of it
    test_images: int  # number of test images; 0 for all
    shard: int  # number of runs in a file; small networks of a file are trained in parallel
    seed: int  # seed of all random numbers
    jobs: int  # number of processes, with one thread each
    data_root: str | None  # folder of datasets; see l2o_graph.datasets.images.data_root


def plan(settings: Settings) -> list[Shard]:
    """Check the settings, by a ValueError or DatasetNotFoundError, and list the shards."""
    check_ranges(
        settings, runs=COUNT, size=COUNT_OR_NONE, test_images=COUNT_OR_NONE, shard=COUNT,
        seed=SEED, jobs=COUNT,
    )  # fmt: skip
    for name in PARK_OPTIONS:
        if settings.kind != "park" and getattr(settings.recipe, name):
            raise ValueError(
                f"{name}: expected none for kind '{settings.kind}', as it is an option of 'park', "
                f"found {getattr(settings.recipe, name)}"
            )
    images = _images(settings)
    shards = []
    for split in SPLITS:
        runs = [run for run in range(settings.runs) if split_of(run) == split]
        record = {
            "kind": settings.kind,
            "dataset": settings.dataset,
            "data": images.name,
            "size": images.train_x.shape[-1],
            "train_images": len(images.train_x),
            "test_images": len(images.test_x),
            "recipe": settings.recipe.to_json(),
            "seed": settings.seed,
            "torch": torch.__version__,
            "runs_in_all": settings.runs,
            "runs_in_shard": settings.shard,
            "split": split,
        }
        shards += shards_of(settings.out, runs, settings.shard, record, "runs_in_all")
    return shards


def train_shard(settings: Settings, shard: Shard) -> Shard:
    """Train the networks of a shard, and write it."""
    generators = [
        generator_of(f"{settings.seed}/{settings.kind}/{settings.dataset}/{run}")
        for run in shard.numbers
    ]
    images, train = _images(settings), KINDS[settings.kind].train
    # Adam's moments of networks with vanished gradients become denormal, which is 100 times slower.
    torch.set_flush_denormal(True)
    try:
        runs = train(shard.numbers, generators, images, settings.recipe)
    finally:
        torch.set_flush_denormal(False)
    write_shard(shard.path, runs, shard.record)
    return shard


def summary(shards: Sequence[Shard]) -> str:
    """Tabulate accuracies by split, and count runs with missing checkpoints."""
    lines = ["accuracy, %  runs networks     min     5 %    25 %  median    75 %    95 %     max"]
    most, cut_short = shards[0].record["recipe"]["checkpoints"], 0
    for split in SPLITS:
        runs = [r for s in shards if s.record["split"] == split for r in read_shard(s.path)[1]]
        cut_short += sum(len(run.step) < most for run in runs)
        values = torch.cat([torch.empty(0), *(run.accuracy for run in runs)])
        if len(values):
            cells = quantiles(100 * values.double())
            lines.append(f"{split:11}{len(runs):6,}{len(values):9,}{cells}")
    if cut_short:
        lines.append(f"{cut_short} runs diverged: checkpoints with non-finite weights are left out")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 for success, 2 for bad input."""
    return run_command("zoo", lambda: _made(argv), (*ERRORS, BrokenProcessPool))


def _made(argv: Sequence[str] | None) -> list[str]:
    settings = _parse(argv)
    shards = plan(settings)
    with held(settings.out):
        trained = make(
            shards, KIND, lambda path: len(read_shard(path)[1]),
            partial(train_shard, settings), settings.jobs, "run",
        )  # fmt: skip
        write_manifest(settings.out, [shard.path for shard in shards])
    where = f"{len(shards)} shards and manifest.json in {settings.out}"
    return [summary(shards), f"trained {trained:,} networks: {where}"]


def _parse(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m l2o_graph.datasets.zoo", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--kind", choices=sorted(KINDS), default="park", help="mixed architectures, or one")
    add("--dataset", choices=DATASETS, default="cifar10", help="training images")
    add("--runs", type=int, required=True, metavar="N", help="number of networks to train")
    add("--out", type=Path, metavar="FOLDER", help="folder of the zoo [runs/zoo-KIND]")
    add("--size", type=int, default=0, metavar="PIXELS", help="side of the images; 0: half")
    add("--test-images", type=int, metavar="N", help="number of test images; 0: all")
    add("--steps", type=int, help="number of training steps")
    add(
        "--longest", type=int, metavar="N",
        help="for --kind park, number of steps of the longest run; numbers of steps are drawn "
        "log-uniformly from --steps to this [--steps for all]",
    )  # fmt: skip
    add(
        "--channels", type=int, nargs="+", metavar="N",
        help="for --kind park, numbers of channels to draw from; repeated ones are drawn more "
        "often [4 8 16 32]",
    )  # fmt: skip
    add(
        "--strides", type=int, nargs="+", metavar="N",
        help="for --kind park, strides to draw from; their product in a network is at most 4 [1]",
    )  # fmt: skip
    add(
        "--cost", type=float, metavar="MILLIONS",
        help="for --kind park, largest number of multiplications of a network for an image [any]",
    )  # fmt: skip
    add("--batch", type=int, metavar="N", help="number of images in a batch")
    add("--checkpoints", type=int, metavar="N", help="number of checkpoints of each run")
    add("--shard", type=int, metavar="N", help="number of runs in a file")
    add("--seed", type=int, default=0, help="seed of all random numbers")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes, with one thread each")
    add("--data-root", metavar="FOLDER", help="folder of datasets")
    args = vars(parser.parse_args(argv))
    kind = KINDS[args["kind"]]
    for name in ("test_images", "shard"):
        if args[name] is None:
            args[name] = getattr(kind, name)
    given = {name: args.pop(name) for name in ("steps", "batch", "checkpoints", *PARK_OPTIONS)}
    given |= {name: tuple(given[name]) for name in ("channels", "strides") if given[name]}
    recipe = replace(kind.recipe, **{k: v for k, v in given.items() if v is not None})
    args["out"] = args["out"] or Path("runs") / f"zoo-{args['kind']}"
    return Settings(**args, recipe=recipe)


@cache
def _images(settings: Settings) -> Images:
    """Load the images, shuffled, resized and, for the test, limited in number."""
    data, grey = load_images(settings.dataset, settings.data_root), KINDS[settings.kind].grey
    full = data.train_x.shape[-1]
    size = settings.size or full // 2
    if full % size:
        raise ValueError(f"size: expected a divisor of {full} pixels, found {size}")
    count = settings.test_images
    if count > len(data.test_x):
        raise ValueError(
            f"test_images: expected at most {len(data.test_x)}, the size of the test set, found "
            f"{count}"
        )
    # Files may be sorted by class; a part should have all classes.
    generator = torch.Generator().manual_seed(0)
    parts = []
    for x, y, most in ((data.train_x, data.train_y, None), (data.test_x, data.test_y, count)):
        order = torch.randperm(len(x), generator=generator)[: most or None]
        batches = x[order].split(RESIZE_BATCH)
        parts += [torch.cat([_resized(batch, size, grey) for batch in batches]), y[order]]
    mean, std = ((0.5,), (0.5,)) if grey else (data.mean, data.std)
    return Images(data.name, *parts, mean=mean, std=std)


def _resized(x: Tensor, size: int, grey: bool) -> Tensor:
    """Average over pixels and, for grey, over colours; rounded to uint8."""
    pixels = F.avg_pool2d(x.float(), x.shape[-1] // size)
    return (pixels.mean(1, keepdim=True) if grey else pixels).round().to(torch.uint8)
