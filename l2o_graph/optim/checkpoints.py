"""Controllers as files: safetensors with configuration and provenance, without pickle."""

import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from l2o_graph.optim.controller import Controller, ControllerConfig
from l2o_graph.storage.files import find, header, packaged, parse
from l2o_graph.storage.models import model_of, save_model

FORMAT, OLD_FORMAT = "l2o_graph controller", "l2o_graph learned optimizer"
# Incremented whenever signals, or the meaning of a controller's outputs, change.
RULE_VERSION = 7


# Further names of packaged controllers.
ALIASES = {"fmnist": "general"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A stored controller."""

    identity: str  # name and beginning of a SHA-256 of configuration and weights
    controller: Controller  # frozen, in float32 on the CPU
    provenance: dict[str, Any]  # history: command, commit, outer steps, time, curve


def list_checkpoints() -> list[str]:
    """List the names of the checkpoints in the package."""
    return sorted(_known())


def load_checkpoint(checkpoint: str | Path) -> Checkpoint:
    """Load a packaged checkpoint by name, or a file by path.

    Args:
        checkpoint: A name of ``list_checkpoints()``, or a path to a .safetensors file.

    Raises:
        ValueError: For an unknown name, and for a file that is damaged, is not a controller, or
            has another version of the rule.
        FileNotFoundError: For a path that does not exist.
    """
    content, name, origin = find(checkpoint, _known())
    metadata = header(content, origin)
    kind, found = metadata.get("format"), metadata.get("rule_version")
    if kind == OLD_FORMAT or (kind == FORMAT and found != str(RULE_VERSION)):
        raise ValueError(
            f"checkpoint '{origin}': expected version {RULE_VERSION} of the rule, found "
            f"{found or 'an older one, or a file of --preset paper, which is for PaperOptimizer'}; "
            f"train it again with python -m meta_train, or use one of {list_checkpoints()}"
        )
    tensors, metadata = parse(content, origin, FORMAT, "a controller")

    def make(record: dict[str, Any]) -> Controller:
        return Controller(ControllerConfig(**record))

    controller, provenance = model_of(tensors, metadata, origin, "a ControllerConfig", make)
    return Checkpoint(f"{name}@{_digest(controller)}", controller, provenance)


def checkpoint_of(controller: Controller) -> Checkpoint:
    """Copy a controller in memory into a checkpoint; its identity is that of its file."""
    own = copy.deepcopy(controller).requires_grad_(False)
    return Checkpoint(f"controller@{_digest(own)}", own, {})


def save_controller(path: Path, controller: Controller, provenance: dict[str, Any]) -> None:
    """Store a controller with its provenance, as float32, in one atomic write.

    Raises:
        ValueError: For weights that are not finite.
        OSError: If the path cannot be written to.
    """
    config, version = asdict(controller.config), str(RULE_VERSION)
    save_model(path, controller, FORMAT, config, provenance, rule_version=version)


def _known() -> dict[str, Callable[[], bytes]]:
    """Readers of the packaged files by name, aliases included."""
    files = packaged("controllers")
    return files | {alias: files[name] for alias, name in ALIASES.items() if name in files}


def _digest(controller: Controller) -> str:
    """Hash the configuration and weights, sorted by name: safetensors fixes no order."""
    digest = hashlib.sha256(f"({RULE_VERSION}, {controller.config})".encode())
    for name, tensor in sorted(controller.state_dict().items()):
        digest.update(name.encode() + tensor.to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:12]
