"""Learned optimizers that read the network they train as a graph.

Axes, wherever shapes are written: N nodes, E edges, P parameters (scalars), F features, H hidden
channels, K positions of a kernel, n a run of scalars, *B any batch axes.
"""

from l2o_graph.cnn import GeneralizationPredictor, predict_accuracy
from l2o_graph.graph.neural import NeuralGraph, neural_graph
from l2o_graph.inr import INRClassifier, INREditor
from l2o_graph.optim.base import LearnedOptimizer
from l2o_graph.optim.checkpoints import list_checkpoints
from l2o_graph.optim.optimizer import NGOptimizer
from l2o_graph.paper.optimizer import PaperOptimizer
from l2o_graph.paper.readers import register_reader
from l2o_graph.tracing import register_layer

__all__ = [
    "GeneralizationPredictor",
    "INRClassifier",
    "INREditor",
    "LearnedOptimizer",
    "NGOptimizer",
    "NeuralGraph",
    "PaperOptimizer",
    "list_checkpoints",
    "neural_graph",
    "predict_accuracy",
    "register_layer",
    "register_reader",
]
