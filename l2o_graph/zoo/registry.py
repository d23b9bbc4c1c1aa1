"""Checkpoints by name or path: safetensors with their configuration and provenance, no pickle."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from l2o_graph.features import FEATURE_VERSION
from l2o_graph.rule import RuleConfig, UpdateRule

FORMAT = "l2o_graph learned optimizer"
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A learned optimizer as it was stored.

    Attributes:
        identity: Its name and the start of the SHA-256 of its file.
        rule: The network, frozen, in float32 on the CPU.
        provenance: How it was made: command, commit, data, outer steps, time, curve.
    """

    identity: str
    rule: UpdateRule
    provenance: dict[str, Any]


def list_checkpoints() -> list[str]:
    """Names of the checkpoints in the package."""
    files = resources.files("l2o_graph.zoo").iterdir()
    return sorted(file.name.removesuffix(SUFFIX) for file in files if file.name.endswith(SUFFIX))


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
        with resources.as_file(resources.files("l2o_graph.zoo") / (name + SUFFIX)) as file:
            return _read(file, name)
    path = Path(checkpoint)
    if path.is_file():
        return _read(path, path.stem)
    if isinstance(checkpoint, Path) or path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"checkpoint file '{path}' does not exist")
    raise ValueError(
        f"unknown checkpoint '{name}', expected one of {list_checkpoints()} or a path to a file"
    )


def save_checkpoint(path: Path, rule: UpdateRule, provenance: dict[str, Any]) -> None:
    """Store a learned optimizer; the file appears whole or not at all."""
    metadata = {
        "format": FORMAT,
        "feature_version": str(FEATURE_VERSION),
        "config": json.dumps(asdict(rule.config)),
        "provenance": json.dumps(provenance),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in rule.state_dict().items()}
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


def _read(path: Path, name: str) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"checkpoint '{path}' cannot be read; expected a whole safetensors file, found: {error}"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"checkpoint '{path}' is not a learned optimizer; expected format '{FORMAT}' in its "
            f"header, found {metadata.get('format')!r}"
        )
    if metadata["feature_version"] != str(FEATURE_VERSION):
        raise ValueError(
            f"checkpoint '{path}' reads feature version {metadata['feature_version']}; this "
            f"package makes version {FEATURE_VERSION}"
        )
    rule = UpdateRule(RuleConfig(**json.loads(metadata["config"])))
    try:
        rule.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"checkpoint '{path}' does not fit its configuration: {error}") from error
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise ValueError(f"checkpoint '{path}' holds weights that are not finite")
    rule.requires_grad_(False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return Checkpoint(f"{name}@{digest}", rule, json.loads(metadata["provenance"]))


def torch_default_rule(config: RuleConfig, seed: int) -> UpdateRule:
    """An untrained rule whose weights follow from the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UpdateRule(config)
