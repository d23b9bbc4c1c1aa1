"""Sets of INRs as sharded safetensors: written whole or not at all, checked when read."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from l2o_graph.inr.siren import layout_of
from l2o_graph.zoo.files import write_atomically

FORMAT = "l2o_graph INRs"
VERSION = 1

NAMED = 10  # of many faults, an error names this many


@dataclass(frozen=True, slots=True)
class INRs:
    """Networks that each hold one image.

    Attributes:
        weights: Of each layer (I, out, in), float32.
        biases: Of each layer (I, out).
        labels: Class of each image.
        index: Number of each image in the file of its dataset; validation images are numbered
            in the training file.
        view: 0, and 1 and on for further networks of the same image.
        psnr: Of each network on its image, in dB; None where it is not on record.
        layout: Widths, from the two coordinates to the grey value.
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

    Raises:
        ValueError: For shards that are missing, damaged, or of another run, and for networks
            with weights that are not finite; each by name or number.
    """
    folder = Path(folder)
    found = sorted(folder.glob(f"{split}-*.safetensors"))
    if not found:
        raise ValueError(
            f"INRs '{folder}': expected shards of split '{split}', {shard_name(split, 0)} and on, "
            "found none"
        )
    first = read_record(found[0])
    names = [shard_name(split, i) for i in range(first["shards"])]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"INRs '{folder}': expected {len(names)} shards of split '{split}', found "
            f"{len(names) - len(missing)}: {named(missing)} missing; the command that fitted "
            "them fits what is missing"
        )
    shards = []
    for number, name in enumerate(names):
        record = read_record(folder / name)
        difference = differences({**first, "shard": number}, record)
        if difference:
            raise ValueError(f"INRs '{folder / name}': of another run than the rest: {difference}")
        shards.append(_read_tensors(folder / name))
    tensors = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    return checked(
        _of(tensors, "weight"),
        _of(tensors, "bias"),
        labels=tensors["label"],
        index=tensors["index"],
        view=tensors["view"],
        psnr=tensors["psnr"],
        omega0=first["omega0"],
        origin=f"'{folder}', split '{split}'",
    )


def shard_name(split: str, number: int) -> str:
    """File of a shard, counted from 0."""
    return f"{split}-{number:05d}.safetensors"


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
    content = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    # One entry: safetensors would write several in any order.
    header = {"record": json.dumps({"format": FORMAT, "version": VERSION, **record})}
    write_atomically(path, save(content, header))


def read_record(path: Path) -> dict[str, Any]:
    """The record of a shard, whose tensors are there in full but not read.

    Raises:
        ValueError: For a file that is damaged or something else.
        OSError: For one that cannot be opened.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        record = json.loads(metadata.get("record", "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"INRs '{path}': expected a whole safetensors file, found: {error}"
        ) from error
    if (record.get("format"), record.get("version")) != (FORMAT, VERSION):
        raise ValueError(
            f"INRs '{path}': expected format '{FORMAT}', version {VERSION}, in its header, found "
            f"{record.get('format')!r}, {record.get('version')!r}"
        )
    return record


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a shard, without the others."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Where two records differ, in words; the version of torch may."""
    return ", ".join(
        f"{key} is {found.get(key)}, not {expected[key]}"
        for key in expected
        if key != "torch" and found.get(key) != expected[key]
    )


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


def named(faults: Sequence[str]) -> str:
    """The first of many."""
    more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
    return ", ".join(faults[:NAMED]) + more


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        # safe_open has keys() but is not iterable, which the linter cannot know.
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _of(tensors: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    """All tensors of a kind, by layer."""
    layers = sum(key.startswith(f"{kind}.") for key in tensors)
    return [tensors[f"{kind}.{i}"] for i in range(layers)]
