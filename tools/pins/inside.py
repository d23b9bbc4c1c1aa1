"""Pins of the tree that this process imports, into a file: ``python -m pins.inside OUT GROUPS``."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .commands import data_pins, help_pins, training_pins
from .find import Made
from .networks import structure_pins
from .optimizers import evolution_pins, optimizer_pins, paper_pins
from .readers import model_pins, reader_pins

Pins = dict[str, str]

GROUPS: dict[str, Callable[[], Made]] = {
    "data": data_pins,
    "evolution": evolution_pins,
    "help": help_pins,
    "models": model_pins,
    "optimizer": optimizer_pins,
    "paper": paper_pins,
    "readers": reader_pins,
    "structure": structure_pins,
    "training": training_pins,
}


def inside(out: Path, groups: list[str]) -> None:
    """Make pins of what is imported here."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    found: Pins = {}
    for group in groups:
        for name, make in GROUPS[group]():
            torch.manual_seed(0)
            try:
                value = bits(make())
            except Exception as error:  # named and compared like any other result
                value = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            found[f"{group}/{name}"] = value
    out.write_text(json.dumps(found))


def bits(value: Any) -> str:
    """A short hash of tensors, numbers, texts and bytes, in lists or dictionaries."""
    digest = hashlib.sha256()

    def add(x: Any) -> None:
        if isinstance(x, Tensor):
            digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
            digest.update(x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(x, dict):
            for key, each in x.items():
                digest.update(str(key).encode())
                add(each)
        elif isinstance(x, list | tuple):
            for each in x:
                add(each)
        else:
            digest.update(x if isinstance(x, bytes) else repr(x).encode())

    add(value)
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    inside(Path(sys.argv[1]), sys.argv[2:])
