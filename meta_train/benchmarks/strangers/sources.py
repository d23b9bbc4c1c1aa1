"""Data of the tasks: images, source code of the standard library, and tables of scikit-learn."""

import sysconfig
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from l2o_graph.datasets.images import Images
from meta_train.benchmarks.strangers.task import generator
from meta_train.tasks.image_classification import images_of

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
TEXT_LENGTH, TEXT_HELD_OUT = 1_000_000, 100_000


@cache
def images(name: str, root: str | None) -> Images:
    """Load a dataset by ``images_of``, with shuffled test images."""
    found = images_of(name, root)
    # Some datasets are sorted by class, and tasks only use the first test images.
    order = torch.randperm(len(found.test_y), generator=generator(0))
    return replace(found, test_x=found.test_x[order], test_y=found.test_y[order])


@cache
def text() -> tuple[Tensor, Tensor]:
    """Load source code of Python's standard library as character codes, training and test."""
    folder = Path(sysconfig.get_path("stdlib"))
    pieces: list[str] = []
    for path in sorted(folder.glob("*.py")):
        pieces.append(path.read_text(encoding="utf-8", errors="ignore"))
        if sum(map(len, pieces)) > TEXT_LENGTH:
            break
    number = {character: i for i, character in enumerate(CHARACTERS)}
    joined = "".join(pieces)[:TEXT_LENGTH]
    codes = torch.tensor([number[c] for c in joined if c in number])
    return codes[:-TEXT_HELD_OUT], codes[-TEXT_HELD_OUT:]


@cache
def table(name: str) -> tuple[Tensor, Tensor]:
    """Load standardised features (rows, features) and raw targets (rows,) from scikit-learn."""
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")()
    x = torch.from_numpy(found.data).float()
    y = torch.from_numpy(found.target)
    x = (x - x.mean(0)) / (x.std(0) + 1e-6)
    return x, (y.float() if y.is_floating_point() else y.long())
