"""Earlier location of ``l2o_graph.layout.spec``, for pickles of earlier versions."""

from l2o_graph.layout.spec import Bias, Kernel, NetSpec, Neurons

__all__ = ["Bias", "Kernel", "NetSpec", "Neurons"]
