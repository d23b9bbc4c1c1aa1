"""CNNs as data: training many of them, storing them with their accuracy, and predicting it.

``GeneralizationPredictor`` reads such networks and predicts their accuracy.

Axes, in addition to those of ``l2o_graph``: I networks (CNNs), B images of a batch, D directed
edges, S segments of them.
"""

from l2o_graph.datasets.cnn.architecture import CNNArchitecture, cnn_module
from l2o_graph.datasets.cnn.augment import augmented
from l2o_graph.datasets.cnn.files import CNNs, chosen, load_cnns
from l2o_graph.datasets.cnn.published import read_small_zoo, read_wild_park
from l2o_graph.metanets.cnn_config import CNNModelConfig, cnn_config, register_cnn_model
from l2o_graph.metanets.intervals import AccuracyPrediction
from l2o_graph.metanets.predict import predict_accuracy
from l2o_graph.metanets.predictor import (
    GeneralizationPredictor,
    list_cnn_models,
    save_cnn_model,
)

__all__ = [
    "AccuracyPrediction",
    "CNNArchitecture",
    "CNNModelConfig",
    "CNNs",
    "GeneralizationPredictor",
    "augmented",
    "chosen",
    "cnn_config",
    "cnn_module",
    "list_cnn_models",
    "load_cnns",
    "predict_accuracy",
    "read_small_zoo",
    "read_wild_park",
    "register_cnn_model",
    "save_cnn_model",
]
