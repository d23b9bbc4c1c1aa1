"""Models from files that say in their header what they are made of, and how they came about."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from l2o_graph.storage.files import expecting, write_atomically

M = TypeVar("M", bound=nn.Module)


def model_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    origin: str,
    what: str,
    make: Callable[[dict[str, Any]], M],
) -> tuple[M, dict[str, Any]]:
    """Make the model of a file, frozen, in float32 on the CPU; and its provenance.

    ``make`` gives a model, with a ``config``, from the "config" that the header of the file holds
    as JSON. Errors say where it lies and what it is, as "a RuleConfig".

    Raises:
        ValueError: For a header without both, a configuration that makes no model, and tensors of
            another model.
    """
    with expecting(f"checkpoint '{origin}': expected {what} and a provenance in its header"):
        record, provenance = (json.loads(metadata[key]) for key in ("config", "provenance"))
        # Weights come from the file: drawing them would disturb the user's random numbers.
        with torch.device("meta"):
            model = make(record)
    try:
        model.load_state_dict({key: t.float() for key, t in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint '{origin}': expected the tensors of {model.config}, found others: {error}"
        ) from error
    check_finite(tensors, origin)
    return model.requires_grad_(False), provenance


def save_model(
    path: Path,
    model: nn.Module,
    kind: str,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    **more: str,
) -> None:
    """Store the weights of a model as float32; the file appears whole or not at all.

    Its header names the format, ``kind``, and what else is given. What was there before stays if
    anything fails.

    Raises:
        ValueError: For weights that are not finite.
        OSError: For a place that cannot be written to.
    """
    tensors = {
        name: t.detach().to("cpu", torch.float32).contiguous()
        for name, t in model.state_dict().items()
    }
    check_finite(tensors, str(path))
    own = {"config": json.dumps(config), "provenance": json.dumps(provenance)}
    write_atomically(path, save(tensors, {"format": kind, **more, **own}))


def identity_of(name: str, version: int, model: nn.Module) -> str:
    """A name, and the start of a SHA-256 of what a model computes, as "general@0123456789ab".

    Not of its file: safetensors writes the same tensors in any order.
    """
    digest = hashlib.sha256(f"({version}, {model.config})".encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.to("cpu", torch.float32).numpy().tobytes())
    return f"{name}@{digest.hexdigest()[:12]}"


def check_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Refuse weights that are not finite, by name."""
    bad = [name for name, t in tensors.items() if not bool(t.isfinite().all())]
    if bad:
        raise ValueError(f"checkpoint '{origin}': expected finite weights, found others in {bad}")
