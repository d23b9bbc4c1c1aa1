"""Common parts of the configurations of models of INRs and of CNNs."""

from collections.abc import Sequence
from typing import Any

GRAPH_MODELS = ("ng_gnn", "ng_t")  # of the paper
ON_GRAPHS = (*GRAPH_MODELS, "ordered")


class ReaderConfig:
    """Base of configurations of weight-space models."""

    __slots__ = ()
    model: Any
    reverse: Any

    @property
    def both_ways(self) -> bool:
        """Whether messages also go against the flow."""
        return self.reverse or self.model == "ng_t"

    def check_options(self, **options: tuple[Any, Sequence[str]]) -> None:
        """Raise for options that a model does not have.

        Args:
            options: Neutral value of each option, and the models that have the option.

        Raises:
            ValueError: For the first option that is set for another model, naming it.
        """
        for name, (nothing, models) in options.items():
            if self.model not in models and getattr(self, name) != nothing:
                raise ValueError(
                    f"{name}: expected model {' or '.join(map(repr, models))}, found '{self.model}'"
                )
