"""Sets of INRs as sharded safetensors: written whole or not at all, checked when read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from l2o_graph.datasets.inr.siren import layout_of
from l2o_graph.storage.files import expecting
from l2o_graph.storage.shards import (
    Format,
    differences,
    named,
    read_record,
    read_tensors,
    shard_name,
    write_tensors,
)

FORMAT = Format("INRs", "l2o_graph INRs", 1)


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
        layout: Widths, from the two coordinates to the channels of an image.
        omega0: Factor in every sine.
    """

    weights: tuple[Float[Tensor, "I _ _"], ...]
    biases: tuple[Float[Tensor, "I _"], ...]
    labels: Int64[Tensor, " I"]
    index: Int64[Tensor, " I"]
    view: Int64[Tensor, " I"]
    psnr: Float[Tensor, " I"] | None
    layout: tuple[int, ...]
    omega0: float

    def __len__(self) -> int:
        return len(self.labels)


def load_inrs(folder: str | Path, split: str) -> INRs:
    """Read what ``python -m l2o_graph.datasets.inr --out FOLDER`` wrote, in its order.

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
    found = sorted(folder.glob(f"{split}-*.safetensors"))
    if not found:
        raise ValueError(
            f"INRs '{folder}': expected shards of split '{split}', {shard_name(split, 0)} and on, "
            "found none; python -m l2o_graph.datasets.inr makes them"
        )
    first = read_record(found[0], FORMAT)
    with expecting(f"INRs '{found[0]}': expected a number of shards and omega0 in its header"):
        names = [shard_name(split, i) for i in range(first["shards"])]
        omega0 = float(first["omega0"])
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"INRs '{folder}': expected {len(names)} shards of split '{split}', found "
            f"{len(names) - len(missing)}: {named(missing)} missing; the command that fitted "
            "them fits what is missing"
        )
    shards = []
    for number, name in enumerate(names):
        record = read_record(folder / name, FORMAT)
        difference = differences({**first, "shard": number}, record)
        if difference:
            raise ValueError(f"INRs '{folder / name}': of another run than the rest: {difference}")
        shards.append(read_tensors(folder / name))
    with expecting(f"INRs '{folder}', split '{split}': expected the same tensors in all shards"):
        tensors = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
        weights, biases = _of(tensors, "weight"), _of(tensors, "bias")
        labels, index, view = (tensors[name] for name in ("label", "index", "view"))
    return checked(
        weights,
        biases,
        labels=labels,
        index=index,
        view=view,
        psnr=tensors.get("psnr"),
        omega0=omega0,
        origin=f"'{folder}', split '{split}'",
    )


def write_shard(path: Path, inrs: INRs, record: Mapping[str, Any]) -> None:
    """Write a shard: the tensors of ``inrs``, and a record of how they came about.

    Args:
        path: Where to; the same content gives the same bytes.
        inrs: The networks, each with its PSNR.
        record: Anything that JSON can hold; "split", "shard", "shards" and "omega0" are read back.

    Raises:
        OSError: For a place that cannot be written to.
    """
    tensors = {f"weight.{i}": t for i, t in enumerate(inrs.weights)}
    tensors |= {f"bias.{i}": t for i, t in enumerate(inrs.biases)}
    tensors |= {"label": inrs.labels, "index": inrs.index, "view": inrs.view}
    if inrs.psnr is not None:
        tensors["psnr"] = inrs.psnr
    write_tensors(path, tensors, record, FORMAT)


def checked(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    labels: Tensor,
    index: Tensor,
    view: Tensor,
    psnr: Tensor | None,
    omega0: float,
    origin: str,
) -> INRs:
    """Put a set together.

    Raises:
        ValueError: For tensors that do not make networks and for networks that are not finite,
            which it names; ``origin`` is where it says that they lie.
    """
    layout = layout_of(weights, biases)
    count = len(weights[0])
    for name, numbers in {"label": labels, "index": index, "view": view, "psnr": psnr}.items():
        if numbers is not None and numbers.shape != (count,):
            raise ValueError(
                f"INRs {origin}: expected a {name} for each of {count} networks, found "
                f"{list(numbers.shape)}"
            )
    sound = torch.ones(len(labels), dtype=torch.bool)
    for tensor in (*weights, *biases):
        sound &= tensor.flatten(1).isfinite().all(1)
    if not bool(sound.all()):
        bad = [f"{i} (image {int(index[i])})" for i in (~sound).nonzero().flatten().tolist()]
        raise ValueError(
            f"INRs {origin}: expected finite weights, found others in {len(bad)} of "
            f"{len(labels)} networks: {named(bad)}"
        )
    return INRs(tuple(weights), tuple(biases), labels, index, view, psnr, layout, omega0)


def _of(tensors: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    """All tensors of a kind, by layer."""
    layers = sum(key.startswith(f"{kind}.") for key in tensors)
    return [tensors[f"{kind}.{i}"] for i in range(layers)]
