"""Learned optimizers that read the network they train as a graph.

Axes, wherever shapes are written: N nodes, E edges, P parameters (scalars), F features, H hidden
channels, K positions of a kernel, n a run of scalars, *B any batch axes.
"""

from l2o_graph.cnn import GeneralizationPredictor, predict_accuracy
from l2o_graph.graph import NeuralGraph, neural_graph
from l2o_graph.inr import INRClassifier, INREditor
from l2o_graph.optimizer import (
    FFOptimizer,
    LearnedOptimizer,
    LSTMOptimizer,
    NFNOptimizer,
    NGOptimizer,
)
from l2o_graph.tracing import register_layer
from l2o_graph.zoo.registry import list_checkpoints

__all__ = [
    "FFOptimizer",
    "GeneralizationPredictor",
    "INRClassifier",
    "INREditor",
    "LSTMOptimizer",
    "LearnedOptimizer",
    "NFNOptimizer",
    "NGOptimizer",
    "NeuralGraph",
    "list_checkpoints",
    "neural_graph",
    "predict_accuracy",
    "register_layer",
]
