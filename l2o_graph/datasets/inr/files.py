"""Sets of INRs in sharded safetensors files, with atomic writes and checks when loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from l2o_graph.datasets.inr.siren import layout_of
from l2o_graph.storage.files import expecting
from l2o_graph.storage.shards import (
    named,
    read_record,
    read_set,
    read_tensors,
    shard_name,
    write_tensors,
)

KIND = "INRs"


@dataclass(frozen=True, slots=True)
class INRs:
    """Networks that represent one image each.

    Attributes:
        weights: Weights of each layer, (I, out, in), float32.
        biases: Biases of each layer, (I, out).
        labels: Class of each image, (I,).
        index: Index of each image in its dataset, (I,); for validation images, in the training
            set.
        view: Number of each network among those of the same image, from 0, (I,).
        psnr: PSNR of each network on its image, in dB, (I,); None if unknown.
        omega0: Frequency factor of the sines.
    """

    weights: tuple[Float[Tensor, "I _ _"], ...]
    biases: tuple[Float[Tensor, "I _"], ...]
    labels: Int64[Tensor, " I"]
    index: Int64[Tensor, " I"]
    view: Int64[Tensor, " I"]
    psnr: Float[Tensor, " I"] | None
    omega0: float

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def layout(self) -> tuple[int, ...]:
        """Widths of all layers, from the two coordinates to the channels of an image."""
        return layout_of(self.weights, self.biases)


def load_inrs(folder: str | Path, split: str) -> INRs:
    """Load networks that ``python -m l2o_graph.datasets.inr --out FOLDER`` wrote.

    Args:
        folder: Folder of the shards.
        split: "train", "val" or "test".

    Returns:
        Networks of the split, on the CPU.

    Raises:
        ValueError: For shards that are missing, damaged or of different sets, and for networks with
            weights that are not finite, naming them.
    """
    folder = Path(folder)
    record, shards, faults = read_set(
        folder, split, KIND, lambda path: (read_record(path, KIND), read_tensors(path))
    )
    if faults:
        raise ValueError(
            f"INRs '{folder}': {len(faults)} shards of split '{split}' cannot be read: "
            f"{named(faults)}; run the same command again to fit them"
        )
    if not shards:
        raise ValueError(
            f"INRs '{folder}': expected shards of split '{split}', {shard_name(split, 0)} and so "
            "on, found none; fit them by python -m l2o_graph.datasets.inr"
        )
    with expecting(
        f"INRs '{folder}', split '{split}': expected omega0, and the same tensors in all shards"
    ):
        tensors = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
        layers = range(sum(key.startswith("weight.") for key in tensors))
        inrs = INRs(
            tuple(tensors[f"weight.{i}"] for i in layers),
            tuple(tensors[f"bias.{i}"] for i in layers),
            labels=tensors["label"],
            index=tensors["index"],
            view=tensors["view"],
            psnr=tensors.get("psnr"),
            omega0=float(record["omega0"]),
        )
    return checked(inrs, f"'{folder}', split '{split}'")


def write_shard(path: Path, inrs: INRs, record: Mapping[str, Any]) -> None:
    """Write networks to a file; equal content gives equal bytes.

    ``record`` is a JSON object that describes the set, with entries "split", "shard", "shards" and
    "omega0".
    """
    tensors = {f"weight.{i}": t for i, t in enumerate(inrs.weights)}
    tensors |= {f"bias.{i}": t for i, t in enumerate(inrs.biases)}
    tensors |= {"label": inrs.labels, "index": inrs.index, "view": inrs.view}
    if inrs.psnr is not None:
        tensors["psnr"] = inrs.psnr
    write_tensors(path, tensors, record, KIND)


def checked(inrs: INRs, origin: str) -> INRs:
    """Return the networks if they are valid.

    Raises:
        ValueError: For tensors that do not form networks, and weights that are not finite, with
            ``origin`` in the message.
    """
    parameters = (*inrs.weights, *inrs.biases)
    layout_of(inrs.weights, inrs.biases)
    count = len(inrs.weights[0])
    for name in ("labels", "index", "view", "psnr"):
        numbers = getattr(inrs, name)
        if numbers is not None and numbers.shape != (count,):
            raise ValueError(
                f"INRs {origin}: expected {name} of {count} networks, found {list(numbers.shape)}"
            )
    sound = torch.stack([t.flatten(1).isfinite().all(1) for t in parameters]).all(0)
    if not bool(sound.all()):
        bad = [f"{i} (image {inrs.index[i]})" for i in (~sound).nonzero().flatten().tolist()]
        raise ValueError(
            f"INRs {origin}: expected finite weights, found others in {len(bad)} of {count} "
            f"networks: {named(bad)}"
        )
    return inrs
