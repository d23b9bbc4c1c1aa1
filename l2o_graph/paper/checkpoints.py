"""Rules of the paper's optimizer as files: safetensors with configuration and provenance."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from l2o_graph.paper.features import FEATURE_VERSION
from l2o_graph.paper.rule import RuleConfig, UpdateRule
from l2o_graph.storage.files import find, parse
from l2o_graph.storage.models import identity_of, model_of, save_model

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

    Files are those of ``python -m meta_train --preset paper``.

    Raises:
        ValueError: For a file that is damaged, is not the rule of a learned optimizer or has other
            features.
        FileNotFoundError: For a path that does not exist.
    """
    content, name, origin = find(Path(checkpoint), {})
    tensors, metadata = parse(content, origin, FORMAT, "a learned optimizer of the paper's")
    if metadata.get("feature_version") != str(FEATURE_VERSION):
        raise ValueError(
            f"checkpoint '{origin}': expected feature version {FEATURE_VERSION}, that of this "
            f"package, found {metadata.get('feature_version')}"
        )
    rule, provenance = model_of(
        tensors, metadata, origin, "a RuleConfig", lambda record: UpdateRule(RuleConfig(**record))
    )
    return Checkpoint(identity_of(name, FEATURE_VERSION, rule), rule, provenance)


def save_checkpoint(path: Path, rule: UpdateRule, provenance: dict[str, Any]) -> None:
    """Store a rule with its provenance, as float32, in one atomic write.

    Raises:
        ValueError: For weights that are not finite.
        OSError: If the path cannot be written to.
    """
    version = str(FEATURE_VERSION)
    save_model(path, rule, FORMAT, asdict(rule.config), provenance, feature_version=version)
