"""Models from files that say in their header what they are made of, and how they came about."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from l2o_graph.storage.files import write_atomically

M = TypeVar("M", bound=nn.Module)


def model_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    origin: str,
    what: str,
    make: Callable[[dict[str, Any]], M],
) -> tuple[M, dict[str, Any]]:
    """Make the model of a file, frozen, in float32 on the CPU.

    Args:
        tensors: The weights in the file.
        metadata: The header of the file, with "config" and "provenance" as JSON.
        origin: Place of the file, for errors.
        what: Kind of the configuration, for errors, as "a RuleConfig".
        make: Maker of a model, with a ``config``, from a configuration as JSON holds it.

    Returns:
        The model and its provenance.

    Raises:
        ValueError: For a header without both, a configuration that makes no model, and tensors of
            another model.
    """
    try:
        record, provenance = (json.loads(metadata[key]) for key in ("config", "provenance"))
        # Weights come from the file: drawing them would disturb the user's random numbers.
        with torch.device("meta"):
            model = make(record)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"checkpoint '{origin}': expected {what} and a provenance as JSON in its header, "
            f"found config {metadata.get('config')!r:.200}: {error!r}"
        ) from error
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
    """Store a model; the file appears whole or not at all.

    Args:
        path: Destination; what was there before stays if anything fails.
        model: Model whose weights are stored, as float32.
        kind: Format, as the header names it.
        config: Configuration, as JSON can hold it.
        provenance: History of the model, likewise.
        more: Further entries of the header.

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


def check_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Refuse weights that are not finite, by name."""
    bad = [name for name, t in tensors.items() if not bool(t.isfinite().all())]
    if bad:
        raise ValueError(f"checkpoint '{origin}': expected finite weights, found others in {bad}")
