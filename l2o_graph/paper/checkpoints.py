"""Rules of the paper's optimizer as files: safetensors with configuration and provenance."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l2o_graph.paper.features import FEATURE_VERSION
from l2o_graph.paper.rule import RuleConfig, UpdateRule
from l2o_graph.storage.files import parse
from l2o_graph.storage.models import model_of, save_model

FORMAT = "l2o_graph learned optimizer"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A stored rule.

    Attributes:
        identity: Name and beginning of a SHA-256 of configuration and weights.
        rule: The network, frozen, in float32 on the CPU.
        provenance: Record of the training: command, commit, data, outer steps, time, curve.
    """

    identity: str
    rule: UpdateRule
    provenance: dict[str, Any]


def load_checkpoint(checkpoint: str | Path) -> Checkpoint:
    """Load a rule from a file; none is packaged.

    Args:
        checkpoint: Path to a .safetensors file of ``python -m meta_train --preset paper``.

    Raises:
        ValueError: For a file that is damaged, is not the rule of a learned optimizer or has other
            features.
        FileNotFoundError: For a path that does not exist.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint '{path}': expected a file, found none")
    content, origin = path.read_bytes(), str(path)
    tensors, metadata = parse(content, origin, FORMAT, "a learned optimizer of the paper's")
    if metadata.get("feature_version") != str(FEATURE_VERSION):
        raise ValueError(
            f"checkpoint '{origin}': expected feature version {FEATURE_VERSION}, that of this "
            f"package, found {metadata.get('feature_version')}"
        )
    rule, provenance = model_of(
        tensors, metadata, origin, "a RuleConfig", lambda record: UpdateRule(RuleConfig(**record))
    )
    return Checkpoint(f"{path.stem}@{_digest(rule)}", rule, provenance)


def save_checkpoint(path: Path, rule: UpdateRule, provenance: dict[str, Any]) -> None:
    """Store a rule with its provenance, as float32, in one atomic write.

    Raises:
        ValueError: For weights that are not finite.
        OSError: If the path cannot be written to.
    """
    version = str(FEATURE_VERSION)
    save_model(path, rule, FORMAT, asdict(rule.config), provenance, feature_version=version)


def _digest(rule: UpdateRule) -> str:
    """Hash the configuration and weights, sorted by name: safetensors fixes no order."""
    digest = hashlib.sha256(f"({FEATURE_VERSION}, {rule.config})".encode())
    for name, tensor in sorted(rule.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()[:12]
