"""Sets of INRs as sharded safetensors: written whole or not at all, checked when read."""

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
    """Networks that each hold one image.

    Attributes:
        weights: Weights of each layer, (I, out, in), float32.
        biases: Biases of each layer, (I, out).
        labels: Class of each of the I images.
        index: Number of each image in the file of its dataset; validation images are numbered
            in the training file.
        view: 0, and 1 and on for further networks of the same image.
        psnr: PSNR of each network on its image, in dB; None where it is not on record.
        omega0: Factor in every sine.
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
        """Widths, from the two coordinates to the channels of an image."""
        return layout_of(self.weights, self.biases)


def load_inrs(folder: str | Path, split: str) -> INRs:
    """Read what ``python -m l2o_graph.datasets.inr --out FOLDER`` wrote.

    Args:
        folder: Where the shards lie.
        split: "train", "val" or "test".

    Returns:
        The networks of the split, on the CPU.

    Raises:
        ValueError: For shards that are missing, damaged, or of another run, and for networks
            with weights that are not finite; each by name or number.
    """
    folder = Path(folder)
    record, shards, faults = read_set(
        folder, split, KIND, lambda path: (read_record(path, KIND), read_tensors(path))
    )
    if faults:
        raise ValueError(
            f"INRs '{folder}': {len(faults)} shards of split '{split}' cannot be read: "
            f"{named(faults)}; the command that fitted them fits what is missing"
        )
    if not shards:
        raise ValueError(
            f"INRs '{folder}': expected shards of split '{split}', {shard_name(split, 0)} and on, "
            "found none; python -m l2o_graph.datasets.inr makes them"
        )
    with expecting(
        f"INRs '{folder}', split '{split}': expected omega0, and the same tensors in all"
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
    """Write networks, and a record of how they came about; the same content gives the same bytes.

    ``record`` is anything that JSON can hold; "split", "shard", "shards" and "omega0" are read
    back.
    """
    tensors = {f"weight.{i}": t for i, t in enumerate(inrs.weights)}
    tensors |= {f"bias.{i}": t for i, t in enumerate(inrs.biases)}
    tensors |= {"label": inrs.labels, "index": inrs.index, "view": inrs.view}
    if inrs.psnr is not None:
        tensors["psnr"] = inrs.psnr
    write_tensors(path, tensors, record, KIND)


def checked(inrs: INRs, origin: str) -> INRs:
    """Refuse what are not networks, by layer, and networks that are not finite, by number.

    Raises:
        ValueError: For these; ``origin`` is where it says that they lie.
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
