"""Learned optimizers that read the network they train as a graph.

Axes in the shapes of all modules: N nodes, E edges, P parameters (scalars), F features, H hidden
channels, K positions of a kernel, n consecutive scalars, *B any batch axes.
"""

import importlib
from typing import TYPE_CHECKING

from l2o_graph.optim.base import LearnedOptimizer
from l2o_graph.optim.checkpoints import list_checkpoints
from l2o_graph.optim.optimizer import NGOptimizer

# The rest is imported on first use: training needs none of it.
if TYPE_CHECKING:
    from l2o_graph import cnn as cnn
    from l2o_graph import inr as inr
    from l2o_graph.graph.neural import NeuralGraph, neural_graph
    from l2o_graph.metanets.inr import INRClassifier, INREditor
    from l2o_graph.metanets.predict import predict_accuracy
    from l2o_graph.metanets.predictor import GeneralizationPredictor
    from l2o_graph.paper.optimizer import PaperOptimizer
    from l2o_graph.paper.readers import register_reader
    from l2o_graph.tracing import register_layer

SUBMODULES = ("cnn", "inr")
LAZY = {
    "GeneralizationPredictor": "l2o_graph.metanets.predictor",
    "INRClassifier": "l2o_graph.metanets.inr",
    "INREditor": "l2o_graph.metanets.inr",
    "NeuralGraph": "l2o_graph.graph.neural",
    "PaperOptimizer": "l2o_graph.paper.optimizer",
    "neural_graph": "l2o_graph.graph.neural",
    "predict_accuracy": "l2o_graph.metanets.predict",
    "register_layer": "l2o_graph.tracing",
    "register_reader": "l2o_graph.paper.readers",
}

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


def __getattr__(name: str) -> object:
    if name in SUBMODULES:
        return importlib.import_module(f"l2o_graph.{name}")
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(LAZY[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY, *SUBMODULES})
