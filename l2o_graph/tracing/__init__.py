"""Following a network's computation: which parameter joins which neurons."""

from l2o_graph.tracing import norms, products, recurrent, shapes  # noqa: F401  rules are registered on import
from l2o_graph.tracing.network import register_layer, spec_of_computation

__all__ = ["register_layer", "spec_of_computation"]
