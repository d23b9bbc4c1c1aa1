"""Controllers as files: safetensors with configuration and provenance, without pickle."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l2o_graph.optim.controller import Controller, ControllerConfig
from l2o_graph.storage.files import find, header, packaged, parse
from l2o_graph.storage.models import identity_of, model_of, save_model

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
    """Load a packaged checkpoint by its name in ``list_checkpoints()``, or a file by path.

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
    controller, provenance = model_of(
        tensors, metadata, origin, "a ControllerConfig",
        lambda record: Controller(ControllerConfig(**record)),
    )  # fmt: skip
    return Checkpoint(identity_of(name, RULE_VERSION, controller), controller, provenance)


def checkpoint_of(controller: Controller) -> Checkpoint:
    """Copy a controller in memory into a checkpoint; its identity is that of its file."""
    own = copy.deepcopy(controller).requires_grad_(False)
    return Checkpoint(identity_of("controller", RULE_VERSION, own), own, {})


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
