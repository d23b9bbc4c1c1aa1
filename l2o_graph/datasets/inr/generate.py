"""Fit a SIREN to each image of a dataset, and write shards, a summary and a figure.

    python -m l2o_graph.datasets.inr --source mnist --out data/mnist_inrs
    python -m l2o_graph.datasets.inr --source mnist --views 10 --out data/mnist_inrs_10

``l2o_graph.inr.load_inrs`` loads them. Validation images are the last twelfth of the training set,
5,000 for MNIST; only training images can have several views. Datasets that are sorted by class are
reordered so that classes alternate. The initial weights of a network depend only on the seed, the
source, the split, the image and the view. Files are written atomically, and the same command
continues an interrupted one. A larger --count extends a set.

An image takes about 0.15 s of one core with the default recipe.
"""

import argparse
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from l2o_graph.commands import ERRORS, run_command
from l2o_graph.datasets.images import NORMALISATION, Images, load_images
from l2o_graph.datasets.inr.files import KIND, INRs, checked, write_shard
from l2o_graph.datasets.inr.fit import RECIPES, Recipe, fit
from l2o_graph.datasets.inr.picture import contact_sheet
from l2o_graph.datasets.inr.siren import LAYOUT, OMEGA0, initialise, psnr, render
from l2o_graph.datasets.shards import Shard, generator_of, make, quantiles, shards_of
from l2o_graph.datasets.workers import check_device
from l2o_graph.ranges import COUNT, SEED, check_ranges
from l2o_graph.storage.files import write_atomically
from l2o_graph.storage.lock import held
from l2o_graph.storage.shards import SPLITS, read_tensors

SOURCES = ("mnist", "fmnist", "cifar10", "fmnist_sample")
VALIDATION_SHARE = 12  # one in this number of training images, at the end
SHOWN = 10  # number of images in the figure


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a set of INRs."""

    source: str  # one of SOURCES
    out: Path  # folder of the shards and figure.png
    # Numbers of images of the splits; (n,) for n training images and as large a fraction of the
    # other splits, () for all.
    count: tuple[int, ...] = ()
    views: int = 1  # number of networks for each training image
    recipe: Recipe = RECIPES["default"]  # recipe for the fits
    seed: int = 0  # seed of the initial weights
    shard: int = 256  # number of networks in a file
    batch: int = 16  # number of networks that are fitted in parallel
    device: str = "cpu"  # device of the fits
    jobs: int = 1  # number of processes, with one thread each
    data_root: str | None = None  # folder of datasets; see l2o_graph.datasets.images.data_root


def layout_for(source: str) -> tuple[int, ...]:
    """Return the layer widths of networks for a source, with one output for each channel."""
    return (*LAYOUT[:-1], len(NORMALISATION[source][0]))


def plan(settings: Settings) -> list[Shard]:
    """Check the settings, by a ValueError or DatasetNotFoundError, and list the shards."""
    check_ranges(settings, views=COUNT, seed=SEED, shard=COUNT, batch=COUNT, jobs=COUNT)
    if settings.batch > settings.shard:
        raise ValueError(
            f"batch: expected at most --shard, {settings.shard}, found {settings.batch}"
        )
    check_device(settings.device)
    data = _load(settings.source, settings.data_root)
    shards = []
    for split, images in _counts(settings, data).items():
        views = settings.views if split == "train" else 1
        record = {
            "source": settings.source,
            "data": data.name,
            "split": split,
            "images": images,
            "views": views,
            "layout": list(layout_for(settings.source)),
            "omega0": OMEGA0,
            "recipe": {**asdict(settings.recipe), "betas": list(settings.recipe.betas)},
            "seed": settings.seed,
            "batch": settings.batch,
            "device": settings.device,
            "torch": torch.__version__,
        }
        # Networks of a split: all images in order, then all images again for each further view.
        rows = range(images * views)
        total = "images" if views == 1 else ""
        shards += shards_of(settings.out, rows, settings.shard, record, total)
    if not shards:
        raise ValueError(f"count: expected at least one image, found {list(settings.count)}")
    return shards


def fit_shard(settings: Settings, shard: Shard) -> Shard:
    """Fit the networks of a shard, and write it; a ValueError for non-finite networks."""
    data = _load(settings.source, settings.data_root)
    split, rows = shard.record["split"], torch.tensor(shard.numbers)
    view, position = rows // shard.record["images"], rows % shard.record["images"]
    x, y, indices = _of_split(data, split)
    index = indices[position]
    images = _in_floats(x[index])
    generators = [
        generator_of(f"{settings.seed}/{settings.source}/{split}/{image}/{which}")
        for image, which in zip(index.tolist(), view.tolist(), strict=True)
    ]
    weights, biases = _fit_in_batches(settings, images, generators)
    decibels = psnr(_drawn(weights, biases, images), images)
    inrs = INRs(tuple(weights), tuple(biases), y[index], index, view, decibels, OMEGA0)
    checked(inrs, f"of {shard.path.name}, just fitted")
    write_shard(shard.path, inrs, shard.record)
    return shard


def summary(shards: Sequence[Shard]) -> str:
    """Tabulate the PSNR by split."""
    lines = ["PSNR, dB    INRs     min     5 %    25 %  median    75 %    95 %     max"]
    for split in dict.fromkeys(shard.record["split"] for shard in shards):
        own = [read_tensors(s.path)["psnr"] for s in shards if s.record["split"] == split]
        values = torch.cat(own)
        lines.append(f"{split:8}{len(values):8,}{quantiles(values)}")
    return "\n".join(lines)


def figure(settings: Settings, shard: Shard) -> bytes:
    """Plot images of a shard above those of their networks, from worst to best PSNR, as PNG."""
    tensors = read_tensors(shard.path)
    order = tensors["psnr"].argsort()
    chosen = order[torch.linspace(0, len(order) - 1, min(SHOWN, len(order))).long()]
    layers = range(len(LAYOUT) - 1)
    weights, biases = (
        [tensors[f"{kind}.{i}"][chosen] for i in layers] for kind in ("weight", "bias")
    )
    x, _, _ = _of_split(_load(settings.source, settings.data_root), shard.record["split"])
    images = _in_floats(x[tensors["index"][chosen]])
    pixels = _drawn(weights, biases, images)
    captions = [f"{decibels:.1f} dB" for decibels in psnr(pixels, images).tolist()]
    return contact_sheet({"image": images, "network": pixels}, captions)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 for success, 2 for bad input."""
    return run_command("inr", lambda: _made(argv), (*ERRORS, BrokenProcessPool))


def _made(argv: Sequence[str] | None) -> list[str]:
    settings = _parse(argv)
    shards = plan(settings)
    with held(settings.out):
        fitted = make(
            shards, KIND, lambda path: len(read_tensors(path)["label"]),
            partial(fit_shard, settings), settings.jobs, "INR",
        )  # fmt: skip
    write_atomically(settings.out / "figure.png", figure(settings, shards[0]))
    where = f"{len(shards)} shards and figure.png in {settings.out}"
    return [summary(shards), f"fitted {fitted:,} INRs: {where}"]


def _parse(argv: Sequence[str] | None) -> Settings:
    parser = argparse.ArgumentParser(
        prog="python -m l2o_graph.datasets.inr", description=(__doc__ or "").partition("\n")[0]
    )
    add = parser.add_argument
    add("--source", choices=SOURCES, default="mnist", help="dataset of the images")
    add("--out", type=Path, metavar="FOLDER", help="folder of the set [runs/inr-SOURCE]")
    add(
        "--count", type=int, nargs="+", default=[], metavar="N",
        help="number of training images, with other splits in proportion; or of training, "
        "validation and test images",
    )  # fmt: skip
    add("--views", type=int, default=1, help="number of networks for each training image")
    add("--recipe", choices=sorted(RECIPES), default="default", help="recipe for the fits")
    add("--steps", type=int, help="number of steps of each fit [the recipe's own]")
    add("--seed", type=int, default=0, help="seed of the initial weights")
    add("--shard", type=int, default=256, metavar="N", help="number of networks in a file")
    add("--batch", type=int, default=16, metavar="N", help="number of networks in a batch")
    add("--device", default="cpu", help="device of torch")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes, with one thread each")
    add("--data-root", metavar="FOLDER", help="folder of datasets")
    args = vars(parser.parse_args(argv))
    recipe, steps = RECIPES[args["recipe"]], args.pop("steps")
    args["recipe"] = recipe if steps is None else replace(recipe, steps=steps)
    args["count"] = tuple(args["count"])
    args["out"] = args["out"] or Path("runs") / f"inr-{args['source']}"
    return Settings(**args)


_load = cache(load_images)


def _of_split(data: Images, split: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return images and labels of the training or test set, and the indices of a split in it."""
    if split == "test":
        return data.test_x, data.test_y, _alternating(data.test_y)
    indices = _alternating(data.train_y)
    training = len(indices) - len(indices) // VALIDATION_SHARE
    chosen = indices[:training] if split == "train" else indices[training:]
    return data.train_x, data.train_y, chosen


def _alternating(labels: Tensor) -> Tensor:
    """Return the indices of all images; if these are sorted by class, with classes in turn."""
    indices = torch.arange(len(labels))
    if bool((labels.diff() < 0).any()):
        return indices
    sizes = labels.bincount()
    within = indices - (sizes.cumsum(0) - sizes)[labels]
    return within.argsort(stable=True)


def _in_floats(pixels: Tensor) -> Tensor:
    """Convert uint8 images to the range and shape of ``render``; grey ones have no channel axis."""
    return (pixels.float() / 255).squeeze(1)


def _drawn(weights: Sequence[Tensor], biases: Sequence[Tensor], images: Tensor) -> Tensor:
    """Render networks in the size of the images."""
    return render(weights, biases, (images.shape[-2], images.shape[-1]))


def _counts(settings: Settings, data: Images) -> dict[str, int]:
    """Return the number of images of each split."""
    sizes = [len(_of_split(data, split)[2]) for split in SPLITS]
    counts = list(settings.count) or sizes
    if len(counts) == 1:  # rounded up, so that small sets have all three splits
        counts = [-(-counts[0] * n // sizes[0]) for n in sizes]
    if len(counts) != len(SPLITS):
        raise ValueError(f"count: expected one number or three, found {counts}")
    for split, count, n in zip(SPLITS, counts, sizes, strict=True):
        if not 0 <= count <= n:
            raise ValueError(f"count: expected 0 to {n} images of split '{split}', found {count}")
    return dict(zip(SPLITS, counts, strict=True))


def _fit_in_batches(
    settings: Settings, images: Tensor, generators: Sequence[torch.Generator]
) -> tuple[list[Tensor], list[Tensor]]:
    """Fit one network to each image; return weights and biases."""
    layout = layout_for(settings.source)
    drawn = initialise(generators, layout, output=settings.recipe.output)
    parts = []
    for part in torch.arange(len(images)).split(settings.batch):
        # The last batch is padded, because rounding depends on the size of a batch.
        full = torch.cat([part, part[-1:].expand(settings.batch - len(part))])
        weights, biases = ([t[full].to(settings.device) for t in kind] for kind in drawn)
        fitted = fit(images[full].to(settings.device), weights, biases, settings.recipe)
        parts.append([t[: len(part)].cpu() for kind in fitted for t in kind])
    whole = [torch.cat(layer) for layer in zip(*parts, strict=True)]
    return whole[: len(layout) - 1], whole[len(layout) - 1 :]
