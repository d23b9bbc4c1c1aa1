"""Networks as graphs: ``NeuralGraph`` and its exchange formats."""

from l2o_graph.graph.neural import NeuralGraph, neural_graph

__all__ = ["NeuralGraph", "neural_graph"]
