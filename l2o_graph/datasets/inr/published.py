"""Reader of the INRs that DWSNets published (Navon et al. 2023), in their original format.

MNIST:         mnist_png_{training,testing}_{label}_{image}/checkpoints/model_final.pth
Fashion-MNIST: {train,test}/model_{image}.pth, which contains the label

A JSON file has the splits: for each one a list of paths, or lists "path" and "label", in the
formats of AvivNavon/DWSNets and mkofinas/neural-graphs.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from l2o_graph.datasets.inr.files import INRs, checked
from l2o_graph.datasets.inr.siren import OMEGA0
from l2o_graph.datasets.splits import listed
from l2o_graph.storage.files import expecting
from l2o_graph.storage.shards import check_split

SPLIT_FILES = ("mnist_splits.json", "fmnist_splits.json", "splits.json")

# Without a JSON file, validation images are those of l2o_graph.datasets.inr.
FIRST_VALIDATION_IMAGE = 55_000

NAMES = (
    re.compile(
        r"mnist_png_(?P<half>training|testing)_(?P<label>\d+)_(?P<image>\d+)"
        r"/checkpoints/model_final\.pth"
    ),
    re.compile(r"(?P<half>[^/]+)/model_(?P<image>\d+)\.pth"),
)


class _Entry(NamedTuple):
    """File of a network, with the information in its name."""

    path: Path
    image: int
    split: str  # split if there is no JSON file
    label: int | None  # None if it is in the file


def read_published(
    folder: str | Path, split: str = "train", splits: str | Path | None = None
) -> INRs:
    """Read the published INRs of MNIST or Fashion-MNIST; 55,000 take about a minute.

    Args:
        folder: Folder ``mnist-inrs`` or ``fmnist_inrs``.
        split: "train", "val" or "test".
        splits: JSON file with the splits; by default mnist_splits.json, fmnist_splits.json or
            splits.json in the folder or its parent. Without such a file, validation images are
            the last 5,000 of the training set (those of the authors are random).

    Returns:
        Networks in the order of the JSON file, or else of the images, without PSNR.

    Raises:
        ValueError: For an unknown split or folder, files that are missing or damaged, and
            networks with weights that are not finite, naming them.
    """
    check_split(split)
    folder = Path(folder)
    pairs = listed(folder, splits, SPLIT_FILES, split, ("path", "label"))
    entries = _all(folder, split) if pairs is None else [_entry(*pair) for pair in pairs]
    networks: list[list[Tensor]] = []  # weights, then biases, of each
    labels = []
    for entry in tqdm(entries, desc=f"{folder.name} {split}", unit="INR", disable=None):
        with expecting(f"INR '{entry.path}': expected a state dict", passing=()):
            content = dict(torch.load(entry.path, map_location="cpu", weights_only=True))
        with expecting(f"INR '{entry.path}': expected a label"):
            labels.append(int(content["label"] if entry.label is None else entry.label))
        kinds = (".weight", ".bias")
        networks.append([t for kind in kinds for key, t in content.items() if key.endswith(kind)])
        shapes, first = ([tuple(t.shape) for t in networks[i]] for i in (-1, 0))
        if shapes != first:
            raise ValueError(
                f"INR '{entry.path}': expected the layers of '{entries[0].path.name}', found "
                f"{shapes}"
            )
    layers = [torch.stack(layer).float() for layer in zip(*networks, strict=True)]
    index = torch.tensor([entry.image for entry in entries])
    inrs = INRs(
        tuple(layers[: len(layers) // 2]),
        tuple(layers[len(layers) // 2 :]),
        labels=torch.tensor(labels),
        index=index,
        view=torch.zeros_like(index),
        psnr=None,
        omega0=OMEGA0,
    )
    return checked(inrs, f"'{folder}', split '{split}'")


def _all(folder: Path, split: str) -> list[_Entry]:
    """List the files of a split in the order of their images."""
    files = [*folder.glob("mnist_png_*/checkpoints/model_final.pth"), *folder.glob("*/model_*.pth")]
    entries = sorted(map(_entry, files), key=lambda entry: entry.image)
    chosen = [entry for entry in entries if entry.split == split]
    if not chosen:
        raise ValueError(
            f"INRs '{folder}': expected files of split '{split}' like mnist_png_training_5_0/"
            "checkpoints/model_final.pth or train/model_0.pth, found none"
        )
    return chosen


def _entry(path: Path, label: Any = None) -> _Entry:
    """Parse the name of a file; a given label takes precedence."""
    end = "/".join(path.parts[-3 if path.parent.name == "checkpoints" else -2 :])
    found = next((match.groupdict() for name in NAMES if (match := name.fullmatch(end))), None)
    if found is None:
        raise ValueError(
            f"INR '{path}': expected a name like mnist_png_training_5_0/checkpoints/"
            "model_final.pth or train/model_0.pth"
        )
    image, label = int(found["image"]), found.get("label") if label is None else label
    split = "train" if image < FIRST_VALIDATION_IMAGE else "val"
    if found["half"] in ("test", "testing"):
        split = "test"
    return _Entry(path, image, split, None if label is None else int(label))
