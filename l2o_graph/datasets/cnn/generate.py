"""Train CNNs in numbers, and keep checkpoints of each with its test accuracy: shards, a manifest.

    python -m l2o_graph.datasets.zoo --kind park --dataset cifar10 --runs 300 --out data/cnn_park
    python -m l2o_graph.datasets.zoo --kind small --dataset cifar10 --runs 1000 --out data/cnn_small

"park" trains networks of mixed architecture (``park``), "small" identical ones in many ways
(``small``). Read them with ``l2o_graph.cnn.load_cnns``. Images are halved in size by default: the
mean of each four pixels, rounded.

All checkpoints of a run are in one split: of every twenty runs in a row twelve are for training,
three for validation and five for the test. Every run draws from the seed, the kind, the dataset
and its number alone, but for the dropout of small networks, which those of a file share. A shard
appears whole or not at all, and the same command goes on with those that are missing.

The defaults are for two cores: 300 runs of the park with 10 checkpoints each in 2 hours (45 s of a
core a run, up to 500 s for five layers of 32 channels and kernels of 7x7), 1,000 small networks
with 5 each in 40 minutes (4.8 s of a core each). On CIFAR-10 that reaches from guessing to about
half of the images for the park, and to 42 % for small networks; ``--steps`` for more.
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
PREPARED = 1000  # images at once
OF_PARK = ("longest", "cost", "channels", "strides")  # what a recipe of the park may say besides


class Kind(NamedTuple):
    """A kind of zoo."""

    train: Train  # trains the runs of a shard
    grey: bool  # whether colours are averaged
    recipe: Recipe  # for runs of the size that the module's docstring tells
    test_images: int  # to take accuracies on
    shard: int  # runs in a file


KINDS = {
    "park": Kind(train_park, False, Recipe(2200, 32, 10), test_images=2500, shard=4),
    "small": Kind(train_small, True, Recipe(3000, 64, 5), test_images=10_000, shard=16),
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What to train, and how."""

    kind: str  # one of KINDS
    dataset: str  # one of DATASETS
    runs: int  # networks to train
    out: Path  # folder of the shards and manifest.json
    recipe: Recipe  # how each is trained
    size: int  # side of the images in pixels, a divisor of the dataset's; 0 for half of it
    test_images: int  # how many accuracies are taken on; 0 for all
    shard: int  # runs in a file; small networks of a file are trained at once
    seed: int  # of all draws
    jobs: int  # processes, of one thread each
    data_root: str | None  # where datasets lie; see l2o_graph.datasets.images.data_root


def plan(settings: Settings) -> list[Shard]:
    """Check what was asked for, and list the shards.

    Raises:
        ValueError: For numbers out of range.
        DatasetNotFoundError: For data that are not there.
    """
    check_ranges(
        settings, runs=COUNT, size=COUNT_OR_NONE, test_images=COUNT_OR_NONE, shard=COUNT,
        seed=SEED, jobs=COUNT,
    )  # fmt: skip
    for name in OF_PARK:
        if settings.kind != "park" and getattr(settings.recipe, name):
            raise ValueError(
                f"{name}: expected none for kind '{settings.kind}', whose networks "
                f"are all alike in this, found {getattr(settings.recipe, name)}"
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
    """Train all networks of a shard, and write it."""
    generators = [
        generator_of(f"{settings.seed}/{settings.kind}/{settings.dataset}/{run}")
        for run in shard.numbers
    ]
    images, train = _images(settings), KINDS[settings.kind].train
    # Moments of networks whose gradients have died fall to where a CPU takes 100 times as long.
    torch.set_flush_denormal(True)
    try:
        runs = train(shard.numbers, generators, images, settings.recipe)
    finally:
        torch.set_flush_denormal(False)
    write_shard(shard.path, runs, shard.record)
    return shard


def summary(shards: Sequence[Shard]) -> str:
    """Accuracies of each split in a table, and of how many runs something is missing."""
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
        lines.append(f"{cut_short} runs lack checkpoints, whose weights were not finite")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, print; 0 when all is done, 2 for a request that cannot be met."""
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
    add("--kind", choices=sorted(KINDS), default="park")
    add("--dataset", choices=DATASETS, default="cifar10")
    add("--runs", type=int, required=True, metavar="N", help="networks to train")
    add("--out", type=Path, metavar="FOLDER", help="[runs/zoo-KIND]")
    add("--size", type=int, default=0, metavar="PIXELS", help="side of the images; 0: half")
    add("--test-images", type=int, metavar="N", help="to take accuracies on; 0: all")
    add("--steps", type=int, help="of training")
    add(
        "--longest", type=int, metavar="N",
        help="steps of the longest run, --steps of the shortest; lengths between are drawn "
        "[all as long]",
    )  # fmt: skip
    add(
        "--channels", type=int, nargs="+", metavar="N",
        help="widths of the park's networks to draw from; one given twice is drawn twice as often "
        "[4 8 16 32]",
    )  # fmt: skip
    add(
        "--strides", type=int, nargs="+", metavar="N",
        help="strides of the park's networks to draw from, at most 4 in all [1]",
    )  # fmt: skip
    add(
        "--cost", type=float, metavar="MILLIONS",
        help="multiplications that a network of the park may take for an image [any]",
    )  # fmt: skip
    add("--batch", type=int, metavar="N", help="images of a step")
    add("--checkpoints", type=int, metavar="N", help="to keep of each run")
    add("--shard", type=int, metavar="N", help="runs in a file")
    add("--seed", type=int, default=0)
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    add("--data-root", metavar="FOLDER")
    args = vars(parser.parse_args(argv))
    kind = KINDS[args["kind"]]
    for name in ("test_images", "shard"):
        if args[name] is None:
            args[name] = getattr(kind, name)
    given = {name: args.pop(name) for name in ("steps", "batch", "checkpoints", *OF_PARK)}
    given |= {name: tuple(given[name]) for name in ("channels", "strides") if given[name]}
    recipe = replace(kind.recipe, **{k: v for k, v in given.items() if v is not None})
    args["out"] = args["out"] or Path("runs") / f"zoo-{args['kind']}"
    return Settings(**args, recipe=recipe)


@cache
def _images(settings: Settings) -> Images:
    """Images in a drawn order, as many and as large as they are to be; once in a process."""
    data, grey = load_images(settings.dataset, settings.data_root), KINDS[settings.kind].grey
    full = data.train_x.shape[-1]
    size = settings.size or full // 2
    if full % size:
        raise ValueError(f"size: expected a divisor of {full} pixels, found {size}")
    there, count = len(data.test_x), settings.test_images
    if count > there:
        raise ValueError(f"test_images: expected at most the {there} there are, found {count}")
    # Files may hold one class after another; a part is to hold all.
    generator = torch.Generator().manual_seed(0)
    parts = []
    for x, y, most in ((data.train_x, data.train_y, None), (data.test_x, data.test_y, count)):
        order = torch.randperm(len(x), generator=generator)[: most or None]
        parts += [torch.cat([_smaller(p, size, grey) for p in x[order].split(PREPARED)]), y[order]]
    mean, std = ((0.5,), (0.5,)) if grey else (data.mean, data.std)
    return Images(data.name, *parts, mean=mean, std=std)


def _smaller(x: Tensor, size: int, grey: bool) -> Tensor:
    """Averages over pixels, and over colours for grey, rounded."""
    pixels = F.avg_pool2d(x.float(), x.shape[-1] // size)
    return (pixels.mean(1, keepdim=True) if grey else pixels).round().to(torch.uint8)
