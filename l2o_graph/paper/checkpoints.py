"""The paper's rules as files: safetensors with configuration and provenance, no pickle."""

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
    """A rule as it was stored."""

    identity: str  # its name and the start of a SHA-256 of its configuration and weights
    rule: UpdateRule  # frozen, in float32 on the CPU
    provenance: dict[str, Any]  # history: command, commit, data, outer steps, time, curve


def load_checkpoint(checkpoint: str | Path) -> Checkpoint:
    """Load a file by path; none is packaged.

    Files are those of ``python -m meta_train --preset paper``.

    Raises:
        ValueError: For a file that is damaged, not the rule of a learned optimizer or made for
            other features.
        FileNotFoundError: For a path to nothing.
    """
    content, name, origin = find(Path(checkpoint), {})
    tensors, metadata = parse(content, origin, FORMAT, "a learned optimizer of the paper's")
    if metadata.get("feature_version") != str(FEATURE_VERSION):
        raise ValueError(
            f"checkpoint '{origin}': expected feature version {FEATURE_VERSION}, which this "
            f"package makes, found {metadata.get('feature_version')}"
        )
    rule, provenance = model_of(
        tensors, metadata, origin, "a RuleConfig", lambda record: UpdateRule(RuleConfig(**record))
    )
    return Checkpoint(identity_of(name, FEATURE_VERSION, rule), rule, provenance)


def save_checkpoint(path: Path, rule: UpdateRule, provenance: dict[str, Any]) -> None:
    """Store a rule, as float32, with its history; the file appears whole or not at all.

    Raises:
        ValueError: For weights that are not finite.
        OSError: For a place that cannot be written to.
    """
    version = str(FEATURE_VERSION)
    save_model(path, rule, FORMAT, asdict(rule.config), provenance, feature_version=version)
