"""Structures where pickles of earlier versions look for them: see ``l2o_graph.layout.spec``."""

from l2o_graph.layout.spec import Bias, Kernel, NetSpec, Neurons

__all__ = ["Bias", "Kernel", "NetSpec", "Neurons"]
