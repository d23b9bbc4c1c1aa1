"""Reader of the CNN Wild Park (Kofinas et al. 2024; Zenodo 12797219), from its unpacked archive.

cifar10_zooV2/{run}/checkpoint_{number}/checkpoint.pt   a network, its architecture and accuracy
cnn_park_splits.json                                    checkpoints of each split

The formats are those that mkofinas/neural-graphs writes and reads; the reader was not tested on
files of the archive.

A checkpoint is a pickle with omegaconf objects for the architecture. Unpickling only runs code that
builds tensors; all other objects are replaced by containers of their contents.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm

from l2o_graph.datasets.cnn.architecture import NO_SKIP, CNNArchitecture
from l2o_graph.datasets.cnn.files import CNNs, Run, gathered, run_of, split_of
from l2o_graph.datasets.splits import listed
from l2o_graph.storage.files import expecting
from l2o_graph.storage.shards import check_split

SPLITS_FILE = "cnn_park_splits.json"
TRUSTED = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


def read_wild_park(
    folder: str | Path, split: str = "train", splits: str | Path | None = None
) -> CNNs:
    """Read networks of the CNN Wild Park; all 117,241 take some minutes.

    These entries of a checkpoint are read: "model", the parameters in order; "config", with
    "channels", "kernel_size", "stride", "activation", "residual" and "n_classes"; and without a
    JSON file, accuracy and step from "last_result" and "iteration". A residual r means the output
    of convolution r, counted from 0, and -1 none.

    Args:
        folder: Folder of the unpacked archive.
        split: "train", "val" or "test".
        splits: JSON file with lists "path", "score" and "step" for each split; by default
            cnn_park_splits.json in the folder or its parent. Paths are relative to the folder,
            with or without their first part. Without such a file, runs in the order of their names
            are split in the same way as by ``l2o_graph.datasets.zoo``.

    Returns:
        Networks in the order of the JSON file, or else of their paths. ``run`` numbers the folders
        of runs in order of appearance.

    Raises:
        ValueError: For an unknown split, and files that are missing or damaged, naming them.
    """
    check_split(split)
    folder = Path(folder)
    entries = listed(folder, splits, (SPLITS_FILE,), split, ("path", "score", "step"))
    if entries is None:
        entries = [(path, None, None) for path in _all(folder, split)]
    numbers: dict[Path, int] = {}
    runs = []
    for path, score, step in tqdm(entries, desc=f"{folder.name} {split}", unit="CNN", disable=None):
        number = numbers.setdefault(path.parent.parent, len(numbers))
        runs.append(_read(path, number, score, step))
    return gathered(runs)


def _all(folder: Path, split: str) -> list[Path]:
    """List the checkpoints of a split in the order of their paths."""
    paths = sorted(folder.glob("**/checkpoint.pt"))
    index = {run: i for i, run in enumerate(dict.fromkeys(p.parent.parent for p in paths))}
    chosen = [path for path in paths if split_of(index[path.parent.parent]) == split]
    if not chosen:
        raise ValueError(
            f"CNN park '{folder}': expected checkpoints of split '{split}' like "
            "cifar10_zooV2/run/checkpoint_000010/checkpoint.pt, found none"
        )
    return chosen


def _read(path: Path, number: int, score: float | None, step: int | None) -> Run:
    with expecting(f"CNN '{path}': expected a checkpoint", passing=()):
        # weights_only=True would fail for omegaconf objects; this unpickler replaces them.
        content = torch.load(path, "cpu", weights_only=False, pickle_module=_PICKLE)
        config = _plain(content["config"])
        architecture = CNNArchitecture(
            channels=tuple(config["channels"]),
            kernels=tuple(config["kernel_size"]),
            activations=tuple("" if name == "none" else name for name in config["activation"]),
            # The output of convolution r is layer r + 1 here.
            skips=tuple(NO_SKIP if r < 0 else r + 1 for r in config["residual"]),
            strides=tuple(config["stride"]),
            classes=config["n_classes"],
        )
        tensors = [t.float() for t in content["model"].values()]
        accuracy = float(content["last_result"]["test/acc"] if score is None else score)
        steps = int(content["iteration"] if step is None else step)
    shapes = [tuple(t.shape) for t in tensors]
    if shapes != list(architecture.shapes):
        raise ValueError(
            f"CNN '{path}': expected parameters {list(architecture.shapes)}, found {shapes}"
        )
    values = torch.cat([t.flatten() for t in tensors])
    if not bool(values.isfinite().all()):
        raise ValueError(f"CNN '{path}': expected finite weights, found others")
    return run_of(number, architecture, {}, [(steps, accuracy, values)])


# Unpickling without running code ---------------------------------------------------------------


class _Opaque:
    """Replacement for objects of other classes, with their attributes but without their methods."""

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            vars(self).update(state)

    def append(self, entry: Any) -> None:
        """Ignore the entries of sequences."""

    def __setitem__(self, key: Any, entry: Any) -> None:
        """Ignore the entries of mappings."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in TRUSTED:
            return super().find_class(module_name, global_name)
        return _Opaque


# The attributes of a pickle module that torch.load uses.
_PICKLE: Any = SimpleNamespace(Unpickler=_Unpickler, __name__="pickle")


def _plain(value: Any) -> Any:
    """Unwrap omegaconf nodes: ``_content`` of dicts and lists, ``_val`` of values."""
    inner = getattr(value, "_content", getattr(value, "_val", value))
    if isinstance(inner, Mapping):
        return {key: _plain(each) for key, each in inner.items()}
    return [_plain(each) for each in inner] if isinstance(inner, list | tuple) else inner
