"""What configurations of models of INRs and of CNNs have in common."""

from typing import Any

GRAPH_MODELS = ("ng_gnn", "ng_t")


class ReaderConfig:
    """Configuration of a model that reads networks, as a graph or otherwise."""

    __slots__ = ()
    model: Any
    reverse: Any

    @property
    def both_ways(self) -> bool:
        """Whether messages also go against the flow."""
        return self.reverse or self.model == "ng_t"

    def check_options_of_graphs(self, **neutral: Any) -> None:
        """Refuse options of graph models for other models.

        Args:
            neutral: Value of each option that asks for nothing, by name.

        Raises:
            ValueError: For the first option of another value, naming it.
        """
        if self.model in GRAPH_MODELS:
            return
        for name, nothing in neutral.items():
            if getattr(self, name) != nothing:
                raise ValueError(
                    f"{name}: expected model {' or '.join(map(repr, GRAPH_MODELS))}, found "
                    f"'{self.model}'"
                )
