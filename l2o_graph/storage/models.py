"""Model checkpoints: weights with a configuration and a provenance in the header."""

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
    """Build the model of a checkpoint: frozen, in float32, on the CPU.

    Args:
        tensors: State dict of the model.
        metadata: Metadata, with "config" and "provenance" as JSON.
        origin: Name or path of the checkpoint, for errors.
        what: Description of the configuration, for errors, such as "a RuleConfig".
        make: Function that builds the model, which has a ``config``, from its configuration.

    Returns:
        The model and its provenance.

    Raises:
        ValueError: For missing metadata, an invalid configuration, tensors of another model, or
            weights that are not finite.
    """
    with expecting(f"checkpoint '{origin}': expected {what} and a provenance in its header"):
        record, provenance = (json.loads(metadata[key]) for key in ("config", "provenance"))
        # No initialisation: it would advance the user's random generators.
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
    """Save the weights of a model in float32, atomically: on failure, an earlier file remains.

    Args:
        path: Path of the checkpoint.
        model: Model to save.
        kind: Format, as the metadata names it.
        config: Configuration that the model can be built from.
        provenance: Record of how the model was made.
        **more: Further metadata.

    Raises:
        ValueError: For weights that are not finite.
        OSError: If the path is not writable.
    """
    tensors = {
        name: t.detach().to("cpu", torch.float32).contiguous()
        for name, t in model.state_dict().items()
    }
    check_finite(tensors, str(path))
    own = {"config": json.dumps(config), "provenance": json.dumps(provenance)}
    write_atomically(path, save(tensors, {"format": kind, **more, **own}))


def identity_of(name: str, version: int, model: nn.Module) -> str:
    """Return a name with a hash of a model's weights and configuration: "general@0123456789ab".

    The file itself is not hashed, because safetensors does not fix the order of its entries.
    """
    digest = hashlib.sha256(f"({version}, {model.config})".encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode() + tensor.to("cpu", torch.float32).numpy().tobytes())
    return f"{name}@{digest.hexdigest()[:12]}"


def check_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise a ValueError that names the tensors that are not finite, if there are any."""
    bad = [name for name, t in tensors.items() if not bool(t.isfinite().all())]
    if bad:
        raise ValueError(f"checkpoint '{origin}': expected finite weights, found others in {bad}")
