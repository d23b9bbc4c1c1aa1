"""CNNs as data: trained in numbers, stored with their accuracy, and read back.

Axes, beside those of ``l2o_graph``: I networks (CNNs), B images of a batch.
"""

from l2o_graph.cnn.architecture import CNNArchitecture, cnn_module
from l2o_graph.cnn.files import CNNs, load_cnns

__all__ = ["CNNArchitecture", "CNNs", "cnn_module", "load_cnns"]
