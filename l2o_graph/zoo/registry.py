"""Checkpoints by name or path: safetensors with their configuration and provenance, no pickle."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from l2o_graph.features import FEATURE_VERSION
from l2o_graph.rule import RuleConfig, UpdateRule
from l2o_graph.zoo.files import fill, find, packaged, parse, save_module

FORMAT = "l2o_graph learned optimizer"

# A name for whatever is best: the graph network with the lowest held-out FashionMNIST loss.
ALIASES = {"fmnist": "fmnist-ng_gnn"}

# Options of a RuleConfig that the first checkpoints did not have, off in them.
LATER = ("activations",)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A learned optimizer as it was stored.

    Attributes:
        identity: Its name and the start of a SHA-256 of its configuration and weights.
        rule: The network, frozen, in float32 on the CPU.
        provenance: How it was made: command, commit, data, outer steps, time, curve.
    """

    identity: str
    rule: UpdateRule
    provenance: dict[str, Any]


def list_checkpoints() -> list[str]:
    """Names of the checkpoints in the package."""
    return sorted(_known())


def load_checkpoint(checkpoint: str | Path) -> Checkpoint:
    """Load a packaged checkpoint by name, or a file by path.

    Args:
        checkpoint: A name of :func:`list_checkpoints`, or a path to a .safetensors file.

    Raises:
        ValueError: For an unknown name, and for a file that is damaged, not a learned optimizer
            or made for other features.
        FileNotFoundError: For a path to nothing.
    """
    content, name, origin = find(checkpoint, _known())
    tensors, metadata = parse(content, origin, FORMAT, "a learned optimizer")
    if metadata.get("feature_version") != str(FEATURE_VERSION):
        raise ValueError(
            f"checkpoint '{origin}': expected feature version {FEATURE_VERSION}, which this "
            f"package makes, found {metadata.get('feature_version')}"
        )
    try:
        config = RuleConfig(**json.loads(metadata["config"]))
        provenance = json.loads(metadata["provenance"])
        # Weights come from the file: drawing them would disturb the user's random numbers.
        with torch.device("meta"):
            rule = UpdateRule(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint '{origin}': expected a RuleConfig and a provenance as JSON in its "
            f"header, found config {metadata.get('config')!r}: {error!r}"
        ) from error
    fill(rule, tensors, origin, config)
    return Checkpoint(f"{name}@{_digest(rule)}", rule, provenance)


def save_checkpoint(path: Path, rule: UpdateRule, provenance: dict[str, Any]) -> None:
    """Store a learned optimizer; the file appears whole or not at all.

    Args:
        path: Where to; what was there before stays if anything fails.
        rule: The network, its weights stored as float32.
        provenance: How it was made; anything that JSON can hold.

    Raises:
        ValueError: For weights that are not finite.
        OSError: For a place that cannot be written to.
    """
    metadata = {
        "format": FORMAT,
        "feature_version": str(FEATURE_VERSION),
        "config": json.dumps(asdict(rule.config)),
        "provenance": json.dumps(provenance),
    }
    save_module(path, rule, metadata)


def _known() -> dict[str, Callable[[], bytes]]:
    """Readers of the packaged files by name, an alias being another name."""
    files = packaged()
    return files | {alias: files[name] for alias, name in ALIASES.items()}


def _digest(rule: UpdateRule) -> str:
    """Of what the rule computes: safetensors writes the same tensors in any order."""
    # A saved optimizer names its checkpoint: options that came later count only where they are on.
    options = ", ".join(
        f"{key}={value!r}"
        for key, value in asdict(rule.config).items()
        if value or key not in LATER
    )
    digest = hashlib.sha256(f"({FEATURE_VERSION}, RuleConfig({options}))".encode())
    for name, tensor in sorted(rule.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]
