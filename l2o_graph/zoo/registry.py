"""Checkpoints by name or path: safetensors with their configuration and provenance, no pickle."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from l2o_graph.features import FEATURE_VERSION
from l2o_graph.rule import RuleConfig, UpdateRule

FORMAT = "l2o_graph learned optimizer"
SUFFIX = ".safetensors"

# A name for whatever is best: the graph network with the lowest held-out FashionMNIST loss.
ALIASES = {"fmnist": "fmnist-ng_gnn"}


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
    files = resources.files("l2o_graph.zoo").iterdir()
    names = {file.name.removesuffix(SUFFIX) for file in files if file.name.endswith(SUFFIX)}
    return sorted(names | set(ALIASES))


def load_checkpoint(checkpoint: str | Path) -> Checkpoint:
    """Load a packaged checkpoint by name, or a file by path.

    Args:
        checkpoint: A name of :func:`list_checkpoints`, or a path to a .safetensors file.

    Raises:
        ValueError: For an unknown name, and for a file that is damaged, not a learned optimizer
            or made for other features.
        FileNotFoundError: For a path to nothing.
    """
    name = str(checkpoint)
    if name in list_checkpoints():
        file = resources.files("l2o_graph.zoo") / (ALIASES.get(name, name) + SUFFIX)
        return _parse(file.read_bytes(), name, name)
    path = Path(checkpoint)
    if path.is_file():
        return _parse(path.read_bytes(), path.stem, str(path))
    if isinstance(checkpoint, Path) or path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"checkpoint '{path}': expected a file, found none")
    raise ValueError(
        f"unknown checkpoint '{name}', expected one of {list_checkpoints()} or a path to a file"
    )


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
    tensors = {
        name: t.detach().to("cpu", torch.float32).contiguous()
        for name, t in rule.state_dict().items()
    }
    _check_finite(tensors, str(path))
    write_atomically(path, save(tensors, metadata))


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the file, then rename: a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _parse(content: bytes, name: str, origin: str) -> Checkpoint:
    """Make a checkpoint of a file's content; ``origin`` is where errors say that it lies."""
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(
            f"checkpoint '{origin}': expected a whole safetensors file, found: {error}"
        ) from error
    # A safetensors file starts with the length of its JSON header, 8 bytes, little-endian.
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header.get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint '{origin}': expected format '{FORMAT}' in its header, found "
            f"{metadata.get('format')!r}: not a learned optimizer"
        )
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
    try:
        rule.load_state_dict({key: t.float() for key, t in tensors.items()}, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"checkpoint '{origin}': expected the tensors of {config}, found others: {error}"
        ) from error
    _check_finite(tensors, origin)
    rule.requires_grad_(False)
    return Checkpoint(f"{name}@{_digest(rule)}", rule, provenance)


def _digest(rule: UpdateRule) -> str:
    """Of what the rule computes: safetensors writes the same tensors in any order."""
    digest = hashlib.sha256(repr((FEATURE_VERSION, rule.config)).encode())
    for name, tensor in sorted(rule.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]


def _check_finite(tensors: dict[str, Tensor], origin: str) -> None:
    bad = [name for name, t in tensors.items() if not bool(t.isfinite().all())]
    if bad:
        raise ValueError(f"checkpoint '{origin}': expected finite weights, found others in {bad}")
