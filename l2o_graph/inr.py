"""Images as networks: fitting, storing, rendering and reading SIRENs that represent one image each.

``INRClassifier`` and ``INREditor`` read such networks.

Axes, in addition to those of ``l2o_graph``: I networks (INRs), Q points (pixels).
"""

from l2o_graph.datasets.inr.augment import AMOUNTS, Amounts, augmented
from l2o_graph.datasets.inr.canonical import canonical
from l2o_graph.datasets.inr.dilation import dilation_targets
from l2o_graph.datasets.inr.files import INRs, load_inrs
from l2o_graph.datasets.inr.fit import RECIPES, Recipe, fit
from l2o_graph.datasets.inr.published import read_published
from l2o_graph.datasets.inr.siren import (
    coordinates,
    evaluate,
    initialise,
    psnr,
    render,
    stack_networks,
)
from l2o_graph.metanets.inr import (
    INRClassifier,
    INREditor,
    list_inr_models,
    load_inr_model,
    save_inr_model,
)
from l2o_graph.metanets.inr_config import INRModelConfig, inr_config, register_inr_model
from l2o_graph.metanets.statistics import Statistics, statistics_of

__all__ = [
    "AMOUNTS",
    "RECIPES",
    "Amounts",
    "INRClassifier",
    "INREditor",
    "INRModelConfig",
    "INRs",
    "Recipe",
    "Statistics",
    "augmented",
    "canonical",
    "coordinates",
    "dilation_targets",
    "evaluate",
    "fit",
    "initialise",
    "inr_config",
    "list_inr_models",
    "load_inr_model",
    "load_inrs",
    "psnr",
    "read_published",
    "register_inr_model",
    "render",
    "save_inr_model",
    "stack_networks",
    "statistics_of",
]
