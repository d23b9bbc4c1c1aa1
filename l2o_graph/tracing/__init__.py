"""Graph of a network by tracing: which parameter joins which neurons."""

from l2o_graph.tracing import norms, products, recurrent, shapes  # noqa: F401  they register rules
from l2o_graph.tracing.network import register_layer, spec_of_computation

__all__ = ["register_layer", "spec_of_computation"]
