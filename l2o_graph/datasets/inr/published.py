"""The INRs that DWSNets published (Navon et al. 2023), in the folders that they come in.

MNIST:         mnist_png_{training,testing}_{label}_{image}/checkpoints/model_final.pth
Fashion-MNIST: {train,test}/model_{image}.pth, which holds its label

Which of them belong to which split is in a JSON file: of each split a list of paths, or the lists
"path" and "label", as the scripts of AvivNavon/DWSNets and mkofinas/neural-graphs write them.
"""

import json
import pickle
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from l2o_graph.datasets.inr.files import INRs, checked
from l2o_graph.datasets.inr.siren import OMEGA0
from l2o_graph.storage.files import beside
from l2o_graph.storage.shards import check_split, named

SPLIT_FILES = ("mnist_splits.json", "fmnist_splits.json", "splits.json")

# Without a JSON file, the split of l2o_graph.datasets.inr.
FIRST_VALIDATION_IMAGE = 55_000

MNIST_FOLDER = re.compile(r"mnist_png_(training|testing)_(\d+)_(\d+)")
FMNIST_FILE = re.compile(r"model_(\d+)\.pth")


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file, and what is known of it before it is read."""

    path: Path
    image: int
    training: bool
    label: int | None

    @property
    def split(self) -> str:
        """The split that it is in where no JSON file says so."""
        if not self.training:
            return "test"
        return "train" if self.image < FIRST_VALIDATION_IMAGE else "val"


def read_published(
    folder: str | Path, split: str = "train", splits: str | Path | None = None
) -> INRs:
    """Read the published INRs of MNIST or Fashion-MNIST; a minute or so for 55,000 of them.

    Args:
        folder: ``mnist-inrs`` or ``fmnist_inrs``.
        split: "train", "val" or "test".
        splits: The JSON file; by default mnist_splits.json, fmnist_splits.json or splits.json,
            in the folder or beside it. Where there is none, validation images are the last 5,000
            of the training set (the authors drew theirs at random).

    Returns:
        The networks in the order of the JSON file, else by image. Their PSNR is not on record.

    Raises:
        ValueError: For an unknown split or folder, files that are missing or damaged, and
            networks with weights that are not finite; each by name or number.
    """
    check_split(split)
    folder = Path(folder)
    listing = beside(folder, *SPLIT_FILES) if splits is None else Path(splits)
    entries = _all(folder, split) if listing is None else _listed(folder, listing, split)
    weights: list[list[Tensor]] = []
    biases: list[list[Tensor]] = []
    labels = []
    for entry in tqdm(entries, desc=f"{folder.name} {split}", unit="INR", disable=None):
        content = _read(entry.path)
        label = content.get("label") if entry.label is None else entry.label
        if label is None:
            raise ValueError(f"INR '{entry.path}': expected a label, found none")
        labels.append(int(label))
        weights.append([t for key, t in content.items() if key.endswith(".weight")])
        biases.append([t for key, t in content.items() if key.endswith(".bias")])
        shapes = [t.shape for t in (*weights[-1], *biases[-1])]
        if shapes != [t.shape for t in (*weights[0], *biases[0])]:
            raise ValueError(
                f"INR '{entry.path}': expected the layers of '{entries[0].path.name}', found "
                f"{[tuple(shape) for shape in shapes]}"
            )
    index = torch.tensor([entry.image for entry in entries])
    inrs = INRs(
        tuple(torch.stack(layer).float() for layer in zip(*weights, strict=True)),
        tuple(torch.stack(layer).float() for layer in zip(*biases, strict=True)),
        labels=torch.tensor(labels),
        index=index,
        view=torch.zeros_like(index),
        psnr=None,
        omega0=OMEGA0,
    )
    return checked(inrs, f"'{folder}', split '{split}'")


def _listed(folder: Path, listing: Path, split: str) -> list[_Entry]:
    """What a JSON file says that a split is."""
    try:
        content = json.loads(listing.read_text())[split]
        paths = content if isinstance(content, list) else content["path"]
        labels = [None] * len(paths) if isinstance(content, list) else content["label"]
        pairs = [(Path(p), label) for p, label in zip(paths, labels, strict=True)]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"splits '{listing}': expected lists of paths and labels for '{split}', found: "
            f"{error!r}"
        ) from error
    # Paths are as they were on the authors' machine: what counts are the last parts.
    places = [folder / Path(*path.parts[-3 if _of_mnist(path) else -2 :]) for path, _ in pairs]
    missing = [str(path.relative_to(folder)) for path in places if not path.exists()]
    if missing or not places:
        raise ValueError(
            f"INRs '{folder}': expected {len(places)} files of split '{split}' by "
            f"'{listing.name}', {len(missing)} are missing: {named(missing)}"
        )
    entries = zip(map(_entry, places), pairs, strict=True)
    return [e if label is None else replace(e, label=int(label)) for e, (_, label) in entries]


def _all(folder: Path, split: str) -> list[_Entry]:
    """All files of a split, by number."""
    files = [*folder.glob("mnist_png_*/checkpoints/model_final.pth"), *folder.glob("*/model_*.pth")]
    entries = sorted(map(_entry, files), key=lambda entry: entry.image)
    chosen = [entry for entry in entries if entry.split == split]
    if not chosen:
        raise ValueError(
            f"INRs '{folder}': expected files of split '{split}' like mnist_png_training_5_0/"
            "checkpoints/model_final.pth or train/model_0.pth, found none"
        )
    return chosen


def _entry(path: Path) -> _Entry:
    """What a file's name says."""
    if _of_mnist(path):
        match = MNIST_FOLDER.fullmatch(path.parts[-3])
        if match:
            return _Entry(path, int(match[3]), match[1] == "training", int(match[2]))
    elif match := FMNIST_FILE.fullmatch(path.name):
        return _Entry(path, int(match[1]), path.parent.name != "test", None)
    raise ValueError(
        f"INR '{path}': expected a name like mnist_png_training_5_0/checkpoints/model_final.pth "
        "or train/model_0.pth"
    )


def _of_mnist(path: Path) -> bool:
    return path.parent.name == "checkpoints"


def _read(path: Path) -> dict[str, Any]:
    """A state dict, with nothing in it but tensors and numbers."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, pickle.PickleError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"INR '{path}': expected a state dict, found: {reason}") from error
