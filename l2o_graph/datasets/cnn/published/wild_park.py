"""The CNN Wild Park (Kofinas et al. 2024; Zenodo 12797219), as its archive unpacks.

cifar10_zooV2/{run}/checkpoint_{number}/checkpoint.pt   a network, its architecture and accuracy
cnn_park_splits.json                                    which of them are in which split

What is known of them is what mkofinas/neural-graphs writes and reads: no file was at hand.

A checkpoint is a pickle that holds its architecture as objects of omegaconf. Here nothing of a
pickle is executed but what builds tensors; of all else no more than its contents is looked at.
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
    """Read networks of the CNN Wild Park; some minutes for all of its 117,241.

    Of a checkpoint three entries are read: "model", the parameters in their order; "config", with
    "channels", "kernel_size", "stride", "activation", "residual" and "n_classes"; and where there
    is no JSON file, "last_result" and "iteration" for accuracy and step. A residual r stands for
    what convolution r, counted from 0, gives, and -1 for none.

    Args:
        folder: Into which the archive was unpacked.
        split: "train", "val" or "test".
        splits: The JSON file, of each split the lists "path", "score" and "step"; by default
            cnn_park_splits.json, in the folder or beside it. Paths are relative to the folder,
            with or without their first part. Where there is no such file, the runs in the order
            of their names are split as those of ``l2o_graph.datasets.zoo``.

    Returns:
        The networks in the order of the JSON file, else by path. ``run`` counts the folders of
        runs as they come.

    Raises:
        ValueError: For an unknown split, and files that are missing or damaged; each by name.
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
    """Checkpoints of all runs of a split, by path."""
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
        # Its own reader of pickles refuses what is not a tensor; ours makes nothing of it.
        content = torch.load(path, "cpu", weights_only=False, pickle_module=_PICKLE)
        config = _plain(content["config"])
        architecture = CNNArchitecture(
            channels=tuple(config["channels"]),
            kernels=tuple(config["kernel_size"]),
            activations=tuple("" if name == "none" else name for name in config["activation"]),
            # What convolution r gives is layer r + 1 here.
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


# Pickles without their code --------------------------------------------------------------------


class _Opaque:
    """Stands for an object of any class: what it was made of, and nothing that it can do."""

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            vars(self).update(state)

    def append(self, entry: Any) -> None:
        """What a sequence holds is not asked for."""

    def __setitem__(self, key: Any, entry: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in TRUSTED:
            return super().find_class(module_name, global_name)
        return _Opaque


# What torch.load asks of a module of its choice.
_PICKLE: Any = SimpleNamespace(Unpickler=_Unpickler, __name__="pickle")


def _plain(value: Any) -> Any:
    """What is in omegaconf's nodes: _content of dicts and lists, _val of single values."""
    inner = getattr(value, "_content", getattr(value, "_val", value))
    if isinstance(inner, Mapping):
        return {key: _plain(each) for key, each in inner.items()}
    return [_plain(each) for each in inner] if isinstance(inner, list | tuple) else inner
