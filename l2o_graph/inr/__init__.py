"""Images as networks: SIRENs that each draw one image, fitted, stored, read and drawn again.

Axes, beside those of ``l2o_graph``: I networks (INRs), Q points (pixels).
"""

from l2o_graph.inr.files import INRs, load_inrs
from l2o_graph.inr.fit import RECIPES, Recipe, fit
from l2o_graph.inr.published import read_published
from l2o_graph.inr.siren import coordinates, evaluate, initialise, psnr, render

__all__ = [
    "RECIPES",
    "INRs",
    "Recipe",
    "coordinates",
    "evaluate",
    "fit",
    "initialise",
    "load_inrs",
    "psnr",
    "read_published",
    "render",
]
